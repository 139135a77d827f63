"""Full disks and folders without rights: prepare, sft, eval and recommend name the folder, and go on afterwards."""

import json
import os
import shutil
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import lasar_cli
from lasar_hf import LasarProcessor, LasarSFTConfig
from lasar_hf.commands import evaluate, recommend, sft
from lasar_hf.commands import memory as memory_command
from lasar_hf.data import PreparedData, examples, sft_examples
from lasar_hf.locks import LOCK_NAME, locked
from lasar_hf.trainers import LasarModelConfig
from tests.disks import full_disk, read_only
from tests.preparing import files, run
from tests.recipes import report


BACKBONE = {
    "model_type": "gpt_neox", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def train(data: Path, out: Path, instruction: str | None = None) -> None:
    script = sft.SFTScriptArguments(
        str(data), backbone_config=BACKBONE, max_latent_steps=4, eval_users=3, instruction=instruction
    )
    args = LasarSFTConfig(
        str(out), max_steps=2, per_device_train_batch_size=8, bf16=False, use_cpu=True, gradient_checkpointing=False,
        report_to="none", save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=2, disable_tqdm=True,
    )  # fmt: skip
    sft.main(script, args, LasarModelConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared data, and a checkpoint of stage 1."""
    folder = tmp_path_factory.mktemp("disks")
    run(folder / "data")
    train(folder / "data", folder / "checkpoint")
    shop = PreparedData.load(folder / "data")
    rows = [{"user_id": f"u{user}", "history": [shop.items["item_id"][user]]} for user in range(40)]
    (folder / "histories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_evaluate(folder: Path, out: Path) -> None:
    models = [f"direct={folder / 'checkpoint'}@0"]
    evaluate.main(evaluate.EvaluateArguments(str(folder / "data"), str(out), models, users=12, cards=False))


def run_recommend(folder: Path, out: Path) -> None:
    arguments = [str(folder / name) for name in ("checkpoint", "histories.jsonl")]
    recommend.main(recommend.RecommendArguments(*arguments, str(out), shard_size=16))


def shards(out: Path) -> list:
    return [pq.read_table(path).to_pylist() for path in sorted(out.glob("part-*.parquet"))]


# What starts a stage, and its results without times.
STAGES = {
    "prepare": (lambda folder, out: run(out), files),
    "sft": (lambda folder, out: train(folder / "data", out), lambda out: (out / "model.safetensors").read_bytes()),
    "evaluate": (run_evaluate, report),
    "recommend": (run_recommend, shards),
}


@pytest.fixture(scope="module")
def whole(folder):
    """Folder of each stage on a disk with enough space."""
    for name, (start, _) in STAGES.items():
        start(folder, folder / "whole" / name)
    return folder / "whole"


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_named_and_the_same_command_goes_on(folder, whole, tmp_path, stage, capsys):
    start, results = STAGES[stage]
    largest = max(path.stat().st_size for path in (whole / stage).rglob("*") if path.is_file())
    with full_disk(largest - 1), pytest.raises(OSError, match=str(tmp_path)):
        start(folder, tmp_path)
    if stage == "evaluate":  # what took long is shown before it is saved
        assert "| direct |" in capsys.readouterr().out
    assert not [path for path in tmp_path.rglob(".*") if path.name != LOCK_NAME]  # no temporary files
    start(folder, tmp_path)
    assert results(tmp_path) == results(whole / stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_without_rights_is_named_before_the_work(folder, whole, tmp_path, stage, monkeypatch):
    start, results = STAGES[stage]
    with monkeypatch.context() as patch, read_only(tmp_path), pytest.raises(OSError, match=str(tmp_path)):
        patch.setattr(PreparedData, "load", None)
        patch.setattr(recommend, "read_histories", None)
        start(folder, tmp_path)
    assert not list(tmp_path.iterdir())
    start(folder, tmp_path)
    assert results(tmp_path) == results(whole / stage)


def test_the_item_memory_needs_a_checkpoint_that_can_be_written(folder, monkeypatch):
    monkeypatch.setattr(PreparedData, "load", None)
    arguments = memory_command.MemoryArguments(str(folder / "data"), [str(folder / "checkpoint")])
    with read_only(folder / "checkpoint"), pytest.raises(OSError, match=str(folder / "checkpoint")):
        memory_command.main(arguments)


def test_prepared_data_may_be_on_a_read_only_disk(folder, tmp_path):
    """Training with other examples than before, so that none are in the cache, the item memory and evaluation."""
    before = files(folder / "data")
    with read_only(folder / "data"):
        train(folder / "data", tmp_path / "checkpoint", instruction="Something else")
        memory_command.main(memory_command.MemoryArguments(str(folder / "data"), [str(tmp_path / "checkpoint")]))
        run_evaluate(folder, tmp_path / "report")
    assert files(folder / "data") == before
    assert not [name for name in before if "cache" in name]


def test_a_run_deletes_the_temporary_files_of_a_killed_one(tmp_path):
    for folder in (tmp_path, tmp_path / "kept"):
        folder.mkdir(exist_ok=True)
        (folder / ".report.1.tmp.json").touch()
    with locked(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"kept", LOCK_NAME}
    assert (tmp_path / "kept" / ".report.1.tmp.json").exists()  # perhaps another command writes there


def test_examples_are_cached_until_the_code_changes(folder, tmp_path, monkeypatch):
    """A cache file that was cut is written again."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    samples = PreparedData.load(folder / "data").samples["test"]
    processor = LasarProcessor.from_pretrained(folder / "checkpoint")
    expected = sft_examples(samples, processor).to_list()
    (path,) = (tmp_path / "lasar_hf").iterdir()
    before = path.stat().st_mtime_ns
    assert sft_examples(samples, processor).to_list() == expected and path.stat().st_mtime_ns == before
    os.truncate(path, path.stat().st_size // 2)
    assert sft_examples(samples, processor).to_list() == expected
    monkeypatch.setattr(examples, "_code_hash", lambda: "other")
    assert sft_examples(samples, processor).to_list() == expected
    assert len(list((tmp_path / "lasar_hf").iterdir())) == 2


def test_lasar_evaluate_shows_one_table(folder, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    settings = {"models": [f"direct={folder / 'checkpoint'}@0"], "baselines": False, "cards": False}
    (tmp_path / "train.yaml").write_text(json.dumps({"evaluate": settings}))
    result = CliRunner().invoke(lasar_cli.app, ["evaluate", str(tmp_path), "--users", "5"], catch_exceptions=False)
    assert result.output.count("direct") == 1 and "report.md" in result.output.replace("\n", "")
