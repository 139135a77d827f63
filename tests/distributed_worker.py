"""
One process of the distributed tests: trains tiny models for a few steps and writes the losses to a file.

    torchrun --nproc_per_node 2 -m tests.distributed_worker out sft,grpo trainer fsdp2

Two ways to train: `trainer` (as the launcher set it up) and `fsdp2` (torch's fully_shard in a loop of our own, since
accelerate silently runs DDP instead on a CPU).
"""

import itertools
import json
import os
import sys
import zlib
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig
from torch.distributed.fsdp import fully_shard
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from lasar_hf import (
    LasarForGenerativeRec,
    LasarGRPOConfig,
    LasarGRPOTrainer,
    LasarSFTConfig,
    LasarSFTTrainer,
    SidCatalog,
)
from lasar_hf.trainers import lasar_lora_config, unsharded_weights
from tests.tiny import batch, row
from tests.training import COMMON, first_code, grpo_setup, sft_setup


STEPS = 4
GLOBAL_BATCH = 8
TASKS = ("sft", "grpo")
# The same without gradient checkpointing; also stage 1, and LoRA.
PLAIN_TASKS = ("stage1-plain", "sft-plain", "grpo-plain", "sft-plain-lora", "grpo-plain-lora")
DEPTHS = [1, 1, 1, 1, 4, 3, 4, 2, 2, 2, 2, 2, 1, 1, 1, 1]  # each rank gets four at a time: their depths differ
UNEVEN_DEPTHS = [0, 0, 0, 0, 4, 3, 4, 2]  # the first rank has no latent slot


class FixedDraws(LasarGRPOTrainer):
    """Draws each group under a seed made of its prompt, so that the draws do not depend on the number of processes."""

    def draw_candidates(self, prompts, trainer):
        group_size, parts = self.num_generations, []
        for start in range(0, len(prompts), group_size):
            torch.manual_seed(zlib.crc32(prompts[start].encode()) + self.state.global_step)
            parts.append(super().draw_candidates(prompts[start : start + group_size], trainer))
        names = ("prompt_ids", "completion_ids", "items", "depth_log_prob")
        return {**{name: sum((part[name] for part in parts), []) for name in names}, "logprobs": None}


def arguments(folder: Path, options: tuple[str, ...]) -> dict:
    """SGD, since Adam's first steps follow the sign even of gradients that are rounding errors."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    return {
        **COMMON, "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": GLOBAL_BATCH // world,
        "ddp_backend": "gloo" if world > 1 else None, "optim": "sgd",
        "learning_rate": 0.05, "ddp_timeout": 60, "gradient_checkpointing": "plain" not in options,
    }


def shard_everything(args) -> None:
    """ZeRO-3 does not shard small weights, which all weights of a tiny model are."""
    if args.deepspeed_plugin is not None:
        zero = args.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0


def prompt_scores(lasar: LasarForGenerativeRec, catalog: SidCatalog) -> list[list[float]]:
    """Scores of the recommendations for two prompts."""
    return lasar.recommend(**batch([row(lasar, 5, 0), row(lasar, 8, 0, seed=1)]), catalog=catalog).scores.tolist()


def adapter(model: LasarForGenerativeRec, options: tuple[str, ...]) -> LoraConfig | None:
    """LoRA if the task asks for it; its random weights are the same in every process."""
    torch.manual_seed(0)
    return lasar_lora_config(model, r=4, lora_dropout=0.0) if "lora" in options else None


def sft_trainer(folder: Path, *options: str, depths: list[int] = DEPTHS) -> LasarSFTTrainer:
    """Stage 2 (stage 1 without latent slots), from a model that is created unsharded."""
    policy_weight = 0.1 if max(depths) else 0.0
    args = LasarSFTConfig(
        **arguments(folder, options), policy_weight=policy_weight, train_sampling_strategy="sequential"
    )
    shard_everything(args)
    with unsharded_weights():
        model, tokenizer, catalog, rows, anchors = sft_setup(depths)
    return LasarSFTTrainer(
        model, args, catalog, anchors, train_dataset=rows, processing_class=tokenizer,
        ranking_evaluator=lambda lasar: {"scores": prompt_scores(lasar, catalog)},
        peft_config=adapter(model, options),
    )


def grpo_trainer(folder: Path, *options: str) -> LasarGRPOTrainer:
    """RL with a reference model; both are loaded from a path, which ZeRO-3 shards while it loads."""
    args = LasarGRPOConfig(**arguments(folder, options), num_generations=4, shuffle_dataset=False, beta=0.1)
    shard_everything(args)
    with unsharded_weights():
        model, tokenizer, catalog, rows = grpo_setup()
        path = str(folder / "model")
        model.save_pretrained(path)  # by the main process
    PartialState().wait_for_everyone()
    peft_config = adapter(model, options)
    return FixedDraws(
        model if peft_config else path, args, catalog, [first_code], train_dataset=rows, processing_class=tokenizer,
        peft_config=peft_config,
    )


def by_trainer(trainer) -> list[dict]:
    """The Trainer's own loop."""
    trainer.train()
    if is_deepspeed_zero3_enabled():
        assert all(parameter.numel() == 0 for parameter in trainer.model.parameters()), "nothing was sharded"
    return [log for log in trainer.state.log_history if "loss" in log]


def by_fsdp2(trainer) -> list[dict]:
    """The Trainer's loop, on a model under fully_shard."""
    model = trainer.model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.backbone.layers:
        fully_shard(layer)
    trainer.model_wrapped = fully_shard(model, reshard_after_forward=True)  # as in fsdp2.yaml
    trainer.current_gradient_accumulation_steps = 1
    rate, logs = trainer.args.learning_rate, []
    batches = itertools.chain.from_iterable(itertools.repeat(trainer.get_train_dataloader()))
    for step in range(STEPS):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate * (1 - step / STEPS))
        optimizer.zero_grad()
        trainer.state.global_step = step
        loss = trainer.training_step(model, next(batches), None)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        logs.append({"loss": trainer.accelerator.gather(loss).mean().item(), "grad_norm": norm.full_tensor().item()})
    return logs


def run(task: str, way: str, folder: Path) -> list[dict]:
    """The losses of one training."""
    name, *options = task.split("-")
    trainers = {
        "sft": sft_trainer, "grpo": grpo_trainer, "uneven": partial(sft_trainer, depths=UNEVEN_DEPTHS),
        "stage1": partial(sft_trainer, depths=[0] * 16),
    }
    trainer = trainers[name](folder, *options)
    logs = {"trainer": by_trainer, "fsdp2": by_fsdp2}[way](trainer)
    if name == "sft":
        logs.append(trainer.on_gathered_weights(trainer.evaluators[""]))  # as at an evaluation
    if way == "trainer" and "lora" not in options:
        trainer.save_model(str(folder / "saved"))
        trainer.accelerator.wait_for_everyone()
        with unsharded_weights():
            saved = LasarForGenerativeRec.from_pretrained(folder / "saved")
        logs.append({"saved_scores": prompt_scores(saved, trainer.catalog)})
    return logs


def main(out: str, tasks: str, *ways: str) -> None:
    """Train each task in each way and write what the main process logs."""
    for task, way in itertools.product(tasks.split(","), ways):
        logs = run(task, way, Path(out, f"{task}-{way}"))
        if PartialState().is_main_process:
            Path(out, f"{task}-{way}.json").write_text(json.dumps(logs))
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()  # its threads would abort a process that ends before they do


if __name__ == "__main__":
    main(*sys.argv[1:])
