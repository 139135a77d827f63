"""Readers of raw interaction logs: a user's own tables, and Amazon Reviews 2018 and 2023."""

import html
import re
import warnings
from array import array
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .interactions import TEXT_FIELDS, Interactions, item_fields, natural_order
from .tables import Source, as_time, id_text, read_batches, source_name


Sources = Source | Sequence[Source]

_AMAZON = {  # column of: user, item, time, and of each text field
    2018: ("reviewerID", "asin", "unixReviewTime", {"brand": "brand", "categories": "category"}),
    2023: ("user_id", "parent_asin", "timestamp", {"brand": "store", "categories": "categories"}),
}


def read_table(
    interactions: Sources,
    items: Sources | None = None,
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
    time_column: str | None = "timestamp",
    text_columns: Mapping[str, str] | None = None,
    k_core: int = 5,
    keep_repeats: bool = False,
) -> Interactions:
    """
    Read interactions, and the items' text, from tables with named columns.

    Order: by time; rows of one user at one time stay in the order of the file (the tie rule). Then repeats are
    dropped, and users and items with fewer than `k_core` interactions, again until none is left. Only the columns
    asked for are read, a batch at a time.

    Args:
        interactions (`str`, `Path`, `Dataset`, `IterableDataset` or a sequence of these):
            One row an interaction: CSV, Parquet or JSON lines (by the ending, `.gz` too), or a `datasets` data set.
        items (same, *optional*):
            One row an item. Items that are not in it are kept without text; the first row of an id counts.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            Column of the user.
        item_column (`str`, *optional*, defaults to `"item_id"`):
            Column of the item, in both tables.
        time_column (`str`, *optional*, defaults to `"timestamp"`):
            Column of the time: numbers or ISO dates. `None`: the rows are in order already.
        text_columns (`Mapping[str, str]`, *optional*):
            Column of each text field, such as `{"title": "name"}`; these columns must be there. Without it, those of
            `title`, `description`, `brand` and `categories` that are there.
        k_core (`int`, *optional*, defaults to `5`):
            Fewest interactions of a user and of an item; `1` keeps all.
        keep_repeats (`bool`, *optional*, defaults to `False`):
            Whether a user may take an item again. If not, the first time counts, as in the field's data sets. The same
            user, item and time is one interaction in any case.

    Returns:
        `Interactions`: users and items in natural order of their ids, with `timestamps` (where there is a time column)
        and `counts` of what was read and left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a missing column, a broken row, a row without user, item or time, an unknown text field, or nothing
            left after the filters. Names the file and the row.
    """
    check_text_columns(text_columns)
    text_columns, required = (text_columns, True) if text_columns else ({name: name for name in TEXT_FIELDS}, False)
    log = _Log(user_column, item_column, time_column)
    for source in _listed(interactions):
        log.read(source)
    table = log.interactions(k_core, keep_repeats)
    if items is not None:
        _fill_text(table, _listed(items), item_column, text_columns, required, str)
    return table


def read_amazon(
    reviews: Sources, metadata: Sources | None = None, version: int = 2023, k_core: int = 5
) -> Interactions:
    """
    Read Amazon Reviews 2018 or 2023.

    Args:
        reviews (`str`, `Path`, `Dataset`, `IterableDataset` or a sequence of these):
            2018: the 5-core JSON lines (`Musical_Instruments_5.json.gz`). 2023: `5core/rating_only/<Category>.csv`, or
            the reviews of `McAuley-Lab/Amazon-Reviews-2023` as JSON lines, Parquet or opened by `datasets`.
        metadata (same, *optional*):
            2018: `meta_<Category>.json.gz`. 2023: `raw_meta_<Category>`, in one of the same forms.
        version (`int`, *optional*, defaults to `2023`):
            2018 or 2023: they name their columns differently.
        k_core (`int`, *optional*, defaults to `5`):
            Fewest interactions of a user and of an item.

    Returns:
        `Interactions`: see `read_table`. Of a user and an item the earliest review counts; text is without markup.

    Raises:
        ValueError: another version, and what `read_table` raises.
    """
    if version not in _AMAZON:
        raise ValueError(f"`version` is {version}, expected 2018 or 2023.")
    user_column, item_column, time_column, text_columns = _AMAZON[version]
    log = _Log(user_column, item_column, time_column)
    for source in _listed(reviews):
        log.read(source)
    table = log.interactions(k_core, keep_repeats=False)
    if metadata is not None:
        columns = {"title": "title", "description": "description"} | text_columns
        _fill_text(table, _listed(metadata), item_column, columns, False, without_markup)
    return table


class _Log:
    """Interactions while they are read: three numbers each, and the names of users and items once."""

    def __init__(self, user_column: str, item_column: str, time_column: str | None):
        self.columns = [user_column, item_column] + ([time_column] if time_column else [])
        self.user_ids: dict[str, int] = {}
        self.item_ids: dict[str, int] = {}
        self.users, self.items, self.times = array("i"), array("i"), array("d")

    def read(self, source: Source) -> None:
        name = source_name(source)
        for start, batch in read_batches(source, self.columns):
            users, items, *times = (batch[column] for column in self.columns)
            for row, pair in enumerate(zip(users, items, strict=True), start):
                user, item = map(id_text, pair)
                if user is None or item is None:
                    column, value = (self.columns[0], pair[0]) if user is None else (self.columns[1], pair[1])
                    missing = value is None or value == ""
                    said = "" if missing else f": {value!r} is none, expected text or a whole number"
                    raise ValueError(f"{name}: row {row} has no {column}{said}.")
                self.users.append(self.user_ids.setdefault(user, len(self.user_ids)))
                self.items.append(self.item_ids.setdefault(item, len(self.item_ids)))
            if times:
                column = self.columns[2]
                self.times.extend(
                    as_time(time, f"{name}: row {row}, {column}") for row, time in enumerate(times[0], start)
                )

    def interactions(self, k_core: int, keep_repeats: bool) -> Interactions:
        """Order, drop repeats, filter, and name what is left."""
        if not len(self.users):
            raise ValueError("there are no interactions to read.")
        users, items = np.asarray(self.users), np.asarray(self.items)
        times = np.asarray(self.times) if len(self.times) else np.arange(len(users), dtype=np.float64)
        rows = np.lexsort((times, users))  # stable: equal users and times stay in the order of the file
        kept = rows[_first_of_each(users[rows], items[rows], times[rows] if keep_repeats else None)]
        num_repeats = len(rows) - len(kept)
        kept = _k_core(users, items, kept, k_core)
        if not len(kept):
            raise ValueError(f"no interaction is left: no users and items have {k_core} each; lower `k_core`.")
        user_names, item_names = list(self.user_ids), list(self.item_ids)
        item_order = sorted(np.unique(items[kept]).tolist(), key=lambda item: natural_order(item_names[item]))
        row_of_item = np.empty(len(item_names), dtype=np.int64)
        row_of_item[item_order] = np.arange(len(item_order))
        found, starts = np.unique(users[kept], return_index=True)  # the rows of a user are neighbours
        rows_of = dict(zip(found.tolist(), np.split(kept, starts[1:]), strict=True))
        user_order = sorted(rows_of, key=lambda user: natural_order(user_names[user]))
        return Interactions(
            item_ids=[item_names[item] for item in item_order],
            items=[{} for _ in item_order],
            user_ids=[user_names[user] for user in user_order],
            histories=[row_of_item[items[rows_of[user]]].tolist() for user in user_order],
            timestamps=[times[rows_of[user]].tolist() for user in user_order] if len(self.times) else None,
            counts={
                "rows_read": len(users),
                "repeats_dropped": num_repeats,
                "below_core_dropped": len(users) - num_repeats - len(kept),
                "users_dropped": len(self.user_ids) - len(user_order),
                "items_dropped": len(self.item_ids) - len(item_order),
            },
        )


def _first_of_each(users: np.ndarray, items: np.ndarray, times: np.ndarray | None) -> np.ndarray:
    """Positions, ascending, of the first row of each user and item, and time where one is given."""
    keys = (items, users) if times is None else (times, items, users)
    order = np.lexsort(keys)
    new = np.ones(len(order), dtype=bool)
    new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    return np.sort(order[new])


def _k_core(users: np.ndarray, items: np.ndarray, kept: np.ndarray, k: int) -> np.ndarray:
    """Drop rows of users and items with fewer than `k` rows, again until none is left; order stays."""
    while len(kept):
        enough = (np.bincount(users[kept])[users[kept]] >= k) & (np.bincount(items[kept])[items[kept]] >= k)
        if enough.all():
            break
        kept = kept[enough]
    return kept


def _fill_text(
    table: Interactions,
    sources: Sequence[Source],
    item_column: str,
    text_columns: Mapping[str, str],
    required: bool,
    clean: Callable[[str], str],
) -> None:
    """Read the text of the items at hand; others of the file are passed over."""
    rows = {item: row for row, item in enumerate(table.item_ids)}
    filled: set[int] = set()
    again = 0
    columns = list(text_columns.values())
    for source in sources:
        needed, optional = ([item_column, *columns], []) if required else ([item_column], columns)
        for _, batch in read_batches(source, needed, optional):
            for position, item in enumerate(batch[item_column]):
                row = rows.get(id_text(item))
                if row is None:
                    continue
                again += row in filled
                if row not in filled:
                    filled.add(row)
                    raw = {field: cleaned(batch[column][position], clean) for field, column in text_columns.items()}
                    table.items[row].update(item_fields(raw))
    if again:
        warnings.warn(f"{again} rows repeat an item of {source_name(sources[0])}; the first counts.", stacklevel=3)
    without = sum(not item for item in table.items)
    if without:
        warnings.warn(f"{without} of {len(rows)} items have no text; they are kept without.", stacklevel=3)


def check_text_columns(text_columns: Mapping[str, str] | None) -> None:
    """Refuse a mapping from text fields to columns that is empty, or names a field that there is not."""
    if text_columns is not None and not text_columns:
        raise ValueError("`text_columns` names no column: leave it out for those that have the fields' names.")
    unknown = set(text_columns or ()) - set(TEXT_FIELDS)
    if unknown:
        raise ValueError(f"`text_columns` names {min(unknown)!r}, expected some of {', '.join(TEXT_FIELDS)}.")


def cleaned(value: object, clean: Callable[[str], str] = str) -> object:
    """A text field with each of its strings cleaned; `None` for nothing, as NaN is in a column of numbers."""
    if isinstance(value, list | tuple):
        return [clean(str(part)) for part in value if part is not None]
    return None if value is None or value != value else clean(str(value))


def without_markup(text: str) -> str:
    """Text without HTML, as the reviews of Amazon hold it."""
    return " ".join(re.sub(r"<[^<>]*>", " ", html.unescape(text)).split())


def _listed(sources: Sources) -> Sequence[Source]:
    return sources if isinstance(sources, list | tuple) else [sources]
