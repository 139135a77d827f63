"""
Reinforcement learning (GRPO) of recommendation quality and depth.

    accelerate launch recipes/grpo.py --config recipes/scientific/grpo.yaml

The code is `lasar_hf/commands/grpo.py`.
"""

from lasar_hf.commands.grpo import run


if __name__ == "__main__":
    run()
