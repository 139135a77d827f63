"""Item vectors: text embeddings, a collaborative view from training sequences, and their combination."""

import functools
import os
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from .embedding_cache import cached_vectors
from .svd import truncated_svd
from .text_view import TfidfView


TEXT_FIELDS = ("title", "brand", "categories", "description")
ID_FIELDS = ("asin", "parent_asin", "item_id", "id")
WINDOW = 5  # co-occurrence reaches this many positions ahead; farther pairs carry little and cost memory
SHIFT = 1.0  # of the PMI, the "negative samples" of word2vec: 1 keeps every positive association, more keeps fewer
SMOOTHING = 0.75  # exponent on the context counts, so that rare contexts do not dominate


def _flatten(value: object) -> str:
    """Text of one field: strings as they are, lists and nested lists (as in Amazon metadata) joined by commas."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(part for part in map(_flatten, value) if part)
    return " ".join(str(value).split())


def item_text(item: dict) -> str:
    """
    Text of an item for embedding.

    Args:
        item (`dict`):
            Item with any of the keys `title`, `brand`, `categories`, `description`; values are strings or lists.

    Returns:
        `str`: The known fields in that order, joined by `". "`. An item without text is described by its id fields
        (`asin`, `parent_asin`, `item_id`, `id`); the result is empty only when these are missing too.
    """
    for fields in (TEXT_FIELDS, ID_FIELDS):
        parts = [text for text in (_flatten(item.get(field)) for field in fields) if text]
        if parts:
            return ". ".join(parts)
    return ""


def text_embeddings(
    texts: Sequence[str],
    dim: int = 256,
    seed: int = 0,
    model: str | None = None,
    batch_size: int = 64,
    cache_dir: str | os.PathLike | None = None,
) -> np.ndarray:
    """
    One vector a text.

    Args:
        texts (`Sequence[str]`):
            `I` texts, see [`item_text`].
        dim (`int`, *optional*, defaults to `256`):
            Width of the TF-IDF + SVD vectors. A sentence-transformers model keeps its own width.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the randomised SVD.
        model (`str`, *optional*):
            Name or path of a sentence-transformers model. `None` uses TF-IDF + truncated SVD, without any download,
            fitted to these texts; a [`TfidfView`] keeps the fit for later ones.
        batch_size (`int`, *optional*, defaults to `64`):
            Texts a batch of the sentence-transformers model.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Folder that keeps the vectors of the sentence-transformers model by content: a run that was killed goes on
            where it was, and texts that were embedded once are not embedded again. Nothing is kept if not given.

    Returns:
        `np.ndarray` of shape `(I, D)`, float32. With TF-IDF `D == dim`: when the texts have less variety than `dim`
        the last columns are zero.

    Raises:
        `ValueError`: `texts` is empty or holds something that is not a string.
        `ImportError`: `model` is given and sentence-transformers is not installed.
    """
    if not len(texts):
        raise ValueError("`texts` is empty: there is nothing to embed.")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"`texts` row {row} is {type(text).__name__}, expected str (see `item_text`).")
    if model is not None:
        return _sentence_embeddings(texts, model, batch_size, cache_dir)
    return TfidfView(dim, seed).fit_transform(texts)


def _sentence_embeddings(
    texts: Sequence[str], model: str, batch_size: int, cache_dir: str | os.PathLike | None
) -> np.ndarray:
    # Loaded once for all the parts of a catalogue, and not at all when the cache holds every text.
    encoder = functools.cache(lambda: _load_encoder(model))

    def embed(part: Sequence[str]) -> np.ndarray:
        vectors = encoder().encode(list(part), batch_size=batch_size, convert_to_numpy=True)
        return np.asarray(vectors, dtype=np.float32)

    return embed(texts) if cache_dir is None else cached_vectors(texts, model, embed, cache_dir)


def _load_encoder(model: str):
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"Embedding with {model!r} needs sentence-transformers: `pip install 'lasar_hf[embed]'`, or leave `model` "
            "unset for TF-IDF vectors."
        ) from error
    return SentenceTransformer(model)


def collaborative_embeddings(
    sequences: Sequence[Sequence[int]], num_items: int, dim: int = 128, seed: int = 0
) -> np.ndarray:
    """
    One vector an item from what users took together: windowed co-occurrence → shifted PPMI → truncated SVD.

    A pair of items at distance `δ ≤ 5` of one sequence counts `1/δ` in both directions. With `n_ij` these counts,

        PPMI_ij = max(0, log(n_ij / n_i) − log(n_j^0.75 / Σ_k n_k^0.75) − log(shift)),    n_i = Σ_j n_ij

    (Levy and Goldberg, 2014, with the context smoothing of Levy, Goldberg and Dagan, 2015).

    Args:
        sequences (`Sequence[Sequence[int]]`):
            Item row numbers of each user, oldest first. Pass TRAINING sequences only: a validation or test item in
            here leaks the target into the Semantic IDs.
        num_items (`int`):
            Number of items `I` of the catalogue.
        dim (`int`, *optional*, defaults to `128`):
            Width of the vectors.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the randomised SVD.

    Returns:
        `np.ndarray` of shape `(I, dim)`, float32. Items that never occur together with another one are zero rows.

    Raises:
        `ValueError`: a sequence holds an item outside `[0, num_items)`.
    """
    counts = _cooccurrence(sequences, num_items)
    out = np.zeros((num_items, dim), dtype=np.float32)
    if counts.nnz == 0:
        return out
    total = np.asarray(counts.sum(axis=1)).ravel()
    context = total**SMOOTHING
    context /= context.sum()
    pairs = counts.tocoo()
    pmi = np.log(pairs.data / (total[pairs.row] * context[pairs.col])) - np.log(SHIFT)
    positive = pmi > 0
    ppmi = sparse.csr_matrix((pmi[positive], (pairs.row[positive], pairs.col[positive])), shape=(num_items, num_items))
    seen = total > 0
    out[seen] = truncated_svd(ppmi, dim, seed)[0][seen]
    return out


def _cooccurrence(sequences: Sequence[Sequence[int]], num_items: int) -> sparse.csr_matrix:
    """Symmetric `(I, I)` counts, `1/distance` for each pair of different items at most `WINDOW` positions apart."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    flat = np.fromiter((item for sequence in sequences for item in sequence), dtype=np.int64, count=lengths.sum())
    user = np.repeat(np.arange(len(lengths)), lengths)
    wrong = np.flatnonzero((flat < 0) | (flat >= num_items))
    if wrong.size:
        place = wrong[0]
        raise ValueError(
            f"`sequences` row {user[place]} holds item {flat[place]}, outside the {num_items} items of the catalogue."
        )
    counts = sparse.csr_matrix((num_items, num_items), dtype=np.float64)
    for distance in range(1, WINDOW + 1):
        first, second = flat[:-distance], flat[distance:]
        together = (user[:-distance] == user[distance:]) & (first != second)
        weight = np.full(together.sum(), 1.0 / distance)
        counts += sparse.csr_matrix((weight, (first[together], second[together])), shape=counts.shape)
    return (counts + counts.T).tocsr()


def combine_views(views: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """
    Several embeddings of the same items as one: each row scaled to length 1 a view, times the view's weight, then
    concatenated.

    Args:
        views (`Sequence[np.ndarray]`):
            Arrays of shape `(I, D_v)`. Zero rows (an item the view knows nothing about) stay zero.
        weights (`Sequence[float]`, *optional*):
            One weight a view; a squared distance weighs the views by their squares. Defaults to 1 for each.

    Returns:
        `np.ndarray` of shape `(I, Σ D_v)`, float32.

    Raises:
        `ValueError`: no view, a view of another number of rows, or another number of weights than views.
    """
    if not len(views):
        raise ValueError("`views` is empty: give at least one embedding.")
    weights = [1.0] * len(views) if weights is None else list(weights)
    if len(weights) != len(views):
        raise ValueError(f"`weights` has {len(weights)} entries for {len(views)} views.")
    scaled = []
    for number, (view, weight) in enumerate(zip(views, weights, strict=True)):
        if view.ndim != 2 or len(view) != len(views[0]):
            raise ValueError(f"`views` number {number} has shape {view.shape}, expected ({len(views[0])}, D).")
        norm = np.linalg.norm(view, axis=1, keepdims=True)
        scaled.append(np.divide(view * weight, norm, out=np.zeros(view.shape), where=norm > 0))
    return np.concatenate(scaled, axis=1).astype(np.float32)
