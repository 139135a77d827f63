"""The batch job: shards, resuming, several processes, bad histories, and the same job on Ray."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lasar_hf import SidCatalog
from lasar_hf.data import LasarProcessor
from tests.tiny import batch, tiny_catalog, tiny_model


ROOT = Path(__file__).resolve().parents[1]
HISTORIES = [[f"item-{(3 * user + step) % 20}" for step in range(1 + user % 5)] for user in range(11)]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recommend_recipe", ROOT / "recipes" / "recommend.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in (*tiny_model(), tiny_catalog()):
        part.save_pretrained(folder)
    return folder


def write_histories(path: Path, histories=HISTORIES) -> Path:
    users = [f"user-{i}" for i in range(len(histories))]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"user_id": users, "history": histories}), path)
    else:
        rows = [json.dumps({"user_id": u, "history": h}) for u, h in zip(users, histories, strict=True)]
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def arguments(checkpoint, tmp_path, histories=None, **options):
    histories = histories or write_histories(tmp_path / "histories.jsonl")
    return dict(
        model=str(checkpoint), histories=str(histories), output_dir=str(tmp_path / "out"), top_k=4, batch_size=2,
        shard_size=3, **options,
    )


def shards(folder: Path) -> dict[str, list[dict]]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted(folder.glob("part-*.parquet"))}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_shards_hold_what_recommend_returns(recipe, checkpoint, tmp_path, suffix):
    histories = write_histories(tmp_path / f"histories{suffix}")
    recipe.main(recipe.RecommendArguments(**arguments(checkpoint, tmp_path, histories)))
    written = shards(tmp_path / "out")
    assert list(map(len, written.values())) == [3, 3, 3, 2]
    rows = [row for shard in written.values() for row in shard]
    model, tokenizer = tiny_model()
    catalog = SidCatalog.from_pretrained(checkpoint)
    processor = LasarProcessor(tokenizer, catalog.codes.numpy())
    assert [row["user_id"] for row in rows] == [f"user-{i}" for i in range(11)]
    for row, history in zip(rows, HISTORIES, strict=True):
        expected = model.recommend(
            **batch([processor.prompt_ids([catalog.index_of[i] for i in history])]), catalog=catalog, top_k=4
        )
        assert row["item_ids"] == [catalog.item_ids[i] for i in expected.items[0]]
        assert row["latent_steps"] == expected.latent_steps
        torch.testing.assert_close(torch.tensor(row["scores"]), expected.scores[0], atol=2e-5, rtol=0)


def test_a_second_run_computes_only_what_is_missing(recipe, checkpoint, tmp_path, monkeypatch):
    args = recipe.RecommendArguments(**arguments(checkpoint, tmp_path))
    recipe.main(args)
    first, calls = shards(tmp_path / "out"), []
    (tmp_path / "out" / "part-00002.parquet").unlink()
    (tmp_path / "out" / "part-00003.parquet.tmp").write_text("left over by a run that was killed")
    plain = recipe.recommend_samples
    monkeypatch.setattr(recipe, "recommend_samples", lambda *a, **k: (calls.append(a), plain(*a, **k))[1])
    recipe.main(args)
    assert len(calls) == 1 and shards(tmp_path / "out") == first
    for change in (dict(latent_steps=1), dict(histories=write_histories(tmp_path / "other.jsonl", HISTORIES[1:]))):
        with pytest.raises(ValueError, match="another (latent_steps|histories_sha256): use another output_dir"):
            recipe.main(recipe.RecommendArguments(**arguments(checkpoint, tmp_path, **change)))


def test_shards_of_a_model_are_not_those_of_one_trained_again(recipe, checkpoint, tmp_path):
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    args = arguments(checkpoint, tmp_path)
    recipe.main(recipe.RecommendArguments(**args))
    recipe.main(recipe.RecommendArguments(**args | {"model": str(moved)}))
    (moved / "eval_results.json").write_text("{}")  # says nothing about the answers
    recipe.main(recipe.RecommendArguments(**args | {"model": str(moved)}))
    tiny_model(seed=1)[0].save_pretrained(moved)
    with pytest.raises(ValueError, match="another model: use another output_dir"):
        recipe.main(recipe.RecommendArguments(**args | {"model": str(moved)}))


def test_shards_may_lie_beside_the_model(recipe, checkpoint, tmp_path):
    args = arguments(shutil.copytree(checkpoint, tmp_path / "model"), tmp_path)
    for _ in range(2):
        recipe.main(recipe.RecommendArguments(**args | {"output_dir": args["model"]}))
    assert len(shards(tmp_path / "model")) == 4


def test_a_refused_request_leaves_the_folder_free(recipe, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="latent_steps is 9"):
        recipe.main(recipe.RecommendArguments(**arguments(checkpoint, tmp_path, latent_steps=9)))
    recipe.main(recipe.RecommendArguments(**arguments(checkpoint, tmp_path, latent_steps=2)))
    assert len(shards(tmp_path / "out")) == 4
    with pytest.raises(ValueError, match="shard_size is 0"):
        recipe.RecommendArguments(**arguments(checkpoint, tmp_path) | {"shard_size": 0})


def test_ids_are_kept_as_they_stand(recipe, tmp_path):
    """Names that look like dates, numbers as users, and a file without rows."""
    catalog = SidCatalog(torch.tensor([[0], [1]]), ["2020-01-01", "7"])
    path = tmp_path / "histories.jsonl"
    path.write_text('{"user_id": "2021-02-03", "history": ["2020-01-01", 7]}\n{"user_id": 5, "history": [7]}\n')
    users, histories = recipe.read_histories(path, catalog)
    assert users == ["2021-02-03", "5"] and histories == [[0, 1], [1]]
    for text, message in (
        ("", "holds no history"),
        ('{"user_id": "a", "history": "77"}', "history of user 'a' is '77', expected a list of item ids"),
        ('{"user_id": null, "history": [7]}', "row 1 has no user_id"),
        ('{"user_id": "a", "history": [7, null]}', "has the item None, which the catalogue lacks"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            recipe.read_histories(path, catalog)
    pq.write_table(pa.table({"user_id": [1.0], "history": [[7.0, 7.0]]}), tmp_path / "floats.parquet")
    assert recipe.read_histories(tmp_path / "floats.parquet", catalog) == (["1"], [[1, 1]])


def test_a_shard_of_another_job_is_refused(recipe, checkpoint, tmp_path):
    """Two jobs that began in one empty folder."""
    args = arguments(checkpoint, tmp_path)
    recipe.main(recipe.RecommendArguments(**args))
    request = tmp_path / "out" / "request.json"
    request.write_text(request.read_text().replace('"top_k": 4', '"top_k": 3'))
    with pytest.raises(ValueError, match="part-00000.parquet answers another request"):
        recipe.main(recipe.RecommendArguments(**args | {"top_k": 3}))


def test_an_adapter_is_known_with_its_base(recipe, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
        (folder / "model.safetensors").write_text(folder.name)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = recipe.model_files(str(adapter))
    (base / "model.safetensors").write_text("trained again")
    assert recipe.model_files(str(adapter)) != before


def test_the_history_can_be_excluded(recipe, checkpoint, tmp_path):
    recipe.main(recipe.RecommendArguments(**{**arguments(checkpoint, tmp_path, exclude_history=True), "top_k": 20}))
    rows = [row for shard in shards(tmp_path / "out").values() for row in shard]
    everything = {f"item-{i}" for i in range(20)}
    for row, history in zip(rows, HISTORIES, strict=True):
        assert set(row["item_ids"]) == everything - set(history) and len(row["scores"]) == len(row["item_ids"])


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ([["item-1"], ["item-2", "gone"]], "user 'user-1' has the item 'gone'"),
        ([["item-1"], []], "history of user 'user-1' is empty"),
        ([[3, 4]], "user 'user-0' has the item 3, which"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_bad_histories_are_refused_before_anything_is_written(
    recipe, checkpoint, tmp_path, suffix, histories, message
):
    path = write_histories(tmp_path / f"histories{suffix}", histories)
    with pytest.raises(ValueError, match=message):
        recipe.main(recipe.RecommendArguments(**arguments(checkpoint, tmp_path, path)))
    assert not (tmp_path / "out").exists()


def test_a_missing_column_is_named(recipe, checkpoint, tmp_path):
    (tmp_path / "histories.jsonl").write_text('{"user_id": "a", "items": ["item-1"]}\n')
    with pytest.raises(ValueError, match="histories.jsonl: line 1 has no 'history'"):
        recipe.main(
            recipe.RecommendArguments(**arguments(checkpoint, tmp_path, tmp_path / "histories.jsonl"))
        )


def run(command: list[str], **variables) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_processes_share_the_shards(recipe, checkpoint, tmp_path, monkeypatch):
    """Two processes, one after the other, each write their half of what one writes."""
    args = arguments(checkpoint, tmp_path)
    recipe.main(recipe.RecommendArguments(**args))
    args["output_dir"], written = str(tmp_path / "two"), []
    for index in (0, 1):
        state = SimpleNamespace(
            process_index=index, num_processes=2, is_main_process=index == 0, device="cpu",
            wait_for_everyone=lambda: None,
        )
        monkeypatch.setattr(recipe, "PartialState", lambda state=state, **_: state)
        recipe.main(recipe.RecommendArguments(**args))
        written.append(sorted(shards(tmp_path / "two")))
    assert written[0] == ["part-00000.parquet", "part-00002.parquet"] and len(written[1]) == 4
    assert shards(tmp_path / "two") == shards(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_write_what_one_writes(recipe, checkpoint, tmp_path):
    args = arguments(checkpoint, tmp_path)
    recipe.main(recipe.RecommendArguments(**args))
    args["output_dir"] = str(tmp_path / "two")
    options = [part for name, value in args.items() for part in (f"--{name}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    shown = run([*launch, "recipes/recommend.py", *options])
    assert shown.count("Shards:   0%") == 1  # each process alone would do everything, and show it
    assert len(shards(tmp_path / "two")) == 4
    assert shards(tmp_path / "two") == shards(tmp_path / "out")


@pytest.mark.slow
def test_ray_recommends_the_same(recipe, checkpoint, tmp_path):
    pytest.importorskip("ray", reason="Ray Data is not installed: pip install 'lasar_hf[ray]'")
    args = arguments(checkpoint, tmp_path, exclude_history=True)
    recipe.main(recipe.RecommendArguments(**args))
    run([sys.executable, "examples/ray_recommend.py", args["model"], args["histories"], str(tmp_path / "ray"),
         "--workers", "2", "--top_k", "4", "--batch_size", "3", "--exclude_history"],
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0")
    rows = [row for path in (tmp_path / "ray").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    rows = {row["user_id"]: row for row in rows}
    expected = [row for shard in shards(tmp_path / "out").values() for row in shard]
    assert len(rows) == len(expected)
    for row in expected:
        found = rows[row["user_id"]]
        assert (found["item_ids"], found["latent_steps"]) == (row["item_ids"], row["latent_steps"])
        torch.testing.assert_close(torch.tensor(found["scores"]), torch.tensor(row["scores"]), atol=2e-5, rtol=0)
