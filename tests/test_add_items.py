"""Adding items to a trained model's catalogue: the recipe as a whole, killed and repeated runs, refusals."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from lasar_hf import LasarProcessor, SidCatalog
from lasar_hf.data import toy_shop
from lasar_hf.model.configuration_lasar import sid_token
from lasar_hf.semantic_ids import ItemEncoder, ResidualKMeans, assign_new_items
from tests.preparing import files, run
from tests.recipes import load_recipe
from tests.tiny import tiny_model


SHOP = toy_shop(30, 48)
NEW = [{"item_id": f"new-{row}"} | SHOP.items[row] for row in range(0, 48, 5)] + [{"item_id": "7 nameless"}]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("add_items")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    run(folder)
    return folder


@pytest.fixture
def checkpoint(prepared, tmp_path):
    model, tokenizer = tiny_model(num_sid_levels=4, codebook_size=8)
    model.save_pretrained(tmp_path / "model")
    LasarProcessor(tokenizer, SidCatalog.from_pretrained(prepared / "catalog")).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_items(path: Path, rows=NEW) -> str:
    columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".csv":
        pa.csv.write_csv(pa.table(columns), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def add(recipe, prepared, checkpoint, items, **options):
    arguments = {"items": [items], "data_dir": str(prepared), "checkpoint": str(checkpoint)} | options
    recipe.main(recipe.AddItemsArguments(**arguments))
    return SidCatalog.from_pretrained(checkpoint)


def test_new_items_get_free_semantic_ids(recipe, prepared, checkpoint, tmp_path):
    before, data = SidCatalog.from_pretrained(checkpoint), files(prepared)
    rows = [NEW[0], *NEW, {**NEW[0], "title": "a repeat"}, {"item_id": "item-3", "title": "of the catalogue"}]
    with pytest.warns(UserWarning, match="repeat"):
        after = add(recipe, prepared, checkpoint, write_items(tmp_path / "new.jsonl", rows))
    # Old items keep their place and Semantic IDs.
    assert after.item_ids == before.item_ids + [row["item_id"] for row in NEW]
    assert after.codes[:48].equal(before.codes)
    assert len(np.unique(after.codes.numpy(), axis=0)) == len(after)
    # A new item with the text of an old one gets its first code (nearly always: only old items have co-occurrence).
    first = after.codes[:, 0].numpy()
    assert (first[48:-1] == first[:48:5]).mean() >= 0.9
    vectors = ItemEncoder.from_pretrained(prepared / "item_encoder").encode(NEW)
    quantizer = ResidualKMeans.from_pretrained(prepared / "quantizer").first_columns(8)
    np.testing.assert_array_equal(after.codes[48:], assign_new_items(before.codes, quantizer, vectors))
    # Nothing else is written.
    assert files(prepared) == data
    assert not list(checkpoint.glob(".*"))


def test_titles_of_new_items_are_stored(recipe, prepared, checkpoint, tmp_path):
    after = add(recipe, prepared, checkpoint, write_items(tmp_path / "new.jsonl"))
    assert after.titles[48:] == [row.get("title") for row in NEW]


def test_log_counts_added_and_unknown_items(recipe, prepared, checkpoint, tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [*NEW, {"item_id": "item-3", "title": "of the catalogue"}]
    add(recipe, prepared, checkpoint, write_items(tmp_path / "new.jsonl", rows))
    assert f"{len(NEW)} items added" in caplog.text
    assert "1 items skipped" in caplog.text
    assert f"1 of {len(NEW)} items have no word in common" in caplog.text
    assert f"1 of {len(NEW)} items have no text" in caplog.text


def test_second_run_changes_nothing(recipe, prepared, checkpoint, tmp_path, caplog):
    items = write_items(tmp_path / "new.jsonl")
    add(recipe, prepared, checkpoint, items)
    times = {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    caplog.set_level("INFO")
    add(recipe, prepared, checkpoint, items)
    assert {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == times
    assert f"{len(NEW)} items skipped" in caplog.text
    assert "added" not in caplog.text


def test_new_items_are_recommended(recipe, prepared, checkpoint, tmp_path):
    add(recipe, prepared, checkpoint, write_items(tmp_path / "new.jsonl"))
    histories = tmp_path / "histories.jsonl"
    histories.write_text(json.dumps({"user_id": "a", "history": ["item-0", "new-5", "7 nameless"]}) + "\n")
    recommend = load_recipe("recommend")
    recommend.main(
        recommend.RecommendArguments(
            model=str(checkpoint), histories=str(histories), output_dir=str(tmp_path / "out"), top_k=59, num_beams=59
        )
    )
    found = pq.read_table(tmp_path / "out" / "part-00000.parquet")["item_ids"][0].as_py()
    assert set(found) == {*SHOP.item_ids, *(row["item_id"] for row in NEW)}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_other_file_types_and_column_names(recipe, prepared, checkpoint, tmp_path, suffix):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    expected = add(recipe, prepared, checkpoint, write_items(tmp_path / "new.jsonl"))
    texts = {name: f"my {name}" for name in ("title", "description", "brand", "categories")}
    names = {"item_id": "asin"} | texts
    rows = [{"price": 3} | {names[name]: value for name, value in row.items()} for row in NEW]
    found = add(
        recipe, prepared, other, write_items(tmp_path / f"new{suffix}", rows),
        item_column="asin", text_columns=json.dumps(texts),
    )  # fmt: skip
    assert found.item_ids == expected.item_ids
    assert found.codes.equal(expected.codes)


def test_catalogue_can_grow_several_times(recipe, prepared, checkpoint, tmp_path):
    for rows in (NEW[:4], NEW, NEW):
        grown = add(recipe, prepared, checkpoint, write_items(tmp_path / "new.jsonl", rows))
        assert grown.item_ids[48:] == [row["item_id"] for row in rows]


def test_markup_is_removed_on_request(recipe, prepared, checkpoint, tmp_path):
    items = write_items(tmp_path / "new.jsonl", [{"item_id": "a", "title": "Tom &amp; Jerry<br/>mug"}])
    assert add(recipe, prepared, checkpoint, items, strip_markup=True).titles[-1] == "Tom & Jerry mug"


def test_killed_run_is_finished_by_the_next(recipe, prepared, checkpoint, tmp_path, monkeypatch):
    items = write_items(tmp_path / "new.jsonl")
    calm = shutil.copytree(checkpoint, tmp_path / "calm")
    add(recipe, prepared, calm, items)
    real_replace, unreadable = os.replace, 0
    for dies_at in range(4):  # two files of the copy, then two files of the catalogue
        model, moves = shutil.copytree(checkpoint, tmp_path / str(dies_at)), []

        def replace(*paths, moves=moves, dies_at=dies_at):
            if len(moves) == dies_at:
                raise KeyboardInterrupt
            moves.append(paths)
            real_replace(*paths)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, "replace", replace)
            add(recipe, prepared, model, items)
        unreadable += not (model / "sid_catalog.json").exists()
        add(recipe, prepared, model, items)
        assert files(model) == files(calm)
    assert unreadable == 2  # in these cases the copy was needed


def test_temporary_files_of_a_killed_run_are_removed(recipe, prepared, checkpoint, tmp_path):
    (checkpoint / ".sid_catalog.1.tmp.json").write_text("{")
    add(recipe, prepared, checkpoint, write_items(tmp_path / "new.jsonl"))
    assert not list(checkpoint.glob(".*"))


def test_old_copy_does_not_replace_a_complete_catalogue(recipe, prepared, checkpoint, tmp_path):
    items = write_items(tmp_path / "new.jsonl")
    SidCatalog.from_pretrained(checkpoint).save_pretrained(checkpoint / ".new_catalog")
    SidCatalog.from_pretrained(checkpoint).remove(SHOP.item_ids[:5]).save_pretrained(checkpoint)
    after = add(recipe, prepared, checkpoint, items)
    assert after.removed.nonzero()[:, 0].tolist() == list(range(5))
    assert len(after) == 48 + len(NEW)
    assert not (checkpoint / ".new_catalog").exists()


def test_semantic_ids_of_removed_items_are_not_reused(recipe, checkpoint, tmp_path, caplog):
    caplog.set_level("INFO")
    # Without co-occurrence, a copy of an item is nearest to exactly the Semantic ID of the original.
    run(tmp_path / "data", collaborative_dim=0, steps=["interactions", "embeddings", "semantic_ids"])
    before = SidCatalog.from_pretrained(tmp_path / "data" / "catalog").remove(SHOP.item_ids[:24])
    before.save_pretrained(checkpoint)
    rows = [{"item_id": f"copy of {name}"} | item for name, item in zip(SHOP.item_ids, SHOP.items, strict=True)]
    rows.append({"item_id": "item-0"} | SHOP.items[0])
    after = add(recipe, tmp_path / "data", checkpoint, write_items(tmp_path / "new.jsonl", rows))
    assert len(after) == 96
    assert after.removed.nonzero()[:, 0].tolist() == list(range(24))
    assert len(np.unique(after.codes.numpy(), axis=0)) == 96
    assert after.codes[48:, :3].equal(after.codes[:48, :3])
    assert "48 of them the nearest Semantic ID was not free" in caplog.text


def given_index(folder: Path) -> dict:
    codes = SidCatalog.from_pretrained(folder / "catalog").codes.tolist()
    tokens = [[sid_token(*pair) for pair in enumerate(row)] for row in codes]
    path = folder.parent / "toy.index.json"
    path.write_text(json.dumps(dict(zip(SHOP.item_ids, tokens, strict=True))))
    return {"index": str(path)}


STEPS = ["interactions", "embeddings", "semantic_ids"]


def test_ready_made_index_is_refused(recipe, prepared, checkpoint, tmp_path):
    run(tmp_path / "given", steps=STEPS, **given_index(prepared))
    with pytest.raises(ValueError, match="given has no quantizer"):
        add(recipe, tmp_path / "given", checkpoint, write_items(tmp_path / "new.jsonl"))


def test_semantic_ids_without_text_are_refused(recipe, checkpoint, tmp_path):
    ratings = [f"u{user},{(user + 3 * step) % 25},{step}" for user in range(40) for step in range(8)]
    (tmp_path / "ratings.csv").write_text("\n".join(["user_id,item_id,timestamp", *ratings]))
    with pytest.warns(UserWarning, match="text"):
        run(tmp_path / "bare", "table", {"interactions": str(tmp_path / "ratings.csv")}, steps=STEPS)
    with pytest.raises(ValueError, match="bare"):
        add(recipe, tmp_path / "bare", checkpoint, write_items(tmp_path / "new.jsonl"))


def test_missing_encoder_is_named(recipe, prepared, checkpoint, tmp_path):
    shutil.rmtree(shutil.copytree(prepared, tmp_path / "old") / "item_encoder")
    with pytest.raises(ValueError, match="item_encoder.* is missing"):
        add(recipe, tmp_path / "old", checkpoint, write_items(tmp_path / "new.jsonl"))


def test_missing_data_is_named(recipe, checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        add(recipe, tmp_path / "nowhere", checkpoint, write_items(tmp_path / "new.jsonl"))


def test_checkpoint_of_other_data_is_refused(recipe, checkpoint, tmp_path):
    run(tmp_path / "other", seed=1, steps=STEPS)
    with pytest.raises(ValueError, match="model does not extend .*other"):
        add(recipe, tmp_path / "other", checkpoint, write_items(tmp_path / "new.jsonl"))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([NEW[0], {"item_id": None, "title": "Saw"}], {}, "new.jsonl: row 2 .*item_id"),
        ([{"id": "a"}], {}, "item_id"),
        (NEW[:1], {"text_columns": {"title": "name"}}, "name"),
        (NEW[:1], {"text_columns": "{}"}, "text_columns"),
        (NEW[:1], {"text_columns": '{"name": "title"}'}, "text_columns"),
    ],
)
def test_wrong_files_and_columns_are_refused(recipe, prepared, checkpoint, tmp_path, rows, options, message):
    before = files(checkpoint)
    with pytest.raises(ValueError, match=message):
        add(recipe, prepared, checkpoint, write_items(tmp_path / "new.jsonl", rows), **options)
    assert files(checkpoint) == before
