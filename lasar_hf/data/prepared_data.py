"""What `recipes/prepare.py` leaves behind: items with their Semantic IDs, samples of each split, chains of thought."""

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from ..files import write_json
from ..model.catalog_lasar import SidCatalog
from ..model.processing_lasar import LasarProcessor
from .interactions import ID_FIELDS, TEXT_FIELDS, Interactions
from .splits import Split, TimeSplit
from .storage import load_split, save_split


ITEM_FIELDS = TEXT_FIELDS + ID_FIELDS


@dataclass(frozen=True)
class PreparedData:
    """
    A data set ready for training.

    Args:
        items (`Dataset`):
            One row an item: `item_id` (`str`); `title`, `description`, `brand`, `categories`, `asin`, `parent_asin`
            (`str`, empty when unknown); `codes` (list of `M` ints).
        samples (`DatasetDict`):
            `train`, `validation` and `test` with the columns `user_id` (`str`), `history` (item rows, oldest first)
            and `target` (item row); `train` also has `chain_of_thought` (`str`) and `segments` (list of `str`, as many
            as the sample's depth label).
        codebook_size (`int`):
            Codes a level, `K`; not every code need be in use.
        stored_split (`Split` or `TimeSplit`, *optional*):
            What the samples were made of. A leave-one-out split is rebuilt from the samples if not given.
        max_history (`int`, *optional*):
            Newest items of a history that the samples keep; all if not given.
    """

    items: Dataset
    samples: DatasetDict
    codebook_size: int
    stored_split: Split | TimeSplit | None = None
    max_history: int | None = None

    @cached_property
    def codes(self) -> np.ndarray:
        """Semantic IDs `(I, M)`, int64."""
        return np.asarray(self.items["codes"], dtype=np.int64)

    @cached_property
    def catalog(self) -> SidCatalog:
        """The items with their Semantic IDs and titles."""
        return SidCatalog(self.codes, self.item_ids, allow_collisions=True, titles=self.items["title"])

    @cached_property
    def item_ids(self) -> list[str]:
        """Public id of each item row."""
        return list(self.items["item_id"])

    @cached_property
    def split(self) -> Split | TimeSplit:
        """Training sequences and held-out items of each user."""
        if self.stored_split is not None:
            return self.stored_split
        validation, test = self.samples["validation"], self.samples["test"]
        return Split(
            user_ids=list(validation["user_id"]),
            train=[list(history) for history in validation["history"]],
            validation=list(validation["target"]),
            test=list(test["target"]),
        )

    @cached_property
    def interactions(self) -> Interactions:
        """Items and whole histories of the users that were kept."""
        fields = [
            {field: value for field, value in item.items() if field in ITEM_FIELDS and value} for item in self.items
        ]
        split = self.split
        if isinstance(split, Split):
            held_out = zip(split.validation, split.test, strict=True)
        else:
            held_out = ([*one, *other] for one, other in zip(split.validation, split.test, strict=True))
        histories = [[*train, *rest] for train, rest in zip(split.train, held_out, strict=True)]
        return Interactions(self.item_ids, fields, split.user_ids, histories)

    def processor(self, tokenizer: PreTrainedTokenizerBase, instruction: str, max_history: int) -> LasarProcessor:
        """
        Prompts of the samples; warns where they are to show more of a history than the samples keep.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer with the SID and control tokens.
            instruction (`str`):
                Text before the history.
            max_history (`int`):
                Most items of a history that are shown.

        Returns:
            [`LasarProcessor`].
        """
        if self.max_history is not None and max_history > self.max_history:
            warnings.warn(
                f"max_history is {max_history}, but the samples keep {self.max_history} items of a history: prepare "
                f"with max_history={max_history} to show more.",
                stacklevel=2,
            )
        return LasarProcessor(tokenizer, self.catalog, instruction, max_history)

    def check_catalog(self, item_ids: list[str], codes, source: str) -> None:
        """
        Check that a checkpoint's catalogue is this data's: the same items with the same Semantic IDs.

        Args:
            item_ids (`list[str]`):
                Item ids of the catalogue.
            codes (array of shape `(I, M)`):
                Its Semantic IDs.
            source (`str`):
                Where the catalogue lies, for the message.

        Raises:
            `ValueError`: if they differ.
        """
        if list(item_ids) != self.item_ids or not np.array_equal(np.asarray(codes), self.codes):
            raise ValueError(
                f"The catalogue in {source} holds other items or other Semantic IDs than the prepared data: train "
                "again on this data, or name the data that the checkpoint was trained on."
            )

    @staticmethod
    def item_table(interactions: Interactions, codes: np.ndarray) -> Dataset:
        """
        The `items` of a prepared data set.

        Args:
            interactions ([`Interactions`]):
                The items' ids and text.
            codes (`np.ndarray` of shape `(I, M)`):
                Their Semantic IDs.

        Returns:
            `Dataset`: see [`PreparedData`].
        """
        columns = {"item_id": interactions.item_ids}
        for field in ITEM_FIELDS:
            columns[field] = [_as_text(item.get(field)) for item in interactions.items]
        return Dataset.from_dict({**columns, "codes": codes.tolist()})

    def save(self, folder: str | Path) -> None:
        """
        Write `items/`, `samples/`, `split/` and, last, `prepared.json`, each whole or not at all.

        Args:
            folder (`str` or `Path`):
                Folder, created if missing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prepared.json").unlink(missing_ok=True)
        writers = {"items": self.items.save_to_disk, "samples": self.samples.save_to_disk}
        if self.stored_split is not None:
            writers["split"] = partial(save_split, self.stored_split)
        for name in ("items", "samples", "split"):
            scratch = folder / f".{name}.tmp"
            shutil.rmtree(scratch, ignore_errors=True)
            if name in writers:
                writers[name](scratch)
            shutil.rmtree(folder / name, ignore_errors=True)
            if name in writers:
                os.replace(scratch, folder / name)
        facts = {"codebook_size": self.codebook_size, "max_history": self.max_history}
        write_json(folder / "prepared.json", facts)

    @classmethod
    def load(cls, folder: str | Path) -> "PreparedData":
        """
        Open what [`~PreparedData.save`] or `recipes/prepare.py` wrote, memory-mapped.

        Args:
            folder (`str` or `Path`):
                The folder.

        Raises:
            `FileNotFoundError`: if there is no prepared data.
        """
        folder = Path(folder)
        if not (folder / "prepared.json").exists():
            raise FileNotFoundError(
                f"{folder} holds no complete prepared data: run recipes/prepare.py with output_dir={folder}."
            )
        facts = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        items, samples = Dataset.load_from_disk(folder / "items"), DatasetDict.load_from_disk(folder / "samples")
        split = load_split(folder / "split") if (folder / "split").exists() else None
        return cls(items, samples, **facts, stored_split=split)


def _as_text(value: str | list | None) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")
