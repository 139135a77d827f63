"""Semantic IDs: item text and training sequences → vectors → codes, with one Semantic ID per item."""

import warnings

import numpy as np

from .collisions import resolve_collisions
from .embeddings import collaborative_embeddings, combine_views, item_text, text_embeddings
from .new_items import ItemEncoder, assign_new_items
from .quantizer import Quantizer, ResidualKMeans, load_quantizer
from .report import format_report, quality_report
from .text_embedder import TfidfEmbedder


def build_semantic_ids(
    vectors: np.ndarray,
    num_sid_levels: int = 4,
    codebook_size: int = 256,
    seed: int = 0,
    quantizer: Quantizer | None = None,
) -> tuple[np.ndarray, Quantizer]:
    """
    Semantic IDs of a catalogue: fit a quantizer, encode, resolve collisions.

    Args:
        vectors (`np.ndarray` of shape `(I, D)`):
            Item vectors.
        num_sid_levels, codebook_size, seed:
            As for [`ResidualKMeans`]; ignored with `quantizer`.
        quantizer ([`Quantizer`], *optional*):
            Quantizer to fit instead of a new [`ResidualKMeans`].

    Returns:
        `tuple`: codes of shape `(I, M)`, int64, without duplicate rows, and the fitted quantizer, which also encodes
        new items.

    Example:

    ```python
    >>> import numpy as np
    >>> from lasar_hf.semantic_ids import build_semantic_ids

    >>> vectors = np.random.default_rng(0).normal(size=(100, 16))
    >>> codes, quantizer = build_semantic_ids(vectors, num_sid_levels=3, codebook_size=8)
    >>> codes.shape
    (100, 3)
    ```
    """
    if quantizer is None:
        quantizer = ResidualKMeans(num_sid_levels, codebook_size, seed)
    if quantizer.codebook_size >= len(vectors):
        warnings.warn(
            f"codebook_size is {quantizer.codebook_size} for {len(vectors)} items, so each item has a first code of "
            "its own and the other codes carry no information; lower codebook_size.",
            stacklevel=2,
        )
    codes = quantizer.fit_encode(vectors)
    return resolve_collisions(codes, quantizer, vectors), quantizer


__all__ = [
    "ItemEncoder",
    "Quantizer",
    "ResidualKMeans",
    "TfidfEmbedder",
    "assign_new_items",
    "build_semantic_ids",
    "collaborative_embeddings",
    "combine_views",
    "format_report",
    "item_text",
    "load_quantizer",
    "quality_report",
    "resolve_collisions",
    "text_embeddings",
]
