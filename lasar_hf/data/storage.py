"""Interactions, splits and texts on disk: what the steps of a preparation hand to each other."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
from datasets import Dataset
from datasets.table import MemoryMappedTable
from pyarrow import ipc, parquet

from ..files import file_hash, write_json
from .interactions import ID_FIELDS, TEXT_FIELDS, Interactions
from .splits import Split, TimeSplit


BATCH_ROWS = 65_536


def save_interactions(interactions: Interactions, folder: str | Path) -> None:
    """
    Write `items.parquet`, `users.parquet` and `counts.json`.

    Args:
        interactions (`Interactions`):
            What to write.
        folder (`str` or `Path`):
            Created if missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    items = {"item_id": pa.array(interactions.item_ids, pa.string())}
    for name in TEXT_FIELDS + ID_FIELDS:
        items[name] = pa.array([item.get(name) for item in interactions.items], pa.large_string())
    users = {
        "user_id": pa.array(interactions.user_ids, pa.string()),
        "history": pa.array(interactions.histories, pa.list_(pa.int64())),
    }
    if interactions.timestamps is not None:
        users["timestamps"] = pa.array(interactions.timestamps, pa.list_(pa.float64()))
    _write(pa.table(items), folder / "items.parquet")
    _write(pa.table(users), folder / "users.parquet")
    write_json(folder / "counts.json", interactions.counts)


def load_interactions(folder: str | Path) -> Interactions:
    """Read what `save_interactions` wrote."""
    folder = Path(folder)
    items = parquet.read_table(folder / "items.parquet")
    users = parquet.read_table(folder / "users.parquet").to_pydict()
    rows = items.drop_columns("item_id").to_pylist()
    return Interactions(
        item_ids=items["item_id"].to_pylist(),
        items=[{name: text for name, text in row.items() if text is not None} for row in rows],
        user_ids=users["user_id"],
        histories=users["history"],
        timestamps=users.get("timestamps"),
        counts=json.loads((folder / "counts.json").read_text(encoding="utf-8")),
    )


def save_split(split: Split | TimeSplit, folder: str | Path) -> None:
    """
    Write `sequences.parquet` (each user's items in each part) and `split.json` (the kind of split and its points).

    Args:
        split (`Split` or `TimeSplit`):
            What to write.
        folder (`str` or `Path`):
            Created if missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held_out = pa.int64() if isinstance(split, Split) else pa.list_(pa.int64())
    table = {
        "user_ids": pa.array(split.user_ids, pa.string()),
        "train": pa.array(split.train, pa.list_(pa.int64())),
        "validation": pa.array(split.validation, held_out),
        "test": pa.array(split.test, held_out),
    }
    if isinstance(split, Split):
        facts = {"kind": "leave_one_out", "num_skipped": split.num_skipped}
    else:
        points = {"validation_from": split.validation_from, "test_from": split.test_from}
        facts = {"kind": "global_time", **points}
    _write(pa.table(table), folder / "sequences.parquet")
    write_json(folder / "split.json", facts)


def load_split(folder: str | Path) -> Split | TimeSplit:
    """Read what `save_split` wrote."""
    folder = Path(folder)
    facts = json.loads((folder / "split.json").read_text(encoding="utf-8"))
    kind = {"leave_one_out": Split, "global_time": TimeSplit}[facts.pop("kind")]
    return kind(**parquet.read_table(folder / "sequences.parquet").to_pydict(), **facts)


def save_texts(batches: Iterable[Sequence[str] | Sequence[list[str]]], path: str | Path, nested: bool = False) -> None:
    """
    Write texts one a row as an Arrow stream, a batch after the other: memory holds one of them.

    Args:
        batches (`Iterable`):
            Lists of texts, or of lists of texts.
        path (`str` or `Path`):
            The file.
        nested (`bool`, *optional*, defaults to `False`):
            Whether a row is a list of texts.
    """
    column = pa.list_(pa.string()) if nested else pa.string()
    schema = pa.schema({"text": column})
    with ipc.new_stream(str(path), schema) as stream:
        for texts in batches:
            stream.write_table(pa.table({"text": pa.array(texts, column)}, schema), max_chunksize=BATCH_ROWS)


def load_texts(path: str | Path) -> Dataset:
    """
    Open what `save_texts` wrote, memory-mapped.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `Dataset`: one column, `text`.
    """
    return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=file_hash(path)[:16])


def _write(table: pa.Table, path: Path) -> None:
    parquet.write_table(table, path, row_group_size=BATCH_ROWS)
