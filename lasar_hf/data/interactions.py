"""Users' interactions in order of time, checked once on construction, and the readers of the LC-Rec files."""

import html
import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..model.configuration_lasar import sid_token


TEXT_FIELDS = ("title", "description", "brand", "categories")
ID_FIELDS = ("asin", "parent_asin")  # identify items that have no text
CATEGORY_SEPARATOR = " > "
TIES = ("file", "item", "random")
# Control characters except white space, and those that change the writing direction: a title must not hide or reorder
# the text around it. Joiners stay because scripts and emoji need them.
_INVISIBLE = dict.fromkeys(
    {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - set(b"\t\n\r"), " "
)


@dataclass(frozen=True)
class Interactions:
    """
    Items, and the history of each user.

    Args:
        item_ids (`list[str]`):
            Name of each item in the raw files. The position in this list is the *item index*, which all other parts
            of the library use.
        items (`list[dict[str, str]]`):
            Text of each item: `title`, `description`, `brand`, `categories` (levels joined by `" > "`), `asin` and
            `parent_asin`. Unknown and empty fields are left out.
        user_ids (`list[str]`):
            Name of each user in the raw files.
        histories (`list[list[int]]`):
            Item indices of each user, oldest first.
        timestamps (`list[list[float]]`, *optional*):
            Time of each interaction, never decreasing within a history: numbers in the unit of the raw files, dates in
            seconds since 1970.
        counts (`dict[str, int]`, *optional*):
            Numbers of rows that a reader read and left out, for the data card.

    Raises:
        `ValueError`: if a user or item repeats, a history is empty, an item index does not exist, timestamps decrease,
            or the lengths of the lists differ.

    Example:

    ```python
    >>> from lasar_hf.data import Interactions

    >>> shop = Interactions(["cup", "pot"], [{"title": "Blue cup"}, {}], ["anna"], [[1, 0]])
    >>> shop.num_interactions
    2
    ```
    """

    item_ids: list[str]
    items: list[dict[str, str]]
    user_ids: list[str]
    histories: list[list[int]]
    timestamps: list[list[float]] | None = None
    counts: dict[str, int] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        for name, values, owner, ids in (
            ("items", self.items, "item_ids", self.item_ids),
            ("histories", self.histories, "user_ids", self.user_ids),
            ("timestamps", self.timestamps, "user_ids", self.user_ids),
        ):
            if values is not None and len(values) != len(ids):
                raise ValueError(f"{name} has {len(values)} entries; expected {len(ids)}, one per entry of {owner}.")
        _check_distinct("item_ids", self.item_ids)
        _check_distinct("user_ids", self.user_ids)
        num_items = len(self.item_ids)
        for user, history in zip(self.user_ids, self.histories, strict=True):
            if not len(history):
                raise ValueError(f"User {user!r} has an empty history; add items or remove the user.")
            for index in (min(history), max(history)):
                if not 0 <= index < num_items:
                    raise ValueError(f"User {user!r} has item index {index}; expected 0 to {num_items - 1}.")
        for user, history, times in zip(self.user_ids, self.histories, self.timestamps or (), strict=False):
            if len(times) != len(history):
                raise ValueError(f"User {user!r} has {len(times)} timestamps for {len(history)} items.")
            if any(later < earlier for earlier, later in pairwise(times)):
                raise ValueError(f"User {user!r} has decreasing timestamps; sort histories from oldest to newest.")

    @property
    def num_interactions(self) -> int:
        """Number of interactions of all users."""
        return sum(len(history) for history in self.histories)


def _check_distinct(name: str, ids: list[str]) -> None:
    if len(set(ids)) < len(ids):
        raise ValueError(f"{name} contains {Counter(ids).most_common(1)[0][0]!r} twice; ids must be distinct.")


def build_interactions(
    log: pd.DataFrame, user_names: list[str], item_names: list[str], k_core: int, keep_repeats: bool, ties: str
) -> Interactions:
    """Sorted and filtered histories of rows of numbers (user, item and optionally time), see `read_table`."""
    # 1. Sort by user and time. The sort is stable, so rows with equal times keep the order of the file.
    has_times = "time" in log
    log = log if has_times else log.assign(time=range(len(log)))
    tied = np.zeros(len(log), dtype=np.int64)
    if ties == "item":
        items = sorted(range(len(item_names)), key=lambda item: natural_order(item_names[item]))
        tied = np.argsort(items)[log["item"]]
    elif ties == "random":
        tied = np.random.default_rng(0).permutation(len(log))
    log = log.iloc[np.lexsort((tied, log["time"], log["user"]))]

    # 2. Drop repeats, then users and items with few rows, until none is left.
    unique = log.drop_duplicates(["user", "item", "time"] if keep_repeats else ["user", "item"])
    kept, enough = unique, np.zeros(1, dtype=bool)
    while not enough.all():
        sizes = [kept.groupby(name)[name].transform("size") for name in ("user", "item")]
        enough = (sizes[0] >= k_core) & (sizes[1] >= k_core)
        kept = kept[enough]
    if not len(kept):
        raise ValueError(f"No interaction remains: no users and items have {k_core} each; decrease k_core.")

    users, times = kept["user"].to_numpy(), kept["time"].to_numpy()  # not `shift`, which rounds nanoseconds
    same_user = users[1:] == users[:-1]
    num_neighbors, num_tied = int(same_user.sum()), int((same_user & (times[1:] == times[:-1])).sum())
    if num_tied > num_neighbors / 5:
        warnings.warn(f"{num_tied} of {num_neighbors} neighbours have equal times, ordered by {ties}.", stacklevel=3)

    # 3. Number the remaining users and items in natural order of their names.
    if log.attrs.get("is_date"):
        kept = kept.assign(time=kept["time"] / 1e9)
    user_order = sorted(kept["user"].unique().tolist(), key=lambda user: natural_order(user_names[user]))
    item_order = sorted(kept["item"].unique().tolist(), key=lambda item: natural_order(item_names[item]))
    index_of = {item: index for index, item in enumerate(item_order)}
    by_user = kept.assign(item=kept["item"].map(index_of)).groupby("user").agg(list).loc[user_order]
    return Interactions(
        item_ids=[item_names[item] for item in item_order],
        items=[{} for _ in item_order],
        user_ids=[user_names[user] for user in user_order],
        histories=by_user["item"].tolist(),
        timestamps=by_user["time"].tolist() if has_times else None,
        counts={
            "rows_read": len(log),
            "repeats_dropped": len(log) - len(unique),
            "below_core_dropped": len(unique) - len(kept),
            "users_dropped": len(user_names) - len(user_order),
            "items_dropped": len(item_names) - len(item_order),
        },
    )


def read_lcrec(folder: str | Path) -> Interactions:
    """
    Read the files of LC-Rec, LETTER and MiniOneRec: one `<Name>.inter.json` (user to list of items, oldest first) and
    optionally `<Name>.item.json` (item to text fields).

    Args:
        folder (`str` or `Path`):
            Folder with the files of one data set.

    Returns:
        `Interactions`: items in natural order of their ids, users in the order of the file.

    Raises:
        `FileNotFoundError`: if there is no `*.inter.json`.
        `ValueError`: if there are several, the JSON is broken, or a history is empty or not a list.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.inter.json"))
    if not paths:
        raise FileNotFoundError(f"{folder} contains no <Name>.inter.json; expected the folder of an LC-Rec data set.")
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"{folder} contains several data sets ({names}); expected one.")
    path = paths[0]
    histories = {user: _history(path, user, items) for user, items in _read_object(path).items()}
    text_path = path.with_name(path.name.removesuffix(".inter.json") + ".item.json")
    texts = _read_object(text_path) if text_path.exists() else {}
    for item, text in texts.items():
        if not isinstance(text, dict):
            raise ValueError(f"{text_path}: item {item!r} is {type(text).__name__}; expected an object.")

    item_ids = sorted({item for items in histories.values() for item in items} | set(texts), key=natural_order)
    index_of = {item: index for index, item in enumerate(item_ids)}
    return Interactions(
        item_ids=item_ids,
        items=[item_fields(texts.get(item, {})) for item in item_ids],
        user_ids=list(histories),
        histories=[[index_of[item] for item in items] for items in histories.values()],
    )


def read_index(
    path: str | Path,
    item_ids: Sequence[str],
    num_sid_levels: int = 4,
    codebook_size: int = 256,
    allow_collisions: bool = False,
) -> np.ndarray:
    """
    Read ready-made Semantic IDs from an `.index.json` file: item to its tokens, `["<a_17>", "<b_255>", …]`.

    Args:
        path (`str` or `Path`):
            The file.
        item_ids (`Sequence[str]`):
            Items of the catalogue: `Interactions.item_ids`. The file may contain others.
        num_sid_levels (`int`, *optional*, defaults to `4`):
            Number of codes per item, M.
        codebook_size (`int`, *optional*, defaults to `256`):
            Number of codes per level, K.
        allow_collisions (`bool`, *optional*, defaults to `False`):
            Whether items may share a Semantic ID.

    Returns:
        `np.ndarray`: codes `(I, M)`, int64, in `[0, K)`, in the order of `item_ids`.

    Raises:
        `FileNotFoundError`: if the file does not exist.
        `ValueError`: if the JSON is broken, an item is missing or has wrong tokens, or two items share a Semantic ID.
    """
    path = Path(path)
    index = _read_object(path)
    code_of = [{sid_token(level, code): code for code in range(codebook_size)} for level in range(num_sid_levels)]
    codes = np.empty((len(item_ids), num_sid_levels), dtype=np.int64)
    owner: dict[tuple[str, ...], str] = {}
    for position, item in enumerate(item_ids):
        tokens = index.get(item)
        if not isinstance(tokens, list) or len(tokens) != num_sid_levels:
            raise ValueError(f"{path}: item {item!r} has {tokens!r}; expected a list of {num_sid_levels} tokens.")
        for level, token in enumerate(tokens):
            if not isinstance(token, str) or token not in code_of[level]:
                raise ValueError(
                    f"{path}: item {item!r} has {token!r} at level {level}; expected {sid_token(level, 0)} to "
                    f"{sid_token(level, codebook_size - 1)}."
                )
            codes[position, level] = code_of[level][token]
        first = owner.setdefault(tuple(tokens), item)
        if first != item and not allow_collisions:
            raise ValueError(
                f"{path}: items {first!r} and {item!r} share the Semantic ID {''.join(tokens)}; resolve the collision "
                "or set allow_collisions to True."
            )
    return codes


def _history(path: Path, user: str, items: object) -> list[str]:
    if not isinstance(items, list):
        raise ValueError(f"{path}: user {user!r} has {type(items).__name__}; expected a list of items.")
    if not items:
        raise ValueError(f"{path}: user {user!r} has an empty history; add items or remove the user.")
    names = [id_text(item) for item in items]
    if None in names:
        wrong = items[names.index(None)]
        raise ValueError(f"{path}: user {user!r} has the item {wrong!r}; expected a number or a string.")
    return names


def _read_object(path: Path) -> dict:
    """A JSON object whose keys are ids."""
    content = parse_json(path.read_bytes(), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: contains {type(content).__name__}; expected a JSON object.")
    for key in content:
        if id_text(key) is None:
            raise ValueError(f"{path}: {key!r} is not an id; expected text.")
    return {id_text(key): value for key, value in content.items()}


def parse_json(content: bytes | str, path: str | Path, line: int | None = None) -> object:
    """Parse a JSON file, or one line of it. Errors name the file and the line. No object may repeat a key."""
    where = f"{path}: line {line}" if line else str(path)

    def unique_keys(pairs: list[tuple[str, object]]) -> dict:
        content = dict(pairs)
        if len(content) < len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {repeated!r} appears twice")
        return content

    try:
        return json.loads(content, object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {line or error.lineno}: broken JSON ({error.msg}).") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: broken JSON ({error}).") from error


def clean_text(value: object) -> str:
    """
    Text of a table cell, stripped, without control characters, changes of writing direction and unpaired surrogates.
    `None` and NaN give an empty text; lists are joined by spaces, objects give `name: value, name: value`.
    """
    if isinstance(value, list | tuple):
        return " ".join(filter(None, map(clean_text, value)))
    if isinstance(value, Mapping):
        value = ", ".join(f"{name}: {clean_text(part)}" for name, part in value.items())
    text = "" if value is None or value != value else str(value)
    return text.encode("utf-8", "replace").decode("utf-8").translate(_INVISIBLE).strip()


class _PageText(HTMLParser):
    """Collects the text of a web page in `parts`, without tags, comments, scripts and style sheets."""

    def __init__(self):
        super().__init__()
        self.parts, self.is_hidden = [], False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.is_hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.is_hidden = False

    def handle_data(self, data: str) -> None:
        self.parts += [] if self.is_hidden else [data]


def strip_html(value: object) -> object:
    """Text without tags, entities and pieces of page code, or a list of such texts."""
    if isinstance(value, list | tuple):
        return [strip_html(part) for part in value]
    text = html.unescape(clean_text(value))
    if "<" in text:
        page = _PageText()
        page.feed(text)
        page.close()
        text = " ".join(page.parts)
    # Amazon's titles contain the page's code without its tags, too: "var aPageStart = (new Date()).getTime();".
    return "" if ".getTime()" in text else " ".join(text.split())


def id_text(value: Any) -> str | None:
    """
    A user or item id as stripped text, in which `7`, `7.0` and `"7"` are equal. `None` if the value cannot be an id:
    blank, a fraction, a float too large to be exact, a boolean, a list, an object, or text with an unpaired surrogate.
    """
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    if is_whole or (isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value()):
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    text = str(value).strip()
    is_text = text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)
    return text if is_text and text else None


def item_fields(raw: Mapping[str, Any], strip_markup: bool = False, several: bool = False) -> dict[str, str]:
    """
    The text and id fields of a raw item that are not empty, cleaned. Category levels are a list, or text with `" > "`,
    `|` or commas between them; a comma before a space belongs to a name ("Tapes, Adhesives & Sealants"). Of several
    lists of levels (Amazon 2014) the first counts. With `several`, each raw field is a list of which the first value
    that is not empty counts.
    """
    fields = {}
    for name in TEXT_FIELDS + ID_FIELDS:
        values = raw.get(name, ()) if several else [raw.get(name)]
        values = map(strip_html, values) if strip_markup else values
        value = next(filter(clean_text, values), None)
        if name == "categories" and isinstance(value, str):
            separator = next((mark for mark in (CATEGORY_SEPARATOR, "|") if mark in value), None)
            value = value.split(separator) if separator else re.split(r",(?! )", value)
        if name == "categories" and isinstance(value, list | tuple):
            value = value[0] if value and isinstance(value[0], list | tuple) else value
            value = CATEGORY_SEPARATOR.join(filter(None, map(clean_text, value)))
        if text := clean_text(value):
            fields[name] = text
    return fields


def natural_order(name: str) -> tuple[bool, int, str, str]:
    """Sorting key: numbers by size, then all other names."""
    is_number = name.isascii() and name.isdigit()
    digits = name.lstrip("0") if is_number else ""  # compared as text, since `int` refuses thousands of digits
    return (not is_number, len(digits), digits, name)
