"""The folder that `recipes/prepare.py` writes: items, users, samples and catalogue; and the numbers of a data card."""

import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    List,
    Value,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers import PreTrainedTokenizerBase

from ..files import folder_hashes, read_json, write_json
from ..model.catalog_lasar import SidCatalog
from ..model.processing_lasar import LasarProcessor
from ..steps import check_outputs
from .interactions import ID_FIELDS, TEXT_FIELDS, Interactions
from .splits import PARTS, Split, drawn, repeat_rate


ITEM_FIELDS = TEXT_FIELDS + ID_FIELDS
RARE_REPEATS = 0.001  # largest repeat rate that counts as no repeats
# What a prepared folder holds for training and evaluation.
FILES = (
    "catalog", "embeddings.npy", "interactions.json", "items", "prepared.json", "quantizer", "samples", "tokenizer",
    "users",
)  # fmt: skip


@dataclass(frozen=True)
class PreparedData:
    """
    A data set that is ready for training.

    Args:
        items (`Dataset`):
            One row per item, in the order of the catalogue: `item_id`, `title`, `description`, `brand`, `categories`,
            `asin` and `parent_asin` (`str`, empty if unknown).
        users (`Dataset`):
            One row per user: `user_id` (`str`), `train`, `validation` and `test` (item indices, oldest first).
        samples (`DatasetDict`):
            `train`, `validation` and `test`, each with `user_id` (`str`), `history` (item indices, oldest first) and
            `target` (item index). `train` also has `chain_of_thought` (`str`) and `segments` (list of `str`, whose
            number is the sample's number of latent steps).
        catalog ([`SidCatalog`]):
            Semantic IDs and titles of the items.
        codebook_size (`int`):
            Number of codes per level. Not every code needs to be in use.
        max_history (`int`, *optional*):
            Maximum number of history items that the samples keep.
        repeat_rate (`float`, *optional*, defaults to `0.0`):
            Share of the training interactions, without the first of each user, whose item the user already had.
        exclude_history (`bool`, *optional*, defaults to `True`):
            Whether the items of a user's history are left out of recommendations, as decided on this data.
        split_fields (`dict`, *optional*):
            Fields of [`Split`] that are not columns of `users`.
        embeddings_file (`Path`, *optional*):
            File with a vector of each item, from which `text_vectors` are read when they are needed.

    Example:

    ```python
    >>> from lasar_hf.data import PreparedData

    >>> data = PreparedData.load("outputs/toy/data")
    >>> data.samples["train"][0]["history"]
    [17]
    ```
    """

    items: Dataset
    users: Dataset
    samples: DatasetDict
    catalog: SidCatalog
    codebook_size: int
    max_history: int | None = None
    repeat_rate: float = 0.0
    exclude_history: bool = True
    split_fields: dict[str, Any] = field(default_factory=dict)
    embeddings_file: Path | None = None

    @classmethod
    def load(cls, folder: str | Path) -> "PreparedData":
        """
        Open a folder that `recipes/prepare.py` wrote, memory-mapped. It may be on a read-only disk.

        Every file is compared with the SHA-256 of when it was written, which takes some seconds per gigabyte.

        Raises:
            `FileNotFoundError`: if the folder is not complete.
            `ValueError`: if a file is missing or damaged.
        """
        folder = Path(folder)
        # Folders of older versions have no `users/`.
        if not ((folder / "prepared.json").exists() and (folder / "users").exists()):
            raise FileNotFoundError(
                f"{folder} contains no complete prepared data. Run its preparation, again if it was interrupted: "
                f"lasar prepare, or recipes/prepare.py with output_dir={folder}."
            )
        check_outputs(folder, FILES)
        users, fields = Dataset.load_from_disk(folder / "users"), read_json(folder / "prepared.json")
        if "repeat_rate" not in fields:  # prepared by an older version
            fields["repeat_rate"] = repeat_rate(users["train"])
            fields["exclude_history"] = fields["repeat_rate"] <= RARE_REPEATS
        return cls(
            Dataset.load_from_disk(folder / "items"),
            users,
            DatasetDict.load_from_disk(folder / "samples"),
            SidCatalog.from_pretrained(folder / "catalog"),
            **fields,
            split_fields=read_json(folder / "interactions.json")["split_fields"],
            embeddings_file=folder / "embeddings.npy",
        )

    @staticmethod
    def file_hashes(folder: str | Path) -> dict[str, str]:
        """SHA-256 of the tables, the catalogue and the tokenizer in a folder, which a resumed run compares."""
        tables = ("items/data-*.arrow", "users/data-*.arrow", "samples/*/data-*.arrow")  # `**` does not follow links
        patterns = (*tables, "catalog/*", "tokenizer/*", "prepared.json")
        return {name: sha for pattern in patterns for name, sha in folder_hashes(folder, pattern).items()}

    @staticmethod
    def data_card(folder: str | Path) -> dict | None:
        """Content of the `data_card.json` of a folder, or `None` if it has none."""
        path = Path(folder, "data_card.json")
        return read_json(path) if path.exists() else None

    @cached_property
    def text_vectors(self) -> np.ndarray | None:
        """A vector `(I, D)` of each item's text, zeros for an item without text; `None` without vectors or text."""
        if self.embeddings_file is None or not self.embeddings_file.exists():
            return None
        has_text = np.any([[bool(text) for text in self.items[name]] for name in TEXT_FIELDS], axis=0)  # (I,)
        vectors = np.load(self.embeddings_file, allow_pickle=False)  # items without text have that of their id
        return vectors * has_text[:, None] if has_text.any() else None

    @cached_property
    def split(self) -> Split:
        """Training, validation and test items of each user."""
        return _to_split(self.users, self.split_fields)

    @cached_property
    def interactions(self) -> Interactions:
        """Items, and the whole histories of the users in the split, without timestamps."""
        return _to_interactions(self.items, self.split)

    def processor(self, tokenizer: PreTrainedTokenizerBase, instruction: str, max_history: int) -> LasarProcessor:
        """The [`LasarProcessor`] with these arguments; warns if `max_history` is larger than that of the samples."""
        if self.max_history is not None and max_history > self.max_history:
            warnings.warn(
                f"max_history is {max_history}, but the samples keep {self.max_history} history items; prepare the "
                f"data with max_history={max_history}.",
                stacklevel=2,
            )
        return LasarProcessor(tokenizer, self.catalog, instruction, max_history)

    def draw(self, part: str, users: int) -> Dataset:
        """Random samples of a part, at most `users`; always the same ones, in their order."""
        # In memory, since their indices would otherwise be written next to the samples.
        return self.samples[part].select(self.drawn(part, users), keep_in_memory=True)

    def drawn(self, part: str, users: int) -> np.ndarray:
        """Indices of the samples of [`PreparedData.draw`], `(at most users,)`."""
        return drawn(len(self.samples[part]), users)

    def check_catalog(self, catalog: SidCatalog, where: str) -> None:
        """Raise `ValueError` if the checkpoint `where` has a catalogue with other items or Semantic IDs."""
        if catalog.item_ids != self.catalog.item_ids or not catalog.codes.equal(self.catalog.codes):
            raise ValueError(
                f"The catalogue of {where} has other items or Semantic IDs than the prepared data; train again, or "
                "use the data that the checkpoint was trained on."
            )


def save_dataset(dataset: Dataset | DatasetDict, folder: Path) -> None:
    """Save to a folder, without the bars of progress, which appear however short it takes."""
    shows_progress = not are_progress_bars_disabled()
    disable_progress_bars()
    dataset.save_to_disk(folder)
    if shows_progress:
        enable_progress_bars()


def save_interactions(interactions: Interactions, split: Split, folder: str | Path) -> None:
    """Write `items/`, `users/` and `interactions.json` (fields of the split, and [`describe`]) to a folder."""
    folder = Path(folder)
    items = {"item_id": interactions.item_ids}
    items |= {name: [item.get(name, "") for item in interactions.items] for name in ITEM_FIELDS}
    save_dataset(Dataset.from_dict(items, features=Features(dict.fromkeys(items, Value("string")))), folder / "items")
    fields = dict(vars(split))
    users = {"user_id": fields.pop("user_ids")} | {part: fields.pop(part) for part in PARTS}
    features = {"user_id": Value("string")} | dict.fromkeys(PARTS, List(Value("int64")))
    save_dataset(Dataset.from_dict(users, features=Features(features)), folder / "users")
    description = describe(interactions, split)
    write_json(folder / "interactions.json", {"split_fields": fields, "description": description})


def load_interactions(folder: str | Path) -> tuple[Interactions, Split]:
    """Read what [`save_interactions`] wrote: the items with the histories of the users in the split, and the split."""
    folder = Path(folder)
    fields = read_json(folder / "interactions.json")["split_fields"]
    split = _to_split(Dataset.load_from_disk(folder / "users"), fields)
    return _to_interactions(Dataset.load_from_disk(folder / "items"), split), split


def _to_split(users: Dataset, fields: dict[str, Any]) -> Split:
    columns = users.data.to_pydict()
    return Split(columns.pop("user_id"), **columns, **fields)


def _to_interactions(items: Dataset, split: Split) -> Interactions:
    fields = [{name: item[name] for name in ITEM_FIELDS if item[name]} for item in items]
    histories = [[*chain(*parts)] for parts in zip(split.train, split.validation, split.test, strict=True)]
    return Interactions(list(items["item_id"]), fields, split.user_ids, histories)


def describe(interactions: Interactions, split: Split) -> dict[str, Any]:
    """
    The numbers of a data card, ready for JSON: sizes, the lengths and the order of histories, items without
    interactions or text, the parts of the split, `reader` (counts of the reader) and, with timestamps, the times of
    the first and last interaction and `tied_neighbours`, the share of neighbours in a history with equal times.
    """
    lengths = np.array([len(history) for history in interactions.histories])
    num_users, num_items = len(lengths), len(interactions.items)
    num_values = Counter(chain.from_iterable(interactions.items))
    card: dict[str, Any] = {
        "users": num_users,
        "items": num_items,
        "interactions": interactions.num_interactions,
        "density": interactions.num_interactions / (num_users * num_items),
        "history_length": {name: getattr(np, name)(lengths).item() for name in ("min", "median", "mean", "max")},
        "order": "as in the file, which has no times",
        "items_without_interactions": num_items - len(set(chain.from_iterable(interactions.histories))),
        "items_with": {name: num_values[name] for name in TEXT_FIELDS},
        "items_without_text": sum(not any(name in item for name in TEXT_FIELDS) for item in interactions.items),
    }
    if interactions.timestamps is not None:
        gaps = np.concatenate([np.diff(times) for times in interactions.timestamps])
        card["order"] = "by time; interactions of one user with equal times in the order of the reader's tie rule"
        card["time"] = {
            "first": min(times[0] for times in interactions.timestamps),
            "last": max(times[-1] for times in interactions.timestamps),
        }
        card["tied_neighbours"] = float((gaps == 0).mean()) if len(gaps) else 0.0
    if interactions.counts:
        card["reader"] = dict(interactions.counts)
    parts = {"kind": "leave-one-out", "users": len(split.user_ids), "users_skipped": split.num_skipped}
    if split.validation_from is not None:
        parts |= {"kind": "global time", "validation_from": split.validation_from, "test_from": split.test_from}
    return card | {"split": parts | {part: sum(map(len, getattr(split, part))) for part in PARTS}}
