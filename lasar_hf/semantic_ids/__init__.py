"""Semantic IDs: item text and training sequences → vectors → codes, one SID an item."""

import warnings

import numpy as np

from .collisions import assign_new_items, resolve_collisions
from .embeddings import collaborative_embeddings, combine_views, item_text, text_embeddings
from .item_encoder import ItemEncoder
from .quantizer import ResidualKMeans
from .report import format_report, quality_report
from .text_embedder import TfidfEmbedder
from .text_view import TfidfView


def build_semantic_ids(
    embeddings: np.ndarray,
    num_sid_levels: int = 4,
    codebook_size: int = 256,
    seed: int = 0,
    balanced: bool = False,
) -> tuple[np.ndarray, ResidualKMeans]:
    """
    Semantic IDs of a catalogue: fit, encode, resolve collisions.

    Args:
        embeddings (`np.ndarray` of shape `(I, D)`):
            Item vectors.
        num_sid_levels (`int`, *optional*, defaults to `4`):
            Number of levels `M`.
        codebook_size (`int`, *optional*, defaults to `256`):
            Codes a level, `K`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the quantizer.
        balanced (`bool`, *optional*, defaults to `False`):
            Whether the codes of a level are used equally often, see [`ResidualKMeans`].

    Returns:
        `tuple`: codes `(I, M)` int64, all rows different, and the fitted [`ResidualKMeans`], which encodes new items.
    """
    if codebook_size >= len(embeddings):
        warnings.warn(
            f"{len(embeddings)} items have {codebook_size} codes at the first level: each gets its own, and its other "
            "codes say nothing; lower codebook_size.",
            stacklevel=2,
        )
    quantizer = ResidualKMeans(num_sid_levels, codebook_size, seed=seed, balanced=balanced)
    codes = quantizer.fit_encode(embeddings)
    return resolve_collisions(codes, quantizer, embeddings), quantizer


__all__ = [
    "ItemEncoder",
    "ResidualKMeans",
    "TfidfEmbedder",
    "TfidfView",
    "assign_new_items",
    "build_semantic_ids",
    "collaborative_embeddings",
    "combine_views",
    "format_report",
    "item_text",
    "quality_report",
    "resolve_collisions",
    "text_embeddings",
]
