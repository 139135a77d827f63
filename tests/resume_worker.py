"""
One process of a test of resuming: trains, loses a file of the second process, resumes, and says what it took.

    torchrun --nproc_per_node 2 -m tests.resume_worker out
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from lasar_hf.trainers import checkpoint_to_resume
from tests.training import sft_trainer


OPTIONS = dict(
    max_steps=4, policy_weight=0.1, save_strategy="steps", save_steps=2, per_device_train_batch_size=1,
    ddp_backend="gloo",
)  # fmt: skip


def train(folder: Path) -> tuple[str | None, dict[str, torch.Tensor]]:
    """The checkpoint that this process resumed from, and the trained weights."""
    trainer = sft_trainer(folder, **OPTIONS)
    checkpoint = checkpoint_to_resume(trainer.args)
    trainer.train(resume_from_checkpoint=checkpoint)
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    return checkpoint and Path(checkpoint).name, weights


def main(folder: Path) -> None:
    """Train, and resume after the state of the second process was lost."""
    state = PartialState(cpu=True)
    _, whole = train(folder)
    state.wait_for_everyone()
    if state.is_main_process:
        (folder / "checkpoint-4" / "rng_state_1.pth").unlink()
    taken, resumed = train(folder)
    same = all(torch.equal(resumed[name], value) for name, value in whole.items())
    (folder / f"process-{state.process_index}.txt").write_text(f"{taken} {same}")
    state.wait_for_everyone()
    state.destroy_process_group()  # its threads would abort a process that ends before they do


if __name__ == "__main__":
    main(Path(sys.argv[1]))
