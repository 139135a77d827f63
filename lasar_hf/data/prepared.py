"""What `recipes/prepare.py` leaves behind: items with their Semantic IDs, samples of each split, chains of thought."""

import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict

from .interactions import Interactions
from .splits import Split


ITEM_FIELDS = ("title", "description", "brand", "categories")


@dataclass(frozen=True)
class PreparedData:
    """
    A data set ready for training.

    Args:
        items (`Dataset`):
            One row an item: `item_id` (`str`), `title`, `description`, `brand`, `categories` (`str`, empty when unknown),
            `codes` (list of `M` ints).
        samples (`DatasetDict`):
            `train`, `validation` and `test` with the columns `user_id` (`str`), `history` (item rows, oldest first) and
            `target` (item row); `train` also has `chain_of_thought` (`str`) and `segments` (list of `str`, as many as the
            sample's depth label).
        codebook_size (`int`):
            Codes a level, `K`; not every code need be in use.
    """

    items: Dataset
    samples: DatasetDict
    codebook_size: int

    @cached_property
    def codes(self) -> np.ndarray:
        """Semantic IDs `(I, M)`, int64."""
        return np.asarray(self.items["codes"], dtype=np.int64)

    @cached_property
    def item_ids(self) -> list[str]:
        """Public id of each item row."""
        return list(self.items["item_id"])

    @cached_property
    def split(self) -> Split:
        """Training sequences and held-out items of each user, rebuilt from the samples."""
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
        test = self.samples["test"]
        fields = [
            {field: value for field, value in item.items() if field in ITEM_FIELDS and value} for item in self.items
        ]
        histories = [[*history, target] for history, target in zip(test["history"], test["target"], strict=True)]
        return Interactions(self.item_ids, fields, list(test["user_id"]), histories)

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
        Write `items/`, `samples/` and, last, `prepared.json`, each whole or not at all.

        Args:
            folder (`str` or `Path`):
                Folder, created if missing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prepared.json").unlink(missing_ok=True)
        for name, table in (("items", self.items), ("samples", self.samples)):
            partial = folder / f".{name}.tmp"
            shutil.rmtree(partial, ignore_errors=True)
            table.save_to_disk(partial)
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(partial, folder / name)
        partial = folder / ".prepared.json.tmp"
        partial.write_text(json.dumps({"codebook_size": self.codebook_size}) + "\n", encoding="utf-8")
        os.replace(partial, folder / "prepared.json")

    @classmethod
    def load(cls, folder: str | Path) -> "PreparedData":
        """
        Open what [`~PreparedData.save`] wrote, memory-mapped.

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
        return cls(items, samples, **facts)


def _as_text(value: str | list | None) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")
