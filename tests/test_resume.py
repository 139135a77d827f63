"""Resuming: which settings must be the same, what a whole checkpoint is, and which one is taken."""

import dataclasses
import json
import logging
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from lasar_hf import LasarGRPOConfig, LasarSFTConfig
from lasar_hf.commands.grpo import GRPOScriptArguments
from lasar_hf.commands.sft import SFTScriptArguments
from lasar_hf.files import read_json, write_json
from lasar_hf.trainers import checkpoint_to_resume
from lasar_hf.trainers.resume import FREE, LENGTH, seal_checkpoint
from tests.recipes import ROOT
from tests.training import COMMON, first_code, grpo_trainer, sft_trainer


BASIC = dict(use_cpu=True, bf16=False)
EVALUATED = dict(eval_strategy="steps", eval_steps=2, save_steps=2)
RUN = dict(max_steps=4, policy_weight=0.1, save_strategy="steps", save_steps=2)


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def write_checkpoint(folder, step, max_steps=20):
    """A whole checkpoint of few bytes."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    seal_checkpoint(checkpoint)
    write_json(checkpoint / "trainer_state.json", {"global_step": step, "max_steps": max_steps})
    return checkpoint


def resume(folder, config=LasarSFTConfig, **options):
    return checkpoint_to_resume(config(str(folder), **{**BASIC, **options}), data={"a": "1"})


@pytest.mark.parametrize(
    "change",
    [
        dict(lr_scheduler_type="constant"),
        dict(lr_scheduler_kwargs={"last_epoch": 1}),
        dict(warmup_steps=0.9),
        dict(max_length=20),
        dict(neftune_noise_alpha=9.0),
        dict(bf16=True),
        dict(optim="sgd"),
        dict(max_grad_norm=0.5),
        dict(adam_beta2=0.9),
        dict(train_sampling_strategy="sequential"),
        dict(dataloader_drop_last=True),
        dict(full_determinism=False, eval_strategy="steps"),  # evaluation draws random numbers
        dict(label_smoothing_factor=0.1),
        dict(average_tokens_across_devices=False),
    ],
    ids=lambda change: next(reversed(change)),
)
def test_settings_of_sft_that_change_the_weights_are_refused(tmp_path, change):
    assert resume(tmp_path) is None
    write_checkpoint(tmp_path, 2)
    assert resume(tmp_path) == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=rf"different settings \(.*{next(reversed(change))}.*\).*output_dir"):
        resume(tmp_path, **change)


@pytest.mark.parametrize(
    "change",
    [
        dict(use_bias_correction_kl=False),
        dict(importance_sampling_level="sequence"),
        dict(top_entropy_quantile=0.5),
        dict(entropy_coef=0.1),
        dict(delta=2.0),
        dict(off_policy_mask_threshold=0.1),
        dict(reward_weights=[1.0, 2.0]),
        dict(sync_ref_model=True),
        dict(disable_dropout=False),
        dict(per_device_eval_batch_size=4),  # evaluation draws candidates
    ],
    ids=lambda change: next(iter(change)),
)
def test_settings_of_grpo_that_change_the_weights_are_refused(tmp_path, change):
    assert resume(tmp_path, LasarGRPOConfig, num_generations=4) is None
    write_checkpoint(tmp_path, 2)
    with pytest.raises(ValueError, match=rf"\({next(iter(change))}\)"):
        resume(tmp_path, LasarGRPOConfig, num_generations=4, **change)


def test_the_free_settings_may_change(tmp_path):
    assert resume(tmp_path / "a") is None
    write_checkpoint(tmp_path / "a", 2)
    shutil.move(tmp_path / "a", tmp_path / "b")
    changes = dict(logging_steps=3, save_steps=7, save_total_limit=1, run_name="b", report_to="none", log_level="info")
    changes |= dict(dataloader_num_workers=1, gradient_checkpointing=False)
    assert resume(tmp_path / "b", **changes) == str(tmp_path / "b" / "checkpoint-2")


@pytest.mark.parametrize("config", [LasarSFTConfig, LasarGRPOConfig])
def test_options_of_our_own_are_compared_and_free_ones_exist(config):
    inherited = {part.name for part in dataclasses.fields(config.__mro__[1])}
    own = {part.name for part in dataclasses.fields(config)} - inherited
    assert own & {*FREE, *LENGTH} == {"license", "dataset"}  # only on the card
    classes = (LasarSFTConfig, LasarGRPOConfig, SFTScriptArguments, GRPOScriptArguments)
    names = {part.name for cls in classes for part in dataclasses.fields(cls)}
    assert {*FREE, *LENGTH} <= names


def test_data_and_anchors_may_move_but_their_content_is_compared(tmp_path):
    before = dict(data_dir="old/data", anchors_dir="old/anchors", data={"a": "1"}, anchors={"b": "1"})
    args = LasarSFTConfig(str(tmp_path), **BASIC)
    assert checkpoint_to_resume(args, **before) is None
    checkpoint = write_checkpoint(tmp_path, 2)
    moved = before | dict(data_dir="new/data", anchors_dir="new/anchors")
    assert checkpoint_to_resume(args, **moved) == str(checkpoint)
    with pytest.raises(ValueError, match=r"\(anchors\)"):
        checkpoint_to_resume(args, **moved | dict(anchors={"b": "2"}))


def test_the_number_of_processes_and_the_data_are_compared(tmp_path, monkeypatch):
    assert resume(tmp_path) is None
    write_checkpoint(tmp_path, 2)
    with pytest.raises(ValueError, match=r"\(data\)"):
        checkpoint_to_resume(LasarSFTConfig(str(tmp_path), **BASIC), data={"a": "2"})
    monkeypatch.setattr(LasarSFTConfig, "world_size", 2)
    with pytest.raises(ValueError, match=r"\(num_processes\)"):
        resume(tmp_path)


def test_what_an_older_version_did_not_record_is_named(tmp_path):
    assert resume(tmp_path) is None
    write_checkpoint(tmp_path, 2)
    before = read_json(tmp_path / "run.json")
    del before["max_length"]
    write_json(tmp_path / "run.json", before | {"seed": 7})
    with pytest.raises(ValueError, match=r"different settings \(seed\) and of an older version.* max_length"):
        resume(tmp_path)


def test_a_missing_or_damaged_record_of_the_run_is_named(tmp_path):
    assert resume(tmp_path) is None
    write_checkpoint(tmp_path, 2)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json"):
        resume(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no run.json.*unknown which settings.*delete the checkpoints"):
        resume(tmp_path)


def test_saving_decides_which_checkpoint_is_the_best(tmp_path):
    assert resume(tmp_path, **EVALUATED, load_best_model_at_end=True) is None
    write_checkpoint(tmp_path, 2)
    with pytest.raises(ValueError, match=r"\(save_steps\)"):
        resume(tmp_path, **EVALUATED | dict(save_steps=4), load_best_model_at_end=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(max_steps=50), "max_steps was -1 and is 50.*will differ"),
        (dict(num_train_epochs=5), "num_train_epochs was 3.0 and is 5.*will differ"),
        ({}, None),
    ],
)
def test_another_length_warns_of_its_schedule(tmp_path, options, expected):
    resume(tmp_path)
    write_checkpoint(tmp_path, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume(tmp_path, **options)
    found = [str(warning.message) for warning in caught if "will differ" in str(warning.message)]
    assert [bool(re.search(expected, text)) for text in found] == [True] if expected else found == []


@pytest.mark.parametrize(
    ("schedule", "warns"),
    [
        (dict(lr_scheduler_type="constant"), False),
        (dict(lr_scheduler_type="constant_with_warmup", warmup_steps=3), False),
        (dict(lr_scheduler_type="constant_with_warmup", warmup_steps=0.1), True),
        (dict(lr_scheduler_type="cosine"), True),
    ],
)
def test_a_finished_run_goes_on_without_a_warning_if_its_schedule_allows(tmp_path, schedule, warns):
    resume(tmp_path, **schedule)
    write_checkpoint(tmp_path, 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume(tmp_path, **schedule, max_steps=50)
    assert any("starts at 0, then jumps up" in str(warning.message) for warning in caught) == warns


# ---------------------------------------------------------------------------------------------------------------------
# Whole checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and weights of a run with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(folder)


def train(folder):
    """Run, or resume, as recipes/sft.py does. Returns the weights."""
    trainer = sft_trainer(folder, **RUN)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.args))
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the run whose files may be damaged."""
    return shutil.copytree(finished[0], tmp_path / "run")


def again(folder):
    return checkpoint_to_resume(LasarSFTConfig(str(folder), **{**COMMON, "per_device_train_batch_size": 3, **RUN}))


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip(path, _):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SEALED = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"]
CUTS = [(lambda path, _: path.unlink(), 0), (truncate, 0), (truncate, 300)]


@pytest.mark.parametrize(
    ("name", "damage", "size"),
    [(name, *damage) for name in SEALED for damage in [*CUTS, (flip, 0)]]
    + [(name, *damage) for name in ("trainer_state.json", "checkpoint_files.json") for damage in CUTS],
)
def test_a_checkpoint_with_a_damaged_file_is_skipped(copy, caplog, name, damage, size):
    assert again(copy) == str(copy / "checkpoint-4")
    damage(copy / "checkpoint-4" / name, size)
    with caplog.at_level(logging.WARNING):
        assert again(copy) == str(copy / "checkpoint-2")
    assert f"{copy / 'checkpoint-4'} is skipped, since it is not whole: {name}" in caplog.text


def test_the_run_ends_as_it_would_have_without_the_damage(finished, copy):
    truncate(copy / "checkpoint-4" / "optimizer.pt", 100)
    resumed = train(copy)
    for name, parameter in finished[1].items():
        assert torch.equal(resumed[name], parameter), name


def test_with_damaged_checkpoints_only_the_run_is_refused(copy):
    for step in (2, 4):
        (copy / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="no whole checkpoint.* checkpoint-4: optimizer.pt is missing. Put the file"):
        again(copy)


def test_a_run_that_was_killed_in_its_first_save_starts_from_the_beginning(copy, caplog):
    shutil.rmtree(copy / "checkpoint-4")
    truncate(copy / "checkpoint-2" / "trainer_state.json", 100)
    with caplog.at_level(logging.WARNING):
        assert again(copy) is None
    assert "starts from the beginning" in caplog.text
    (copy / "checkpoint-2" / "trainer_state.json").unlink()
    assert again(copy) is None


def test_other_files_in_a_checkpoint_do_not_matter(copy):
    (copy / "checkpoint-4" / "README.md").write_text("results of an evaluation")
    (copy / "checkpoint-4" / "item_memory.safetensors").write_text("fitted later")
    assert again(copy) == str(copy / "checkpoint-4")


def test_a_checkpoint_without_optimizer_is_refused(tmp_path):
    options = RUN | dict(save_only_model=True, max_steps=2)
    trainer = sft_trainer(tmp_path, **options)
    assert checkpoint_to_resume(trainer.args) is None
    trainer.train()
    with pytest.raises(ValueError, match="save_only_model there is no optimizer"):
        checkpoint_to_resume(trainer.args)


def test_the_best_checkpoint_must_be_whole_too(tmp_path, caplog):
    options = EVALUATED | dict(load_best_model_at_end=True)
    assert resume(tmp_path, **options) is None
    for step in (2, 4, 6):
        state = write_checkpoint(tmp_path, step) / "trainer_state.json"
        best = tmp_path / f"checkpoint-{min(step, 4)}"
        write_json(state, read_json(state) | {"best_model_checkpoint": str(best)})
    assert resume(tmp_path, **options) == str(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        assert resume(tmp_path, **options) == str(tmp_path / "checkpoint-2")
    assert "in the best checkpoint until then, checkpoint-4, model.safetensors is missing" in caplog.text


def test_a_checkpoint_of_grpo_names_its_files(tmp_path):
    trainer = grpo_trainer(tmp_path, reward_funcs=[first_code], save_strategy="steps", save_steps=2)
    trainer.train()
    names = set(json.loads((tmp_path / "checkpoint-2" / "checkpoint_files.json").read_text()))
    assert {"lasar_state.json", "optimizer.pt", "rng_state.pth", "model.safetensors"} <= names
    assert "trainer_state.json" not in names


@pytest.mark.distributed
def test_all_processes_resume_what_the_main_one_decides(tmp_path):
    """The older checkpoint, since the newest lacks the state of the second process."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.resume_worker"]
    command = [sys.executable, "-m", *launcher, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"process-{index}.txt").read_text() for index in (0, 1)] == ["checkpoint-2 True"] * 2
    assert "rng_state_1.pth is missing" in done.stderr
