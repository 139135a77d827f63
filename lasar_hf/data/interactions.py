"""Who took what in which order: the checked table every later step reads, and the reader of LC-Rec's file layout."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..model.configuration_lasar import sid_token
from .tables import id_text


TEXT_FIELDS = ("title", "description", "brand", "categories")
ID_FIELDS = ("asin", "parent_asin")  # what is left to tell an item without text from others
CATEGORY_SEPARATOR = " > "
# Control characters (but for white space) and those that turn the direction of writing: a title may not hide or
# reorder what stands around it. Joiners stay, as scripts and emoji need them.
_INVISIBLE = dict.fromkeys(
    {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - set(b"\t\n\r"), " "
)


@dataclass(frozen=True)
class Interactions:
    """
    Items, and for each user the items taken, oldest first. Checked once on construction.

    Args:
        item_ids (`list[str]`):
            The item's name in the raw files; the position in this list is the item's *row*, which every other part
            of the library uses.
        items (`list[dict[str, str]]`):
            Text of each item: `title`, `description`, `brand`, `categories` (levels joined by `" > "`), and `asin`
            or `parent_asin`, each key there only when known and not empty.
        user_ids (`list[str]`):
            The user's name in the raw files.
        histories (`list[list[int]]`):
            Item rows of each user, oldest first.
        timestamps (`list[list[float]]`, *optional*):
            Time of each item of each history, never falling within one; in the unit of the raw files.
        counts (`dict[str, int]`, *optional*):
            What a reader read and left out, for the data card.

    Raises:
        ValueError: a user or item appears twice, a history is empty, a row does not exist, or the lengths of the
            lists do not agree.
    """

    item_ids: list[str]
    items: list[dict[str, str]]
    user_ids: list[str]
    histories: list[list[int]]
    timestamps: list[list[float]] | None = None
    counts: dict[str, int] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        if len(self.items) != len(self.item_ids):
            raise ValueError(f"`items` has {len(self.items)} entries for {len(self.item_ids)} `item_ids`.")
        if len(self.histories) != len(self.user_ids):
            raise ValueError(f"`histories` has {len(self.histories)} entries for {len(self.user_ids)} `user_ids`.")
        _refuse_twice("item", self.item_ids)
        _refuse_twice("user", self.user_ids)
        num_items = len(self.item_ids)
        for user, history in zip(self.user_ids, self.histories, strict=True):
            if not len(history):
                raise ValueError(f"user {user!r} has an empty history: give the user an item or leave the user out.")
            if min(history) < 0 or max(history) >= num_items:
                row = next(row for row in history if not 0 <= row < num_items)
                raise ValueError(f"user {user!r} has item row {row}, but there are {num_items} items.")
        if self.timestamps is not None:
            self._check_timestamps(self.timestamps)

    def _check_timestamps(self, timestamps: list[list[float]]) -> None:
        if len(timestamps) != len(self.user_ids):
            raise ValueError(f"`timestamps` has {len(timestamps)} entries for {len(self.user_ids)} `user_ids`.")
        for user, history, times in zip(self.user_ids, self.histories, timestamps, strict=True):
            if len(times) != len(history):
                raise ValueError(f"user {user!r} has {len(times)} timestamps for {len(history)} items.")
            if any(later < earlier for earlier, later in pairwise(times)):
                raise ValueError(f"user {user!r} has timestamps that fall: histories go from old to new.")

    @property
    def num_interactions(self) -> int:
        return sum(len(history) for history in self.histories)


def read_lcrec(folder: str | Path) -> Interactions:
    """
    Read the layout of LC-Rec, LETTER and MiniOneRec: one `<Name>.inter.json` (user to item numbers, oldest first)
    and, where there is one, `<Name>.item.json` (item to text). An item without text has an empty entry.

    Args:
        folder (`str` or `Path`):
            Folder that holds the files of one data set.

    Returns:
        `Interactions`: items in numeric order of their ids (as text where an id is no number), users in file order.

    Raises:
        FileNotFoundError: there is no `*.inter.json`.
        ValueError: several `*.inter.json`, broken JSON, a key twice, a history that is no list of items or empty.
    """
    folder = Path(folder)
    found = sorted(folder.glob("*.inter.json"))
    if not found:
        raise FileNotFoundError(f"{folder} holds no `<Name>.inter.json`: give the folder of one LC-Rec data set.")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} holds several data sets ({names}): give each its own folder.")
    path = found[0]
    sequences = _read_object(path)
    for user in sequences:
        if id_text(user) is None:
            raise ValueError(f"{path}: {user!r} is no name of a user.")
    sequences = {user: _item_names(path, user, items) for user, items in sequences.items()}
    text_path = path.with_name(path.name.removesuffix(".inter.json") + ".item.json")
    texts = _read_object(text_path) if text_path.exists() else {}
    for item, text in texts.items():
        if id_text(item) is None:
            raise ValueError(f"{text_path}: {item!r} is no name of an item.")
        if not isinstance(text, dict):
            raise ValueError(f"{text_path}: item {item!r} is {type(text).__name__}, expected an object.")

    item_ids = sorted({item for items in sequences.values() for item in items} | set(texts), key=natural_order)
    rows = {item: row for row, item in enumerate(item_ids)}
    return Interactions(
        item_ids=item_ids,
        items=[item_fields(texts.get(item, {})) for item in item_ids],
        user_ids=list(sequences),
        histories=[[rows[item] for item in items] for items in sequences.values()],
    )


def read_index(
    path: str | Path,
    item_ids: Sequence[str],
    num_sid_levels: int = 4,
    codebook_size: int = 256,
    allow_collisions: bool = False,
) -> np.ndarray:
    """
    Read ready-made Semantic IDs from an `.index.json` file (item to its SID tokens, `["<a_17>", "<b_255>", …]`).

    Args:
        path (`str` or `Path`):
            The file.
        item_ids (`Sequence[str]`):
            The catalogue, in row order: `Interactions.item_ids`. Other items of the file are left out.
        num_sid_levels (`int`, *optional*, defaults to `4`):
            Codes an item, M.
        codebook_size (`int`, *optional*, defaults to `256`):
            Codes a level, K.
        allow_collisions (`bool`, *optional*, defaults to `False`):
            Whether two items may share a SID.

    Returns:
        `np.ndarray`: codes `(I, M)`, int64, in `[0, K)`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: broken JSON, an item that has no SID, another number of levels, a token that is no SID token of
            its level, a code that is too large, or two items with one SID. Each names the file and the item.
    """
    path = Path(path)
    index = _read_object(path)
    codes = np.empty((len(item_ids), num_sid_levels), dtype=np.int64)
    known = {sid_token(lvl, code): (lvl, code) for lvl in range(num_sid_levels) for code in range(codebook_size)}
    owner: dict[tuple[str, ...], str] = {}
    for row, item in enumerate(item_ids):
        if item not in index:
            raise ValueError(f"{path}: item {item!r} has no SID; every item of the catalogue needs one.")
        tokens = index[item]
        if not isinstance(tokens, list) or len(tokens) != num_sid_levels:
            count = len(tokens) if isinstance(tokens, list) else "no list of"
            raise ValueError(f"{path}: item {item!r} has {count} SID levels, expected {num_sid_levels} SID levels.")
        for level, token in enumerate(tokens):
            found = known.get(token) if isinstance(token, str) else None
            if found is None or found[0] != level:
                raise ValueError(
                    f"{path}: item {item!r} has {token!r} at level {level}, expected one of {sid_token(level, 0)} to "
                    f"{sid_token(level, codebook_size - 1)}."
                )
            codes[row, level] = found[1]
        first = owner.setdefault(tuple(tokens), item)
        if first != item and not allow_collisions:
            raise ValueError(
                f"{path}: items {first!r} and {item!r} share the SID {''.join(tokens)}; give each its own or pass "
                "`allow_collisions=True`."
            )
    return codes


def item_fields(raw: dict) -> dict[str, str]:
    """
    Keep the known text and id fields of a raw item that are not empty, as strings. Category levels come as a list, or
    as text with commas between levels (a comma followed by a space belongs to a name: "Tapes, Adhesives & Sealants").
    Control characters and marks that turn the direction of writing become spaces.
    """
    fields = {}
    for name in TEXT_FIELDS + ID_FIELDS:
        value = raw.get(name)
        if name == "categories" and isinstance(value, str):
            value = value.split(CATEGORY_SEPARATOR) if CATEGORY_SEPARATOR in value else re.split(r",(?! )", value)
        if isinstance(value, list):
            parts = [str(part).strip() for part in value if part is not None]
            value = (CATEGORY_SEPARATOR if name == "categories" else " ").join(part for part in parts if part)
        # JSON may hold half a surrogate pair, which no tokenizer and no file takes.
        text = "" if value is None else str(value).encode("utf-8", "replace").decode("utf-8")
        text = text.translate(_INVISIBLE).strip()
        if text:
            fields[name] = text
    return fields


def _item_names(path: Path, user: str, items: object) -> list[str]:
    if not isinstance(items, list):
        raise ValueError(f"{path}: user {user!r} has {type(items).__name__}, expected a list of items.")
    if not items:
        raise ValueError(f"{path}: user {user!r} has an empty history: give the user an item or leave the user out.")
    names = [id_text(item) for item in items]
    if None in names:
        wrong = items[names.index(None)]
        raise ValueError(f"{path}: user {user!r} has the item {wrong!r}, expected a number or a string.")
    return names


def _read_object(path: Path) -> dict:
    """Load a JSON object, naming the file in every error; a key that comes twice would silently drop the first."""

    twice: list[str] = []

    def note_duplicate_keys(pairs: list[tuple[str, object]]) -> dict:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice.append(next(key for key, _ in pairs if key in seen or seen.add(key)))
        return result

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}).") from error
    try:
        result = json.loads(text, object_pairs_hook=note_duplicate_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}: broken JSON ({error.msg}).") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ValueError(f"{path}: broken JSON ({error}).") from error
    if twice:
        raise ValueError(f"{path}: the key {twice[0]!r} appears twice.")
    if not isinstance(result, dict):
        raise ValueError(f"{path}: holds {type(result).__name__}, expected one JSON object.")
    return result


def natural_order(name: str) -> tuple[bool, int, str, str]:
    """Key that sorts numbers by size, then all other names."""
    is_number = name.isascii() and name.isdigit()
    digits = name.lstrip("0") if is_number else ""  # compared by length, then digit by digit, however many there are
    return (not is_number, len(digits), digits, name)


def _refuse_twice(kind: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))
        raise ValueError(f"{kind} {twice!r} appears twice; ids must be distinct.")
