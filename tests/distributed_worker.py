"""
One process of the distributed tests: trains tiny models for a few steps and writes the losses to a file.

    torchrun --nproc_per_node 2 -m tests.distributed_worker out stage2/trainer grpo-plain-lora/trainer grpo/fsdp2

A run is `task/way`. A task is a stage and options: `plain` trains without gradient checkpointing, `lora` an adapter,
in `uneven` the first process has no latent slot or terminal anchor, `users` has batches of users, `depths` trains at
several depths beside plain text, and `exact` has the exact depth gradient without groups of equal rewards. There are
two ways to train: `trainer` (as the launcher set it up) and `fsdp2` (torch's fully_shard in a loop of our own, since
accelerate silently runs DDP instead on a CPU).
"""

import itertools
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
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
from tests.training import COMMON, FixedDraws, first_code, grpo_setup, sft_setup, some_equal, user_setup


STEPS = 4
GLOBAL_BATCH = 8
STAGES = ("stage1", "stage2", "grpo")
MATRIX = [f"{stage}{plain}{lora}" for stage in STAGES for plain in ("", "-plain") for lora in ("", "-lora")]
UNEVEN = ["stage2-uneven", "grpo-uneven"]
EXTRA = ["stage2-depths", "grpo-exact"]
DEPTHS = [1, 1, 1, 1, 4, 3, 4, 2, 2, 2, 2, 2, 1, 1, 1, 1]  # each rank gets four at a time: their depths differ
UNEVEN_DEPTHS = [0, 0, 0, 0, 4, 3, 4, 2]  # the first rank has no latent slot


def arguments(folder: Path, options: tuple[str, ...]) -> dict:
    """SGD, since Adam's first steps follow the sign even of gradients that are rounding errors."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    return {
        **COMMON,
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH // world,
        "ddp_backend": "gloo" if world > 1 else None,
        "optim": "sgd",
        "learning_rate": 0.05,
        "ddp_timeout": 60,
        "gradient_checkpointing": "plain" not in options,
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


def beside_text(rows: Dataset) -> Dataset:
    """Three examples of plain text, then those of stage 2."""
    text = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6], "depth": -1} for _ in range(3)]
    return Dataset.from_list([*text, *rows.remove_columns("sample_index").add_column("depth", [0] * 5)])


def sft_trainer(folder: Path, stage: str, *options: str) -> LasarSFTTrainer:
    """Stage 1 (without latent slots) or 2, from a model that is created unsharded."""
    depths = [0] * 16 if stage == "stage1" else UNEVEN_DEPTHS if "uneven" in options else DEPTHS
    policy_weight = 0.1 if max(depths) else 0.0
    config = arguments(folder, options) | {"train_sampling_strategy": "sequential"}
    if "users" in options:  # a step has two batches, which one process accumulates
        accumulated = 2 if config["ddp_backend"] is None else 1
        config |= {"max_tokens_per_batch": 90, "gradient_accumulation_steps": accumulated}
    weights = [1.0, 0.0, 0.5, 1.0] if "depths" in options else None
    args = LasarSFTConfig(**config, policy_weight=policy_weight, depth_weights=weights)
    shard_everything(args)
    with unsharded_weights():
        model, tokenizer, catalog, rows, anchors = user_setup() if "users" in options else sft_setup(depths)
    if "depths" in options:  # of the eight examples of a step, the first process has three of text
        rows, anchors = beside_text(rows.select(range(5))), None
    return LasarSFTTrainer(
        model,
        args,
        catalog,
        anchors,
        train_dataset=rows,
        eval_dataset=rows if "depths" in options else rows.select(range(5)),
        processing_class=tokenizer,
        ranking_evaluator=lambda lasar: {"scores": prompt_scores(lasar, catalog)},
        peft_config=adapter(model, options),
    )


def grpo_trainer(folder: Path, stage: str, *options: str) -> LasarGRPOTrainer:
    """RL with a reference model; both are loaded from a path, which ZeRO-3 shards while it loads."""
    exact = dict(depth_gradient="exact", depth_weight=1.0, drop_groups_without_signal=True, step_cost="auto")
    args = LasarGRPOConfig(
        **arguments(folder, options) | (exact if "exact" in options else {}),
        num_generations=4,
        shuffle_dataset=False,
        beta=0.1,
        per_device_eval_batch_size=4,
    )
    shard_everything(args)
    with unsharded_weights():
        model, tokenizer, catalog, rows = grpo_setup()
        if {"uneven", "exact"} & set(options):  # prompts 0 and 2 are those of the first process
            anchors = [anchor if i % 2 else None for i, anchor in enumerate(rows["terminal_anchor"])]
            rows = rows.remove_columns("terminal_anchor").add_column("terminal_anchor", anchors)
        path = str(folder / "model")
        model.save_pretrained(path)  # by the main process
    PartialState().wait_for_everyone()
    peft_config = adapter(model, options)
    return FixedDraws(
        model if peft_config else path,
        args,
        catalog,
        [some_equal if "exact" in options else first_code],
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft_config,
        eval_dataset=rows.select(range(3)),
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


def run(task: str, way: str, folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The logs of one training, and the trained weights of a model that is not sharded."""
    stage, *options = task.split("-")
    trainer = (grpo_trainer if stage == "grpo" else sft_trainer)(folder, stage, *options)
    logs = {"trainer": by_trainer, "fsdp2": by_fsdp2}[way](trainer)
    if way == "trainer" and {"uneven", "depths"} & set(options):
        logs.append(trainer.evaluate())  # the last batch of `uneven` is incomplete
    if stage == "stage2":
        logs.append(trainer.on_gathered_weights(trainer.evaluators[""]))  # as at an evaluation
    if way == "trainer" and "lora" not in options:
        trainer.save_model(str(folder / "saved"))
        trainer.accelerator.wait_for_everyone()
        with unsharded_weights():
            saved = LasarForGenerativeRec.from_pretrained(folder / "saved")
        logs.append({"saved_scores": prompt_scores(saved, trainer.catalog)})
    weights = trainer.model.named_parameters() if way == "trainer" else ()
    return logs, {name: value.detach() for name, value in weights if value.requires_grad}


def main(out: str, *runs: str) -> None:
    """Make each training and write the logs and weights of the main process."""
    for name in runs:
        task, way = name.split("/")
        logs, weights = run(task, way, Path(out, f"{task}-{way}"))
        if PartialState().is_main_process:
            Path(out, f"{task}-{way}.json").write_text(json.dumps(logs))
            torch.save(weights, Path(out, f"{task}-{way}.pt"))
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()  # its threads would abort a process that ends before they do


if __name__ == "__main__":
    main(*sys.argv[1:])
