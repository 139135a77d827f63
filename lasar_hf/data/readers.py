"""
Readers of tables of interactions and items: your own, and those of Amazon Reviews 2014, 2018 and 2023.

A *source* is a function that returns `Interactions`; `SOURCES` names those of the library.
"""

import inspect
import warnings
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from ..arguments import import_dotted
from ..files import file_hash, folder_hashes
from .interactions import TIES, Interactions, build_interactions, id_text, item_fields, read_lcrec
from .tables import Table, read_batches, table_name
from .times import UNITS, TimeColumn
from .toy import toy_shop


Tables: TypeAlias = Table | Sequence[Table]

AMAZON: dict[str, Any] = {
    "user_column": "reviewerID",
    "item_column": "asin",
    "time_column": "unixReviewTime",
}  # 2014 and 2018
AMAZON_2023 = "McAuley-Lab/Amazon-Reviews-2023"
# Columns of each text field; the first that is not empty counts.
TEXT_COLUMNS = {
    "title": ["title", "name", "item_name", "product_title"],
    "description": ["description", "features", "feature", "details", "subtitle", "brand", "store"],
    "brand": ["brand", "store"],
    "categories": ["categories", "category", "genres"],
}

# ---------------------------------------------------------------------------------------------------------------------
# Items and interactions


def read_items(
    tables: Tables,
    item_column: str = "item_id",
    text_columns: Mapping[str, str | Sequence[str]] | None = None,
    strip_markup: bool = False,
    columns: Sequence[str] | None = None,
    item_ids: Collection[str] | None = None,
    **options: str | None,
) -> dict[str, dict[str, str]]:
    """
    Read the text of items. If an item has several rows, the first one with text counts.

    Args:
        tables (`str`, `Path`, `Dataset`, `IterableDataset` or a sequence of these):
            One row per item, see [`read_table`].
        item_column (`str`, *optional*, defaults to `"item_id"`):
            Column of the item's id.
        text_columns (`Mapping[str, str | Sequence[str]]`, *optional*):
            Column of each text field, such as `{"title": "name"}`, or several, of which the first that is not empty
            counts; the table must have them. By default those of `TEXT_COLUMNS` that the table has.
        strip_markup (`bool`, *optional*, defaults to `False`):
            Whether to remove HTML tags, scripts, style sheets and entities from the text.
        columns (`Sequence[str]`, *optional*):
            Names of the (first) columns of delimited text without a header; by default item, title, categories.
        item_ids (`Collection[str]`, *optional*):
            Items to read; the tables must have one of them.
        delimiter, encoding: as for [`read_table`].

    Returns:
        `dict[str, dict[str, str]]`: fields of each item by its id, as in `Interactions.items`.

    Raises:
        `FileNotFoundError`: if a file does not exist.
        `ValueError`: if a column is missing, a row is broken or has no id, or `text_columns` has no known fields.
    """
    fields = _text_fields(text_columns)
    names = list(chain.from_iterable(fields.values()))
    needed, optional = ([item_column], names) if text_columns is None else ([item_column, *names], [])
    layout = [item_column, *(fields[name][0] for name in ("title", "categories") if name in fields)]
    options |= {"layouts": [columns] if columns else [layout[:2], layout]}  # type: ignore[dict-item]
    items: dict[str, dict[str, str]] = {}
    num_other, item_id = 0, None
    for table in _as_list(tables):
        for start, batch in read_batches(table, needed, optional, **options):
            for position, value in enumerate(batch[item_column]):
                item_id = _checked_id(value, table, start + position, item_column)
                if item_ids is not None and item_id not in item_ids:
                    continue
                values = {field: [batch[name][position] for name in names] for field, names in fields.items()}
                text = item_fields(values, strip_markup, several=True)
                items[item_id] = first = items.get(item_id) or text
                num_other += bool(text) and text != first
    if item_ids and not items:
        files = ", ".join(map(table_name, _as_list(tables)))
        raise ValueError(f"{files}: no {item_column} is an item of the interactions: {item_id!r}, {min(item_ids)!r}.")
    if num_other:
        warnings.warn(f"{num_other} rows repeat an item with other text; the first text counts.", stacklevel=3)
    return items


def _text_fields(text_columns: Mapping[str, str | Sequence[str]] | None) -> Mapping[str, Sequence]:
    text_columns = TEXT_COLUMNS if text_columns is None else text_columns
    if not text_columns or not set(text_columns) <= set(TEXT_COLUMNS):
        raise ValueError(f"text_columns has the fields {list(text_columns)}; expected some of {list(TEXT_COLUMNS)}.")
    return {field: _as_list(columns) for field, columns in text_columns.items()}


def _checked_id(value: object, table: Table, row: int, column: str) -> str:
    text = id_text(value)
    if text is None:
        raise ValueError(f"{table_name(table)}: row {row} has {column} {value!r}; expected text or a whole number.")
    return text


def _as_list(tables: Tables) -> Sequence[Table]:
    return tables if isinstance(tables, list | tuple) else [tables]


def read_table(
    interactions: Tables,
    items: Tables | None = None,
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
    time_column: str | None = "timestamp",
    time_format: str | None = None,
    text_columns: Mapping[str, str | Sequence[str]] | None = None,
    k_core: int = 5,
    keep_repeats: bool = False,
    ties: str = "file",
    strip_markup: bool = False,
    columns: Sequence[str] | None = None,
    items_columns: Sequence[str] | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
) -> Interactions:
    """
    Read interactions, and the text of items, from tables with named columns.

    The rows of a user are sorted by time. Then repeats are dropped, and users and items with fewer than `k_core`
    interactions, until none is left. Ids are text without blanks around it.

    Args:
        interactions (`str`, `Path`, `Dataset`, `IterableDataset` or a sequence of these):
            One row per interaction: delimited text, JSON or Parquet (by the suffix, compressed too), or a data set.
        items (same, *optional*):
            One row per item. Items that are not in it have no text.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            Column of the user.
        item_column (`str`, *optional*, defaults to `"item_id"`):
            Column of the item, in both tables.
        time_column (`str`, *optional*, defaults to `"timestamp"`):
            Column of the time: numbers or dates of one form. `None` or empty: the rows are in order already.
        time_format (`str`, *optional*):
            Form of the times as for `strptime`, such as `"%d/%b/%Y:%H:%M:%S %z"`; found by default.
        text_columns, strip_markup: as for [`read_items`].
        k_core (`int`, *optional*, defaults to `5`):
            Minimum number of interactions of a user and of an item; `1` keeps all.
        keep_repeats (`bool`, *optional*, defaults to `False`):
            Whether a user may interact with an item several times. By default only the first time counts, as in the
            field's data sets. The same user, item and time is one interaction in any case.
        ties (`str`, *optional*, defaults to `"file"`):
            Order of a user's rows with equal times: as in the `"file"`, by `"item"` id, or `"random"` (always the
            same). If more than a fifth of the neighbours in the histories have equal times, a warning says so.
        columns, items_columns (`Sequence[str]`, *optional*):
            Names of the (first) columns of delimited text without a header. By default they are user, item and time,
            or user, item, rating and time, with a warning in the log; for items see [`read_items`].
        delimiter, encoding (`str`, *optional*):
            Of text. By default `::` or the most frequent of comma, semicolon, tab and `|` in the first line, and
            UTF-8, UTF-16, or else Latin-1 with a warning.

    Returns:
        `Interactions`: users and items in natural order of their ids, with `timestamps` (if there is a time column)
        and `counts` of rows that were read and left out.

    Raises:
        `FileNotFoundError`: if a file does not exist.
        `ValueError`: if a column is missing, a row is broken or has no user, item or time, times have several units
            or forms, or some are 0 or -1 among times since 1970, no item has a row in `items`, or nothing remains.

    Example:

    ```python
    >>> from lasar_hf.data import read_table

    >>> shop = read_table("ratings.csv", "products.parquet", user_column="user", item_column="product")
    ```
    """
    _text_fields(text_columns)  # fails before the long reading
    if ties not in TIES:
        raise ValueError(f"ties is {ties!r}; expected one of {', '.join(TIES)}.")
    options: dict[str, Any] = {"delimiter": delimiter, "encoding": encoding}
    names = [user_column, item_column, *([time_column] if time_column else [])]
    layouts = [columns] if columns else [names, [*names[:2], "rating", *names[2:]]]
    log, user_names, item_names = _read_log(interactions, *names, time_format=time_format, layouts=layouts, **options)  # type: ignore[misc]
    data = build_interactions(log, user_names, item_names, k_core, keep_repeats, ties)
    if items is not None:
        options |= {"columns": items_columns, "item_ids": set(data.item_ids), "strip_markup": strip_markup}
        texts = read_items(items, item_column, text_columns, **options)
        for item_id, item in zip(data.item_ids, data.items, strict=True):
            item.update(texts.get(item_id, {}))
        if num_empty := sum(not item for item in data.items):
            warnings.warn(f"{num_empty} of {len(data.items)} items have no text; they are kept.", stacklevel=2)
    return data


def read_amazon2014(
    interactions: Tables,
    items: Tables | None = None,
    k_core: int = 5,
    ties: str = "file",
    text_columns: Mapping[str, str | Sequence[str]] | None = None,
) -> Interactions:
    """
    Read Amazon Reviews 2014 (the field's Beauty and Sports): `reviews_<Category>_5.json.gz` or
    `ratings_<Category>.csv`, and `meta_<Category>.json.gz`. Otherwise as [`read_amazon2018`].
    """
    columns = ["reviewerID", "asin", "overall", "unixReviewTime"]
    options: dict[str, Any] = {"k_core": k_core, "ties": ties, "text_columns": text_columns, "strip_markup": True}
    return read_table(interactions, items, columns=columns, **options, **AMAZON)


def read_amazon2018(
    interactions: Tables,
    items: Tables | None = None,
    k_core: int = 5,
    ties: str = "file",
    text_columns: Mapping[str, str | Sequence[str]] | None = None,
) -> Interactions:
    """
    Read Amazon Reviews 2018: the 5-core JSON lines (`Musical_Instruments_5.json.gz`) or the ratings
    (`Musical_Instruments.csv`), and `meta_<Category>.json.gz`.

    Of several reviews of an item by a user the earliest counts, and HTML is removed from the text. Arguments, result
    and errors as for [`read_table`].
    """
    columns = ["asin", "reviewerID", "overall", "unixReviewTime"]
    options: dict[str, Any] = {"k_core": k_core, "ties": ties, "text_columns": text_columns, "strip_markup": True}
    return read_table(interactions, items, columns=columns, **options, **AMAZON)


def read_amazon2023(
    interactions: Tables | None = None,
    items: Tables | None = None,
    category: str | None = None,
    revision: str = "main",
    k_core: int = 5,
    ties: str = "file",
    text_columns: Mapping[str, str | Sequence[str]] | None = None,
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
    options: dict[str, Any] = {"k_core": k_core, "ties": ties, "text_columns": text_columns, "strip_markup": True}
    return read_table(interactions, items, item_column="parent_asin", **options)


def _read_log(
    tables: Tables,
    user_column: str,
    item_column: str,
    time_column: str | None = None,
    time_format: str | None = None,
    **options: Any,
) -> tuple[pd.DataFrame, list[str], list[str]]:
    """All rows as numbers (user, item, time), and the name of each user and item."""
    users, items, times = array("i"), array("i"), TimeColumn(time_column, time_format)
    user_numbers: dict[str, int] = {}
    item_numbers: dict[str, int] = {}
    columns = [user_column, item_column, *([time_column] if time_column else [])]
    for table in _as_list(tables):
        for start, batch in read_batches(table, columns, **options):
            users.extend(_numbers(batch[user_column], user_numbers, table, start, user_column))
            items.extend(_numbers(batch[item_column], item_numbers, table, start, item_column))
            if time_column:
                times.add(batch[time_column], table_name(table), start)
    if not users:
        raise ValueError(f"{', '.join(map(table_name, _as_list(tables)))}: no interactions.")
    for column, names in ((user_column, user_numbers), (item_column, item_numbers)):
        spellings = {name.casefold(): name for name in names}
        if num_variants := len(names) - len(spellings):
            example = next(name for name in names if spellings[name.casefold()] != name)
            warnings.warn(f"{num_variants} ids of {column} differ only in case: {example!r} and others.", stacklevel=3)
    log = pd.DataFrame({"user": np.asarray(users), "item": np.asarray(items)})
    if time_column:
        log["time"] = times.numbers()
        log.attrs["is_date"] = times.form not in UNITS
    return log, list(user_numbers), list(item_numbers)


def _numbers(values: Sequence, numbers: dict[str, int], table: Table, start: int, column: str) -> Iterator[int]:
    """The number of each id; new ids are added to `numbers`."""
    for row, value in enumerate(values, start):
        number = numbers.get(value) if isinstance(value, str) else None
        if number is None:
            number = numbers.setdefault(_checked_id(value, table, row, column), len(numbers))
        yield number


# ---------------------------------------------------------------------------------------------------------------------
# Sources

SOURCES: dict[str, Callable[..., Interactions]] = {
    "toy": toy_shop,
    "table": read_table,
    "amazon2014": read_amazon2014,
    "amazon2018": read_amazon2018,
    "amazon2023": read_amazon2023,
    "lcrec": read_lcrec,
}


def read_source(source: str, source_args: Mapping[str, Any] | None = None) -> Interactions:
    """
    Read a data set by the name of its source.

    Args:
        source (`str`):
            A key of `SOURCES`, an existing folder (for [`read_lcrec`]), or the dotted path of your own function that
            returns `Interactions`, such as `"my_package.shop.read"`.
        source_args (`Mapping[str, Any]`, *optional*):
            Arguments of that function.

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
    if not isinstance(interactions := function(**arguments), Interactions):
        raise ValueError(f"source {source!r} returned {type(interactions).__name__}; expected Interactions.")
    return interactions


def source_settings(source: str, source_args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    Name and arguments of the function of [`read_source`], ready for JSON, with the SHA-256 of its content in place of
    each file or folder. The code of your own function and the content of data sets on the Hub are not included.
    """
    function, arguments = _bind_source(source, source_args)
    settings = {name: value if name.endswith("_column") else _hashed(value) for name, value in arguments.items()}
    return {"source": f"{function.__module__}.{function.__qualname__}", "source_args": settings}


def _bind_source(source: str, source_args: Mapping[str, Any] | None) -> tuple[Callable, dict[str, Any]]:
    """The function of a source, and its arguments after a check against its signature."""
    arguments = dict(source_args or {})
    if source in SOURCES:
        function = SOURCES[source]
    elif source and Path(source).is_dir():
        function, arguments = read_lcrec, {"folder": source} | arguments
    else:
        function = _import_source(source)
    check_source_args(source, function, arguments)
    return function, arguments


def check_source_args(source: str, function: Callable, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that the function of a source does not have, with a `ValueError`."""
    signature = inspect.signature(function)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        names = ", ".join(signature.parameters)
        raise ValueError(f"source_args of source {source!r}: {error}; its arguments are {names}.") from error


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
    return file_hash(path) if path.is_file() else folder_hashes(path, "**/*")
