"""
Rank the whole catalogue for held-out users: popularity, Markov, item-kNN, EASE, SASRec, item memory, then checkpoints.

    accelerate launch recipes/eval.py --config recipes/scientific/eval.yaml

The code is `lasar_hf/commands/evaluate.py`.
"""

from lasar_hf.commands.evaluate import run


if __name__ == "__main__":
    run()
