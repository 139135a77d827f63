"""recipes/recommend.py: shards, resuming, several processes, bad histories, and the same job on Ray."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lasar_hf import LasarProcessor, SidCatalog
from lasar_hf.data import PreparedData
from lasar_hf.evaluation import popularity_ranking
from lasar_hf.files import file_hash
from tests.disks import DAMAGES
from tests.recipes import ROOT, load_recipe, save_checkpoint, save_prepared
from tests.tiny import tiny_model


HISTORIES = [[f"item-{(3 * user + step) % 20}" for step in range(1 + user % 5)] for user in range(11)]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("recommend")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint whose prompt format is not the default one."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, instruction="item the next", max_history=4)
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
        model=str(checkpoint),
        histories=str(histories),
        output_dir=str(tmp_path / "out"),
        top_k=4,
        batch_size=2,
        shard_size=3,
        **options,
    )


def run(recipe, args: dict) -> None:
    recipe.main(recipe.RecommendArguments(**args))


def shards(folder: Path) -> dict[str, list[dict]]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted(folder.glob("part-*.parquet"))}


def shard_rows(folder: Path) -> list[dict]:
    return [row for shard in shards(folder).values() for row in shard]


# ---------------------------------------------------------------------------------------------------------------------
# What the shards hold


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_shards_hold_what_recommend_returns(recipe, checkpoint, tmp_path, suffix):
    """Without any argument for it, the instruction and max_history are those of the checkpoint."""
    run(recipe, arguments(checkpoint, tmp_path, write_histories(tmp_path / f"histories{suffix}")))
    assert [len(rows) for rows in shards(tmp_path / "out").values()] == [3, 3, 3, 2]
    rows = shard_rows(tmp_path / "out")
    assert [row["user_id"] for row in rows] == [f"user-{i}" for i in range(11)]
    model, _ = tiny_model()
    processor = LasarProcessor.from_pretrained(checkpoint)
    for row, history in zip(rows, HISTORIES, strict=True):
        expected = model.recommend(**processor([history]), catalog=processor.catalog, top_k=4)
        assert row["item_ids"] == [processor.catalog.item_ids[i] for i in expected.items[0]]
        assert row["latent_steps"] == expected.latent_steps
        torch.testing.assert_close(torch.tensor(row["scores"]), expected.scores[0], atol=2e-5, rtol=0)


def test_the_history_can_be_excluded(recipe, checkpoint, tmp_path):
    run(recipe, arguments(checkpoint, tmp_path, exclude_history=True) | {"top_k": 20})
    everything = {f"item-{i}" for i in range(20)}
    for row, history in zip(shard_rows(tmp_path / "out"), HISTORIES, strict=True):
        assert set(row["item_ids"]) == everything - set(history)
        assert len(row["scores"]) == len(row["item_ids"])


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def test_a_second_run_computes_only_missing_shards(recipe, checkpoint, tmp_path, monkeypatch):
    args = arguments(checkpoint, tmp_path)
    run(recipe, args)
    first, calls = shards(tmp_path / "out"), []
    (tmp_path / "out" / "part-00002.parquet").unlink()
    (tmp_path / "out" / ".part-00003.1.tmp.parquet").write_text("left over by a run that was killed")
    recommend_samples = recipe.recommend_samples
    monkeypatch.setattr(recipe, "recommend_samples", lambda *a, **k: (calls.append(a), recommend_samples(*a, **k))[1])
    run(recipe, args)
    assert len(calls) == 1
    assert shards(tmp_path / "out") == first


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_computed_again(recipe, checkpoint, tmp_path, damage):
    args = arguments(checkpoint, tmp_path)
    run(recipe, args)
    whole = shards(tmp_path / "out")
    DAMAGES[damage](tmp_path / "out" / "part-00001.parquet")
    run(recipe, args)
    assert shards(tmp_path / "out") == whole


def test_no_flipped_bit_changes_a_shard_unnoticed(recipe, checkpoint, tmp_path, caplog):
    caplog.set_level("ERROR")
    run(recipe, arguments(checkpoint, tmp_path))
    path = tmp_path / "out" / "part-00001.parquet"
    whole, rows, found = path.read_bytes(), pq.read_table(path).to_pylist(), 0
    request = file_hash(tmp_path / "out" / "request.json")
    for position in range(0, len(whole), 5):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        try:
            is_done = recipe.is_done(path, request, 3)
        except ValueError as error:  # a bit of the hash of its settings
            assert "different settings" in str(error)
            is_done = False
        assert not is_done or pq.read_table(path).to_pylist() == rows, position
        found += not is_done
    assert found > 100


def test_another_setting_is_refused(recipe, checkpoint, tmp_path):
    run(recipe, arguments(checkpoint, tmp_path))
    with pytest.raises(ValueError, match="latent_steps"):
        run(recipe, arguments(checkpoint, tmp_path, latent_steps=1))


def test_other_histories_are_refused(recipe, checkpoint, tmp_path):
    run(recipe, arguments(checkpoint, tmp_path))
    with pytest.raises(ValueError, match="histories"):
        run(recipe, arguments(checkpoint, tmp_path, write_histories(tmp_path / "other.jsonl", HISTORIES[1:])))


def test_a_moved_model_may_resume(recipe, checkpoint, tmp_path):
    args = arguments(checkpoint, tmp_path)
    run(recipe, args)
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    (moved / "eval_results.json").write_text("{}")  # does not decide the recommendations
    run(recipe, args | {"model": str(moved)})
    assert len(shards(tmp_path / "out")) == 4


@pytest.mark.parametrize("change", ["weights", "prompt format"])
def test_a_changed_model_is_refused(recipe, checkpoint, tmp_path, change):
    changed = shutil.copytree(checkpoint, tmp_path / "changed")
    args = arguments(changed, tmp_path)
    run(recipe, args)
    if change == "weights":
        tiny_model(seed=1)[0].save_pretrained(changed)
    else:
        save_checkpoint(changed, instruction="")
    with pytest.raises(ValueError, match="model"):
        run(recipe, args)


def test_an_adapter_is_hashed_with_its_base_model(recipe, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
        (folder / "model.safetensors").write_text(folder.name)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = recipe.model_hashes(str(adapter))
    (base / "model.safetensors").write_text("trained again")
    assert recipe.model_hashes(str(adapter)) != before


def test_shards_may_be_in_the_folder_of_the_model(recipe, checkpoint, tmp_path):
    args = arguments(shutil.copytree(checkpoint, tmp_path / "model"), tmp_path)
    for _ in range(2):
        run(recipe, args | {"output_dir": args["model"]})
    assert len(shards(tmp_path / "model")) == 4


def test_a_refused_request_does_not_block_the_folder(recipe, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="latent_steps"):
        run(recipe, arguments(checkpoint, tmp_path, latent_steps=9))
    run(recipe, arguments(checkpoint, tmp_path, latent_steps=2))
    assert len(shards(tmp_path / "out")) == 4


def test_a_shard_of_another_job_is_refused(recipe, checkpoint, tmp_path):
    """Two jobs that start in the same empty folder."""
    args = arguments(checkpoint, tmp_path)
    run(recipe, args)
    request = tmp_path / "out" / "request.json"
    request.write_text(request.read_text().replace('"top_k": 4', '"top_k": 3'))
    with pytest.raises(ValueError, match="part-00000.parquet"):
        run(recipe, args | {"top_k": 3})


# ---------------------------------------------------------------------------------------------------------------------
# Reading histories


@pytest.fixture
def catalog():
    """Item ids that look like dates and numbers."""
    return SidCatalog(torch.tensor([[0], [1]]), ["2020-01-01", "7"])


def test_ids_of_json_lines_stay_text(recipe, tmp_path, catalog):
    path = tmp_path / "histories.jsonl"
    path.write_text('{"user_id": "2021-02-03", "history": ["2020-01-01", 7]}\n{"user_id": 5, "history": [7]}\n')
    assert recipe.read_histories(path, catalog) == (["2021-02-03", "5"], [[0, 1], [1]], [0, 0])


def test_whole_numbers_of_parquet_lose_their_point(recipe, tmp_path, catalog):
    pq.write_table(pa.table({"user_id": [1.0], "history": [[7.0, 7.0]]}), tmp_path / "floats.parquet")
    assert recipe.read_histories(tmp_path / "floats.parquet", catalog) == (["1"], [[1, 1]], [0])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", "history"),
        ('{"user_id": "a", "history": "77"}', "history"),
        ('{"user_id": "a", "history": 7}', "history"),
        ('{"user_id": null, "history": [7]}', "user_id"),
        ('{"user_id": "a", "items": [7]}', "history"),
    ],
)
def test_rows_that_are_not_histories_are_refused(recipe, tmp_path, catalog, text, name):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=name):
        recipe.read_histories(path, catalog)


@pytest.mark.parametrize(
    ("histories", "name"),
    [
        ([["item-1"], ["item-2", "gone"]], "gone"), ([["item-1"], []], "user-1"), ([["item-1"], None], "user-1"),
        ([["item-1", None]], "None"), ([[3, 4]], "3"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_strict_refuses_unknown_items_and_new_users(recipe, checkpoint, tmp_path, suffix, histories, name):
    path = write_histories(tmp_path / f"rows{suffix}", histories)
    with pytest.raises(ValueError, match=name):
        run(recipe, arguments(checkpoint, tmp_path, path, strict=True))
    assert not list((tmp_path / "out").iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Unknown items and new users


LIVE = [["gone", "item-1", None], ["item-2"], [], ["gone", "lost"], None, ["item-1"], ["", "item-3"]]
UNKNOWN = [2, 0, 0, 2, 0, 0, 1]
FALLBACK = [False, False, True, True, True, False, False]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepared data, and the ids of its training items, the most frequent first."""
    folder = tmp_path_factory.mktemp("data")
    save_prepared(folder)
    data = PreparedData.load(folder)
    (ranking,) = popularity_ranking(data.split.train, [[]], len(data.items), len(data.items))
    return folder, [data.catalog.item_ids[item] for item in ranking]


def live_rows(recipe, checkpoint, tmp_path, prepared, suffix=".jsonl", **options) -> list[dict]:
    path = write_histories(tmp_path / f"live{suffix}", LIVE)
    run(recipe, arguments(checkpoint, tmp_path, path, data_dir=str(prepared[0]), **options))
    return shard_rows(tmp_path / "out")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_unknown_items_are_counted(recipe, checkpoint, tmp_path, prepared, suffix):
    rows = live_rows(recipe, checkpoint, tmp_path, prepared, suffix)
    assert [row["user_id"] for row in rows] == [f"user-{i}" for i in range(7)]
    assert [row["unknown_items"] for row in rows] == UNKNOWN


def test_unknown_items_do_not_change_the_answer(recipe, checkpoint, tmp_path, prepared):
    rows = live_rows(recipe, checkpoint, tmp_path, prepared)
    assert [rows[0][name] for name in ("item_ids", "latent_steps")] == [rows[5]["item_ids"], rows[5]["latent_steps"]]
    assert rows[0]["scores"] == pytest.approx(rows[5]["scores"], abs=2e-5)


def test_new_users_get_popular_items(recipe, checkpoint, tmp_path, prepared):
    rows = live_rows(recipe, checkpoint, tmp_path, prepared)
    assert [row["fallback"] for row in rows] == FALLBACK
    assert {tuple(row["item_ids"]) for row in rows if row["fallback"]} == {tuple(prepared[1][:4])}
    assert {(row["scores"], row["latent_steps"]) for row in rows if row["fallback"]} == {(None, None)}


def test_popular_items_are_in_the_catalogue(recipe, checkpoint, tmp_path, prepared):
    """Also in that of a checkpoint from which recipes/add_items.py removed an item."""
    changed = shutil.copytree(checkpoint, tmp_path / "changed")
    LasarProcessor.from_pretrained(changed).catalog.remove(prepared[1][:1]).save_pretrained(changed)
    rows = live_rows(recipe, changed, tmp_path, prepared)
    assert rows[2]["item_ids"] == prepared[1][1:5]


def test_new_users_get_no_items_without_data(recipe, checkpoint, tmp_path):
    run(recipe, arguments(checkpoint, tmp_path, write_histories(tmp_path / "live.jsonl", [[], ["item-1"]])))
    new, known = shard_rows(tmp_path / "out")
    assert (new["item_ids"], new["fallback"]) == ([], True)
    assert len(known["item_ids"]) == 4


def test_the_counts_are_logged(recipe, checkpoint, tmp_path, prepared, caplog):
    caplog.set_level("INFO")
    live_rows(recipe, checkpoint, tmp_path, prepared)
    assert "5 unknown items" in caplog.text
    assert "3 users without a known item" in caplog.text


def test_other_popular_items_are_refused(recipe, checkpoint, tmp_path, prepared):
    live_rows(recipe, checkpoint, tmp_path, prepared)
    with pytest.raises(ValueError, match="popular_items"):
        run(recipe, arguments(checkpoint, tmp_path, tmp_path / "live.jsonl"))


@pytest.mark.parametrize("name", ["batch_size", "shard_size"])
def test_sizes_below_one_are_refused(recipe, checkpoint, tmp_path, name):
    with pytest.raises(ValueError, match=name):
        recipe.RecommendArguments(**arguments(checkpoint, tmp_path) | {name: 0})


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def test_processes_share_the_shards(recipe, checkpoint, tmp_path, monkeypatch):
    """Two processes, run one after the other, each write half of the shards of one."""
    args = arguments(checkpoint, tmp_path, write_histories(tmp_path / "histories.jsonl", [*HISTORIES[:4], *LIVE]))
    run(recipe, args)
    args["output_dir"], written = str(tmp_path / "two"), []
    for index in (0, 1):
        state = SimpleNamespace(
            process_index=index,
            num_processes=2,
            is_main_process=index == 0,
            device="cpu",
            wait_for_everyone=lambda: None,
        )
        monkeypatch.setattr(recipe, "PartialState", lambda state=state, **_: state)
        run(recipe, args)
        written.append(sorted(shards(tmp_path / "two")))
    assert written[0] == ["part-00000.parquet", "part-00002.parquet"]
    assert shards(tmp_path / "two") == shards(tmp_path / "out")


def start(command: list[str], **variables) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_write_the_same_as_one(recipe, checkpoint, tmp_path):
    args = arguments(checkpoint, tmp_path)
    run(recipe, args)
    args["output_dir"] = str(tmp_path / "two")
    options = [part for name, value in args.items() for part in (f"--{name}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    output = start([*launch, "recipes/recommend.py", *options])
    assert output.count("Shards:   0%") == 1  # two processes that do not find each other would both show it
    assert shards(tmp_path / "two") == shards(tmp_path / "out")


def test_ray_workers_answer_every_user(checkpoint, monkeypatch):
    """The class of the Ray example, without Ray."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    example = runpy.run_path(str(ROOT / "examples" / "ray_recommend.py"))
    args = SimpleNamespace(
        model=str(checkpoint),
        gpus_per_worker=0,
        popular=["item-9"],
        strict=False,
        top_k=3,
        num_beams=8,
        latent_steps=None,
        exclude_history=False,
    )
    answer = example["Recommender"](args)
    rows = answer(pa.table({"user_id": ["a", "b", "c"], "history": [["gone", "item-1"], [], None]})).to_pylist()
    assert [row["unknown_items"] for row in rows] == [1, 0, 0]
    assert [row["item_ids"] for row in rows[1:]] == [["item-9"], ["item-9"]]
    assert len(rows[0]["item_ids"]) == 3
    args.strict = True
    with pytest.raises(ValueError, match="'a'.*gone"):
        answer(pa.table({"user_id": ["a"], "history": [["gone", "item-1"]]}))


@pytest.mark.slow
def test_ray_recommends_the_same(recipe, checkpoint, tmp_path, prepared):
    pytest.importorskip("ray", reason="Ray Data is not installed: pip install 'lasar_hf[ray]'")
    live = write_histories(tmp_path / "live.jsonl", [*HISTORIES, *LIVE])
    args = arguments(checkpoint, tmp_path, live, exclude_history=True, data_dir=str(prepared[0]))
    run(recipe, args)
    start(
        [
            sys.executable,
            "examples/ray_recommend.py",
            args["model"],
            args["histories"],
            str(tmp_path / "ray"),
            "--workers",
            "2",
            "--top_k",
            "4",
            "--batch_size",
            "3",
            "--exclude_history",
            "--data_dir",
            args["data_dir"],
        ],
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    )
    rows = [row for path in (tmp_path / "ray").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    by_user = {row["user_id"]: row for row in rows}
    expected = shard_rows(tmp_path / "out")
    assert len(rows) == len(expected)
    for row in expected:
        other = by_user[row["user_id"]]
        scores, other_scores = row.pop("scores") or [], other.pop("scores") or []
        assert other == row
        torch.testing.assert_close(torch.tensor(other_scores), torch.tensor(scores), atol=2e-5, rtol=0)
