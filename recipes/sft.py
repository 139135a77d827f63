"""
Supervised training: stage 1 grounds the Semantic IDs, stage 2 teaches latent reasoning.

    accelerate launch recipes/sft.py --config recipes/scientific/stage1.yaml
    accelerate launch recipes/sft.py --config recipes/scientific/stage2.yaml

The code is `lasar_hf/commands/sft.py`.
"""

from lasar_hf.commands.sft import run


if __name__ == "__main__":
    run()
