"""Trainings that kill themselves: `python -m tests.killed_training FOLDER` writes how each of them ended."""

import os
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback

from lasar_hf.files import write_json
from tests.training import first_code, grpo_trainer, sft_trainer


class Kill(TrainerCallback):
    """`kill -9` after a step, which no handler sees."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def make(kind: str, folder: Path):
    """A trainer of four steps, of which every second is saved."""
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    if kind == "sft":
        return sft_trainer(folder, policy_weight=0.5, **options)
    return grpo_trainer(folder, reward_funcs=[first_code], depth_weight=1.0, **options)


def main(folder: str) -> None:
    """Each training in a process of its own."""
    codes = []
    for kind in ("sft", "grpo"):
        child = os.fork()
        if child == 0:
            trainer = make(kind, Path(folder, kind))
            trainer.add_callback(Kill())
            trainer.train()
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    write_json(Path(folder, "ended.json"), codes)


if __name__ == "__main__":
    main(sys.argv[1])
