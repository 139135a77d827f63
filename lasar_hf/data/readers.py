"""
Readers of tables: your own, and those of Amazon Reviews 2018 and 2023.

Tables are CSV or JSON lines (`.gz` too), Parquet, or data sets of `datasets`. They are read in batches, and only the
columns that are needed. A *source* is a function that returns `Interactions`; `SOURCES` names those of the library.
"""

import gzip
import html
import inspect
import re
import warnings
import zlib
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from math import isfinite, nan
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, IterableDataset
from pyarrow import csv, parquet

from ..arguments import import_dotted
from ..files import file_hash, folder_hashes
from .interactions import (
    TEXT_FIELDS,
    Interactions,
    clean_text,
    id_text,
    item_fields,
    natural_order,
    parse_json,
    read_lcrec,
)
from .toy import toy_shop


Table = str | Path | Dataset | IterableDataset
Tables = Table | Sequence[Table]

BATCH_SIZE = 65_536  # rows per batch
AMAZON_2023 = "McAuley-Lab/Amazon-Reviews-2023"

# ---------------------------------------------------------------------------------------------------------------------
# Tables


def as_time(value: object, where: str) -> float:
    """A time as a number: numbers stay, dates become seconds since 1970 (UTC if they have no time zone)."""
    try:
        text = value.isoformat() if isinstance(value, date) else value
        try:
            time = nan if isinstance(value, bool) else float(text)
        except ValueError:
            moment = datetime.fromisoformat(str(text).strip())
            time = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError):
        time = nan
    if not isfinite(time):
        raise ValueError(f"{where} is {value!r}; expected a finite number or a date like 2024-01-31.")
    return time


def read_batches(
    table: Table, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, list]]]:
    """
    Yield batches of rows: the number of the first row, counted from 1, and the values of each column. CSV columns are
    read as text. `optional` columns that the table does not have are `None`.
    """
    names = list(dict.fromkeys([*columns, *optional]))
    start = 1
    for batch in _raw_batches(table, columns, names):
        size = len(next(iter(batch.values())))
        if size:
            yield start, {name: batch[name] if name in batch else [None] * size for name in names}
        start += size


def table_name(table: Table) -> str:
    """Name of a table in messages: the path of a file, or the name of a data set."""
    if isinstance(table, Dataset | IterableDataset):
        return f"data set {table.info.dataset_name or 'in memory'}"
    return str(table)


def _raw_batches(table: Table, columns: Sequence[str], names: Sequence[str]) -> Iterator[dict[str, list]]:
    """Batches with those of the columns `names` that the table has; it must have `columns`."""
    if isinstance(table, Dataset | IterableDataset):
        # A stream may not know its columns before the first row.
        existing = table.column_names or list(next(iter(table), {}))
        present = _present(table, existing, columns, names)
        yield from table.select_columns(present).with_format(None).iter(BATCH_SIZE)
        return
    path = Path(table)
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in (".csv", ".parquet", ".jsonl", ".ndjson", ".json"):
        raise ValueError(f"{path}: unknown format; expected .parquet, .csv, .jsonl, .ndjson or .json (or .gz).")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    read = {".csv": _csv_batches, ".parquet": _parquet_batches}.get(suffix, _json_batches)
    try:
        yield from read(path, columns, names)
    except (pa.ArrowInvalid, UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: not readable as {suffix[1:]} ({str(error).splitlines()[0]}).") from error


def _present(table: Table, existing: Sequence[str], columns: Sequence[str], names: Sequence[str]) -> list[str]:
    for column in columns:
        if column not in existing:
            raise ValueError(f"{table_name(table)} has no column {column!r}; its columns are {', '.join(existing)}.")
    for column in names:
        if list(existing).count(column) > 1:
            raise ValueError(f"{table_name(table)} has several columns named {column!r}; rename them.")
    return [column for column in names if column in existing]


def _csv_batches(path: Path, columns: Sequence[str], names: Sequence[str]) -> Iterator[dict[str, list]]:
    with csv.open_csv(path) as reader:
        present = _present(path, reader.schema.names, columns, names)
    # As text: the id 007 keeps its zeros, and a column of numbers may contain a word further down.
    convert = csv.ConvertOptions(
        include_columns=present, column_types=dict.fromkeys(present, pa.string()), strings_can_be_null=False
    )
    parse = csv.ParseOptions(newlines_in_values=True)
    with csv.open_csv(path, parse_options=parse, convert_options=convert) as reader:
        yield from (batch.to_pydict() for batch in reader)


def _parquet_batches(path: Path, columns: Sequence[str], names: Sequence[str]) -> Iterator[dict[str, list]]:
    with parquet.ParquetFile(path) as file:
        present = _present(path, file.schema_arrow.names, columns, names)
        yield from (batch.to_pydict() for batch in file.iter_batches(BATCH_SIZE, columns=present))


def _json_batches(path: Path, columns: Sequence[str], names: Sequence[str]) -> Iterator[dict[str, list]]:
    """
    Not pyarrow's JSON reader: it rounds integers above 2**64, turns ids such as "2024-01-02" into dates, refuses
    columns of mixed types and does not name the line of an error.
    """
    batch: dict[str, list] = {name: [] for name in names}
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = parse_json(line, path, number)
            if not isinstance(row, dict):
                raise ValueError(f"{path}: line {number} is {type(row).__name__}; expected an object.")
            for name in columns:
                if name not in row:
                    raise ValueError(f"{path}: line {number} has no {name!r}.")
            for name in names:
                batch[name].append(row.get(name))
            if number % BATCH_SIZE == 0:
                yield batch
                batch = {name: [] for name in names}
    yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Items


def read_items(
    tables: Tables,
    item_column: str = "item_id",
    text_columns: Mapping[str, str] | None = None,
    strip_markup: bool = False,
) -> dict[str, dict[str, str]]:
    """
    Read the text of items. If an item has several rows, the first one counts.

    Args:
        tables (`str`, `Path`, `Dataset`, `IterableDataset` or a sequence of these):
            One row per item, see [`read_table`].
        item_column (`str`, *optional*, defaults to `"item_id"`):
            Column of the item's id.
        text_columns (`Mapping[str, str]`, *optional*):
            Column of each text field, such as `{"title": "name"}`; the table must have them. By default those columns
            of `title`, `description`, `brand` and `categories` that the table has.
        strip_markup (`bool`, *optional*, defaults to `False`):
            Whether to remove HTML tags and entities from the text.

    Returns:
        `dict[str, dict[str, str]]`: fields of each item by its id, as in `Interactions.items`.

    Raises:
        `FileNotFoundError`: if a file does not exist.
        `ValueError`: if a column is missing, a row is broken or has no item id, or `text_columns` is empty or names an
            unknown field.
    """
    return _read_items(tables, item_column, _text_fields(text_columns), text_columns is not None, strip_markup)


def _read_items(
    tables: Tables,
    item_column: str,
    fields: Mapping[str, str],
    required: bool = False,
    strip_markup: bool = False,
    item_ids: Collection[str] | None = None,
) -> dict[str, dict[str, str]]:
    """[`read_items`], restricted to `item_ids` if given; `fields` maps each text field to its column."""
    columns, optional = (fields.values(), ()) if required else ((), fields.values())
    items: dict[str, dict[str, str]] = {}
    num_repeated = 0
    for table in _as_list(tables):
        for start, batch in read_batches(table, [item_column, *columns], [*optional]):
            for position, value in enumerate(batch[item_column]):
                item_id = _checked_id(value, table, start + position, item_column)
                if item_ids is not None and item_id not in item_ids:
                    continue
                if item_id in items:
                    num_repeated += 1
                    continue
                raw = {field: batch[column][position] for field, column in fields.items()}
                if strip_markup:
                    raw = {field: _without_markup(value) for field, value in raw.items()}
                items[item_id] = item_fields(raw)
    if num_repeated:
        warnings.warn(f"{num_repeated} rows repeat an item; the first row of an item counts.", stacklevel=3)
    return items


def _text_fields(text_columns: Mapping[str, str] | None) -> Mapping[str, str]:
    if text_columns is None:
        return {name: name for name in TEXT_FIELDS}
    if not text_columns or not set(text_columns) <= set(TEXT_FIELDS):
        raise ValueError(f"text_columns has the fields {list(text_columns)}; expected some of {list(TEXT_FIELDS)}.")
    return text_columns


def _without_markup(value: object) -> object:
    """Text without HTML tags and entities, or a list of such texts."""
    if isinstance(value, list | tuple):
        return [_without_markup(part) for part in value]
    return " ".join(re.sub(r"<[^<>]*>", " ", html.unescape(clean_text(value))).split())


def _checked_id(value: object, table: Table, row: int, column: str) -> str:
    text = id_text(value)
    if text is None:
        raise ValueError(f"{table_name(table)}: row {row} has {column} {value!r}; expected text or a whole number.")
    return text


def _as_list(tables: Tables) -> Sequence[Table]:
    return tables if isinstance(tables, list | tuple) else [tables]


# ---------------------------------------------------------------------------------------------------------------------
# Interactions


def read_table(
    interactions: Tables,
    items: Tables | None = None,
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
    time_column: str | None = "timestamp",
    text_columns: Mapping[str, str] | None = None,
    k_core: int = 5,
    keep_repeats: bool = False,
) -> Interactions:
    """
    Read interactions, and the text of items, from tables with named columns.

    The rows of a user are sorted by time; rows with equal times stay in the order of the file. Then repeats are
    dropped, and users and items with fewer than `k_core` interactions, until none is left.

    Args:
        interactions (`str`, `Path`, `Dataset`, `IterableDataset` or a sequence of these):
            One row per interaction: CSV, Parquet or JSON lines (by the suffix, `.gz` too), or a data set.
        items (same, *optional*):
            One row per item. Items that are not in it have no text.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            Column of the user.
        item_column (`str`, *optional*, defaults to `"item_id"`):
            Column of the item, in both tables.
        time_column (`str`, *optional*, defaults to `"timestamp"`):
            Column of the time: numbers or ISO dates. `None` or empty: the rows are in order already.
        text_columns (`Mapping[str, str]`, *optional*):
            As for [`read_items`].
        k_core (`int`, *optional*, defaults to `5`):
            Minimum number of interactions of a user and of an item; `1` keeps all.
        keep_repeats (`bool`, *optional*, defaults to `False`):
            Whether a user may interact with an item several times. By default only the first time counts, as in the
            field's data sets. The same user, item and time is one interaction in any case.

    Returns:
        `Interactions`: users and items in natural order of their ids, with `timestamps` (if there is a time column)
        and `counts` of rows that were read and left out.

    Raises:
        `FileNotFoundError`: if a file does not exist.
        `ValueError`: if a column is missing, a row is broken or has no user, item or time, or nothing remains.

    Example:

    ```python
    >>> from lasar_hf.data import read_table

    >>> shop = read_table("ratings.csv", "products.parquet", user_column="user", item_column="product")
    ```
    """
    fields = _text_fields(text_columns)
    data = _read_interactions(interactions, user_column, item_column, time_column, k_core, keep_repeats)
    return _add_text(data, items, item_column, fields, required=text_columns is not None)


def read_amazon2018(interactions: Tables, items: Tables | None = None, k_core: int = 5) -> Interactions:
    """
    Read Amazon Reviews 2018: the 5-core JSON lines (`Musical_Instruments_5.json.gz`) and `meta_<Category>.json.gz`.

    Of several reviews of an item by a user the earliest counts, and HTML is removed from the text. Arguments, result
    and errors as for [`read_table`].
    """
    data = _read_interactions(interactions, "reviewerID", "asin", "unixReviewTime", k_core)
    return _add_text(data, items, "asin", _text_fields(None) | {"categories": "category"}, strip_markup=True)


def read_amazon2023(
    interactions: Tables | None = None,
    items: Tables | None = None,
    category: str | None = None,
    revision: str = "main",
    k_core: int = 5,
) -> Interactions:
    """
    Read Amazon Reviews 2023: `5core/rating_only/<Category>.csv` or the reviews of `McAuley-Lab/Amazon-Reviews-2023`,
    and `raw_meta_<Category>`, as files or data sets; or download a category from the Hub.

    Of several reviews of an item by a user the earliest counts, and HTML is removed from the text. Other arguments,
    result and errors as for [`read_table`].

    Args:
        category (`str`, *optional*):
            Category to download instead of `interactions` and `items`.
        revision (`str`, *optional*, defaults to `"main"`):
            Revision of the data set on the Hub; a commit hash pins it.
    """
    if (interactions is None) == (category is None) or (category is not None and items is not None):
        raise ValueError("Give either interactions (and items), or the category to download from the Hub.")
    if category is not None:
        from huggingface_hub import hf_hub_download  # only this source needs the network

        files = (f"benchmark/5core/rating_only/{category}.csv", f"raw/meta_categories/meta_{category}.jsonl")
        interactions, items = (
            hf_hub_download(AMAZON_2023, name, repo_type="dataset", revision=revision) for name in files
        )
    data = _read_interactions(interactions, "user_id", "parent_asin", "timestamp", k_core)
    return _add_text(data, items, "parent_asin", _text_fields(None) | {"brand": "store"}, strip_markup=True)


def _add_text(
    data: Interactions, tables: Tables | None, item_column: str, fields: Mapping[str, str], **options: bool
) -> Interactions:
    """Add the text of the items to `data`, if there are tables of items; `fields` and options as for `_read_items`."""
    if tables is None:
        return data
    texts = _read_items(tables, item_column, fields, item_ids=set(data.item_ids), **options)
    for item_id, item in zip(data.item_ids, data.items, strict=True):
        item.update(texts.get(item_id, {}))
    num_empty = sum(not item for item in data.items)
    if num_empty:
        warnings.warn(f"{num_empty} of {len(data.items)} items have no text; they are kept.", stacklevel=3)
    return data


def _read_interactions(
    tables: Tables, user_column: str, item_column: str, time_column: str | None, k_core: int, keep_repeats=False
) -> Interactions:
    # 1. Read all rows: three numbers per row, and each name once.
    users, items, times = array("i"), array("i"), array("d")
    user_numbers: dict[str, int] = {}
    item_numbers: dict[str, int] = {}
    columns = [user_column, item_column, *([time_column] if time_column else [])]
    for table in _as_list(tables):
        for start, batch in read_batches(table, columns):
            for row, (user, item) in enumerate(zip(batch[user_column], batch[item_column], strict=True), start):
                user = _checked_id(user, table, row, user_column)
                item = _checked_id(item, table, row, item_column)
                users.append(user_numbers.setdefault(user, len(user_numbers)))
                items.append(item_numbers.setdefault(item, len(item_numbers)))
            for row, time in enumerate(batch[time_column] if time_column else (), start):
                times.append(as_time(time, f"{table_name(table)}: row {row}, {time_column}"))
    if not users:
        raise ValueError("The tables contain no interactions.")

    # 2. Sort by user and time. The sort is stable, so rows with equal times keep the order of the file.
    columns = {"user": users, "item": items, "time": times or range(len(users))}
    log = pd.DataFrame({name: np.asarray(values) for name, values in columns.items()})
    log = log.iloc[np.lexsort((log["time"], log["user"]))]

    # 3. Drop repeats, then users and items with few rows, until none is left.
    unique = log.drop_duplicates(["user", "item", "time"] if keep_repeats else ["user", "item"])
    kept, enough = unique, np.zeros(1, dtype=bool)
    while not enough.all():
        sizes = [kept.groupby(name)[name].transform("size") for name in ("user", "item")]
        enough = (sizes[0] >= k_core) & (sizes[1] >= k_core)
        kept = kept[enough]
    if not len(kept):
        raise ValueError(f"No interaction remains: no users and items have {k_core} each; decrease k_core.")

    # 4. Number the remaining users and items in natural order of their names.
    user_names, item_names = list(user_numbers), list(item_numbers)
    user_order = sorted(kept["user"].unique().tolist(), key=lambda user: natural_order(user_names[user]))
    item_order = sorted(kept["item"].unique().tolist(), key=lambda item: natural_order(item_names[item]))
    index_of = {item: index for index, item in enumerate(item_order)}
    by_user = kept.assign(item=kept["item"].map(index_of)).groupby("user").agg(list).loc[user_order]
    return Interactions(
        item_ids=[item_names[item] for item in item_order],
        items=[{} for _ in item_order],
        user_ids=[user_names[user] for user in user_order],
        histories=by_user["item"].tolist(),
        timestamps=by_user["time"].tolist() if times else None,
        counts={
            "rows_read": len(log),
            "repeats_dropped": len(log) - len(unique),
            "below_core_dropped": len(unique) - len(kept),
            "users_dropped": len(user_names) - len(user_order),
            "items_dropped": len(item_names) - len(item_order),
        },
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sources

SOURCES: dict[str, Callable[..., Interactions]] = {
    "toy": toy_shop,
    "table": read_table,
    "amazon2018": read_amazon2018,
    "amazon2023": read_amazon2023,
    "lcrec": read_lcrec,
}


def read_source(source: str, source_args: Mapping[str, object] | None = None) -> Interactions:
    """
    Read a data set by the name of its source.

    Args:
        source (`str`):
            A key of `SOURCES`, an existing folder (for [`read_lcrec`]), or the dotted path of your own function that
            returns `Interactions`, such as `"my_package.shop.read"`.
        source_args (`Mapping[str, object]`, *optional*):
            Arguments of that function.

    Returns:
        `Interactions`: what the function returns.

    Raises:
        `FileNotFoundError`: if the source is unknown, or a file does not exist.
        `ValueError`: if the function does not accept the arguments or does not return `Interactions`.

    Example:

    ```python
    >>> from lasar_hf.data import read_source

    >>> shop = read_source("table", {"interactions": "ratings.csv", "k_core": 3})
    ```
    """
    function, arguments = _bind_source(source, source_args)
    interactions = function(**arguments)
    if not isinstance(interactions, Interactions):
        raise ValueError(f"source {source!r} returned {type(interactions).__name__}; expected Interactions.")
    return interactions


def source_settings(source: str, source_args: Mapping[str, object] | None = None) -> dict[str, object]:
    """
    Name and arguments of the function of [`read_source`], ready for JSON, with the SHA-256 of its content in place of
    each file or folder. The code of your own function and the content of data sets on the Hub are not included.
    """
    function, arguments = _bind_source(source, source_args)
    return {"source": function.__name__, "source_args": {name: _hashed(value) for name, value in arguments.items()}}


def _bind_source(source: str, source_args: Mapping[str, object] | None) -> tuple[Callable, dict[str, object]]:
    """The function of a source, and its arguments after a check against its signature."""
    arguments = dict(source_args or {})
    if source in SOURCES:
        function = SOURCES[source]
    elif Path(source).is_dir():
        function, arguments = read_lcrec, {"folder": source} | arguments
    else:
        function = _import_source(source)
    signature = inspect.signature(function)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        expected = ", ".join(signature.parameters)
        raise ValueError(f"source_args of source {source!r}: {error}; its arguments are {expected}.") from error
    return function, arguments


def _import_source(source: str) -> Callable:
    if Path(source).is_file():
        raise ValueError(f"source is the file {source}; use source=table with it as `interactions` in source_args.")
    try:
        return import_dotted(source)
    except ValueError as error:
        raise FileNotFoundError(
            f"Unknown source {source!r}; expected {', '.join(SOURCES)}, an existing folder with <Name>.inter.json, or "
            f"the dotted path of a function. {error}"
        ) from error


def _hashed(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_hashed(part) for part in value]
    path = Path(value) if isinstance(value, str | Path) and value else None
    if path is None or not path.exists():
        return value
    return file_hash(path) if path.is_file() else folder_hashes(path, "*")
