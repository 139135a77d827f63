"""From an item to what its text says of its Semantic ID: how a catalogue was embedded, kept for items to come."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .embeddings import combine_views, item_text, text_embeddings
from .text_view import TfidfView


ENCODER_CONFIG_NAME = "item_encoder.json"


class ItemEncoder:
    """
    Text vectors of items that came after the catalogue was embedded, in the catalogue's space.

    A new item has no co-occurrence. Its vector has the columns of the text view, which come first in
    [`combine_views`], and [`~ResidualKMeans.first_columns`] makes a quantizer for these.

    Args:
        text_view ([`TfidfView`] or `str`):
            The fitted view, or the name or path of the sentence-transformers model.

    Example:

    ```python
    >>> encoder = ItemEncoder.from_pretrained("outputs/mine/data/item_encoder")
    >>> quantizer = ResidualKMeans.from_pretrained("outputs/mine/data/quantizer")
    >>> vectors = encoder.encode([{"title": "Hacksaw"}])
    >>> codes = assign_new_items(catalog.codes, quantizer.first_columns(vectors.shape[1]), vectors)
    ```
    """

    def __init__(self, text_view: TfidfView | str):
        self.text_view = text_view

    def encode(self, items: Sequence[dict]) -> np.ndarray:
        """
        Vectors of items.

        Args:
            items (`Sequence[dict]`):
                `N` items, see [`item_text`].

        Returns:
            `np.ndarray` of shape `(N, D)`, float32: rows of length 1, zero where the view knows no word of an item.
        """
        texts = [item_text(item) for item in items]
        if isinstance(self.text_view, TfidfView):
            return combine_views([self.text_view.transform(texts)])
        return combine_views([text_embeddings(texts, model=self.text_view)])

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """
        Write the text view, where there is one, and, last, `item_encoder.json`.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder, created if missing.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = folder / ENCODER_CONFIG_NAME
        settings.unlink(missing_ok=True)
        fitted = isinstance(self.text_view, TfidfView)
        if fitted:
            self.text_view.save_pretrained(folder)
        config = {"embedding_model": None if fitted else self.text_view}
        Path(f"{settings}.tmp").write_text(json.dumps(config) + "\n", encoding="utf-8")
        os.replace(f"{settings}.tmp", settings)

    @classmethod
    def from_pretrained(cls, save_directory: str | os.PathLike) -> "ItemEncoder":
        """
        Read an encoder that [`~ItemEncoder.save_pretrained`] wrote; it encodes exactly as before.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to read, `item_encoder` of a prepared data set for instance.

        Raises:
            `FileNotFoundError`: there is no encoder.
        """
        folder = Path(save_directory)
        if not (folder / ENCODER_CONFIG_NAME).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {ENCODER_CONFIG_NAME}: run recipes/prepare.py again, it writes one."
            )
        model = json.loads((folder / ENCODER_CONFIG_NAME).read_text(encoding="utf-8"))["embedding_model"]
        return cls(TfidfView.from_pretrained(folder) if model is None else model)
