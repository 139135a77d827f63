"""Embeds items that are added later in the space of the existing catalogue, and gives them free Semantic IDs."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..files import read_json, write_json
from .collisions import separate
from .embeddings import combine_views, item_text, text_embeddings
from .quantizer import Quantizer, check_codes
from .text_embedder import TfidfEmbedder


CONFIG_NAME = "item_encoder.json"


class ItemEncoder:
    """
    Text vectors of new items, in the space of a catalogue that is already embedded.

    A new item has no co-occurrence with others. Its vector has only the columns of the text view, which are the first
    in [`combine_views`]; [`~ResidualKMeans.first_columns`] gives a quantizer for them.

    Args:
        text_view ([`TfidfEmbedder`] or `str`):
            The fitted embedder, or the name or path of a sentence-transformers model.

    Example:

    ```python
    >>> encoder = ItemEncoder.from_pretrained("outputs/mine/data/item_encoder")
    >>> quantizer = ResidualKMeans.from_pretrained("outputs/mine/data/quantizer")
    >>> vectors = encoder.encode([{"title": "Hacksaw"}])
    >>> codes = assign_new_items(catalog.codes, quantizer.first_columns(vectors.shape[1]), vectors)
    ```
    """

    def __init__(self, text_view: TfidfEmbedder | str):
        self.text_view = text_view

    def encode(self, items: Sequence[dict]) -> np.ndarray:
        """Embed `N` items, see [`item_text`]: `(N, D)`, float32, of length 1, or zero without a known word."""
        texts = [item_text(item) for item in items]
        if isinstance(self.text_view, TfidfEmbedder):
            return combine_views([self.text_view.transform(texts)])
        return combine_views([text_embeddings(texts, model=self.text_view)])

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the fitted embedder, if there is one, and `item_encoder.json` into a folder, created if missing."""
        model = None if isinstance(self.text_view, TfidfEmbedder) else self.text_view
        if model is None:
            self.text_view.save_pretrained(save_directory)
        write_json(Path(save_directory) / CONFIG_NAME, {"embedding_model": model})

    @classmethod
    def from_pretrained(cls, save_directory: str | os.PathLike) -> "ItemEncoder":
        """Load an encoder that [`~ItemEncoder.save_pretrained`] wrote; its vectors are exactly the same."""
        path = Path(save_directory) / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found; run recipes/prepare.py again to write it.")
        model = read_json(path)["embedding_model"]
        return cls(TfidfEmbedder.from_pretrained(save_directory) if model is None else model)


def assign_new_items(existing_codes: np.ndarray, quantizer: Quantizer, x_new: np.ndarray) -> np.ndarray:
    """
    Give new items free Semantic IDs near their vectors. The quantizer is not refitted and no existing item moves.

    Args:
        existing_codes (`np.ndarray` of shape `(I, M)`):
            Codes of the existing items, without duplicate rows.
        quantizer ([`Quantizer`]):
            Their quantizer.
        x_new (`np.ndarray` of shape `(N, D)`):
            Vectors of the new items from the same embedding model; `N` may be 0, and `I + N` at most `K^M`.

    Returns:
        `np.ndarray` of shape `(N, M)`, int64.
    """
    existing = check_codes(existing_codes, "existing_codes", quantizer, min_length=quantizer.num_sid_levels)
    if len(np.unique(existing, axis=0)) < len(existing):
        raise ValueError("existing_codes has equal rows; call resolve_collisions first.")
    if not len(x_new):
        return np.empty((0, quantizer.num_sid_levels), dtype=np.int64)
    return separate(quantizer.encode(x_new), existing, quantizer, np.asarray(x_new))
