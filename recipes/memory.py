"""
Give checkpoints an item memory: a matrix of item-to-item steps of the training sequences, mixed with the model.

    python recipes/memory.py --config recipes/scientific/memory.yaml

The code is `lasar_hf/commands/memory.py`.
"""

from lasar_hf.commands.memory import run


if __name__ == "__main__":
    run()
