"""Item vectors: text embeddings, co-occurrence in training sequences, and the combination of both."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

from ..data.interactions import ID_FIELDS
from ..files import atomic_file
from .text_embedder import TfidfEmbedder


# Fields in the order of the text. The description comes last because models truncate long texts.
ITEM_TEXT_FIELDS = ("title", "brand", "categories", "description")
FALLBACK_FIELDS = (*ID_FIELDS, "item_id", "id")  # used if an item has no text

BATCH_SIZE = 64  # texts per batch of a sentence-transformers model
CACHE_BATCH = 256  # texts embedded between two writes of the cache; a killed run loses at most one batch

WINDOW = 5  # pairs of items up to this distance count; farther pairs carry little and cost memory
SMOOTHING = 0.75  # exponent on the context counts, so that rare contexts do not dominate


def item_text(item: dict) -> str:
    """
    Text of an item for embedding: its `title`, `brand`, `categories` and `description`, joined by `". "`.

    Empty fields are left out. Values are strings or (nested) lists of strings, as in Amazon's metadata. For an item
    without text, the result is its ids (`asin`, `parent_asin`, `item_id`, `id`), or empty if it has none either.
    """
    for fields in (ITEM_TEXT_FIELDS, FALLBACK_FIELDS):
        parts = [text for text in (_flatten(item.get(field)) for field in fields) if text]
        if parts:
            return ". ".join(parts)
    return ""


def _flatten(value: object) -> str:
    """Text of one field; parts of lists are joined by commas."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(part for part in map(_flatten, value) if part)
    return " ".join(str(value).split())


def text_embeddings(
    texts: Sequence[str],
    dim: int = 256,
    seed: int = 0,
    model: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> np.ndarray:
    """
    One vector per text, from a sentence-transformers model or from [`TfidfEmbedder`].

    Args:
        texts (`Sequence[str]`):
            `I` texts, at least one; see [`item_text`].
        dim, seed:
            As for [`TfidfEmbedder`]. A sentence-transformers model has its own width.
        model (`str`, *optional*):
            Name or path of a sentence-transformers model; `name@revision` takes a branch, tag or commit of the Hub.
            If not given, a [`TfidfEmbedder`] is fitted to the texts, without any download.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Folder that stores the vectors of the sentence-transformers model by text. A killed run resumes from it,
            and if the catalogue grows, only new texts are embedded. One run at a time may write to it. The cache does
            not notice if the weights change under the same model name.

    Returns:
        `np.ndarray` of shape `(I, D)`, float32. With TF-IDF, `D` is `dim`.

    Raises:
        `ImportError`: `model` is given and sentence-transformers is not installed.
    """
    if not len(texts):
        raise ValueError("texts is empty; expected at least one text.")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts row {row} is {type(text).__name__}; expected str (see item_text).")
    if model is None:
        return TfidfEmbedder(dim, seed).fit_transform(texts)
    return _load_encoder(model)(texts) if cache_dir is None else _cached_vectors(texts, model, Path(cache_dir))


def _load_encoder(model: str) -> Callable[[Sequence[str]], np.ndarray]:
    """A function from texts to vectors `(I, D)`, float32."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"Embedding with {model!r} needs sentence-transformers; run `pip install 'lasar_hf[embed]'`, or leave "
            "model unset for TF-IDF vectors."
        ) from error
    name, _, revision = (model, "", "") if os.path.exists(model) else model.partition("@")
    options: dict[str, Any] = {"revision": revision} if revision else {}
    encode = SentenceTransformer(name, **options).encode
    return lambda texts: np.asarray(encode(list(texts), batch_size=BATCH_SIZE), dtype=np.float32)


def _cached_vectors(texts: Sequence[str], model: str, folder: Path) -> np.ndarray:
    """Embed the texts that are missing from the cache: `.npy` files of (SHA-256 of model and text, vector)."""
    keys = [hashlib.sha256(f"{model}\0{text}".encode("utf-8", "surrogatepass")).digest() for text in texts]
    missing = dict(zip(keys, texts, strict=True))
    vectors: dict[bytes, np.ndarray] = {}
    # 1. Read the vectors that are needed. Names with a leading dot are unfinished files of a killed run.
    for path in sorted(folder.glob("[!.]*.npy")):
        records = np.load(path, mmap_mode="r")
        for key, vector in zip(records["key"].tolist(), records["vector"], strict=True):
            if missing.pop(key, None) is not None:
                vectors[key] = vector
    # 2. Embed the rest in batches and store each batch.
    pending = list(missing)
    encode = _load_encoder(model) if pending else None
    for start in range(0, len(pending), CACHE_BATCH):
        batch = pending[start : start + CACHE_BATCH]
        new_vectors = encode([missing[key] for key in batch])  # (B, D)
        vectors.update(zip(batch, new_vectors, strict=True))
        records = np.empty(len(batch), dtype=[("key", "V32"), ("vector", "<f4", new_vectors.shape[1:])])
        records["key"], records["vector"] = np.array(batch, dtype="V32"), new_vectors
        with atomic_file(folder / f"{hashlib.sha256(b''.join(batch)).hexdigest()[:16]}.npy") as temporary:
            np.save(temporary, records)
    return np.stack([vectors[key] for key in keys])


def collaborative_embeddings(
    sequences: Sequence[Sequence[int]], num_items: int, dim: int = 128, seed: int = 0
) -> np.ndarray:
    """
    One vector per item from co-occurrence in user histories: windowed counts, PPMI, truncated SVD.

    A pair of items at distance `δ ≤ 5` in a sequence counts `1/δ` in both directions. With these counts `n_ij`,

        PPMI_ij = max(0, log(n_ij / n_i) − log(n_j^0.75 / Σ_k n_k^0.75)),    n_i = Σ_j n_ij

    (Levy and Goldberg, 2014, with the context smoothing of Levy, Goldberg and Dagan, 2015).

    Args:
        sequences (`Sequence[Sequence[int]]`):
            Item indices of each user, oldest first. Pass TRAINING sequences only: validation or test items would leak
            the targets into the Semantic IDs.
        num_items (`int`):
            Number of items `I` of the catalogue.
        dim, seed (`int`, *optional*, default to `128` and `0`):
            Width of the vectors, and seed of the randomised SVD.

    Returns:
        `np.ndarray` of shape `(I, dim)`, float32. An item that never occurs together with another has a zero row.
    """
    # 1. Count pairs.
    counts = _cooccurrence(sequences, num_items)  # (I, I) sparse
    vectors = np.zeros((num_items, dim), dtype=np.float32)
    if counts.nnz == 0:
        return vectors
    # 2. Turn counts into positive PMI.
    total = np.asarray(counts.sum(axis=1)).ravel()  # (I,)
    context = total**SMOOTHING
    context /= context.sum()
    pairs = counts.tocoo()
    pmi = np.log(pairs.data / (total[pairs.row] * context[pairs.col]))
    ppmi = sparse.csr_matrix((np.maximum(pmi, 0), (pairs.row, pairs.col)), shape=counts.shape)
    # 3. Reduce. Rows of items without a pair are set to exactly zero.
    width = min(dim, num_items)
    vectors[:, :width] = TruncatedSVD(width, random_state=seed).fit_transform(ppmi)
    vectors[total == 0] = 0
    return vectors


def _cooccurrence(sequences: Sequence[Sequence[int]], num_items: int) -> sparse.csr_matrix:
    """Symmetric counts `(I, I)`: `1/distance` for each pair of different items at most `WINDOW` positions apart."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    items = np.fromiter((item for sequence in sequences for item in sequence), dtype=np.int64, count=lengths.sum())
    user = np.repeat(np.arange(len(lengths)), lengths)
    wrong = np.flatnonzero((items < 0) | (items >= num_items))
    if wrong.size:
        row, item = user[wrong[0]], items[wrong[0]]
        raise ValueError(f"sequences row {row} contains item {item}; expected 0 to {num_items - 1}.")
    counts = sparse.csr_matrix((num_items, num_items), dtype=np.float64)
    for distance in range(1, WINDOW + 1):
        first, second = items[:-distance], items[distance:]
        paired = (user[:-distance] == user[distance:]) & (first != second)
        weight = np.full(paired.sum(), 1.0 / distance)
        counts += sparse.csr_matrix((weight, (first[paired], second[paired])), shape=counts.shape)
    return (counts + counts.T).tocsr()


def combine_views(views: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """
    Concatenate several embeddings of the same items, each scaled to rows of length 1 and multiplied by its weight.

    Args:
        views (`Sequence[np.ndarray]`):
            Arrays of shape `(I, D_v)`, at least one. Zero rows (items unknown to a view) stay zero.
        weights (`Sequence[float]`, *optional*):
            One weight per view, 1 if not given. Squared distances weight the views by the squares.

    Returns:
        `np.ndarray` of shape `(I, Σ D_v)`, float32.
    """
    if not len(views):
        raise ValueError("views is empty; expected at least one embedding.")
    weights = [1.0] * len(views) if weights is None else list(weights)
    if len(weights) != len(views):
        raise ValueError(f"weights has {len(weights)} entries; expected {len(views)}, one per view.")
    scaled = []
    for number, (view, weight) in enumerate(zip(views, weights, strict=True)):
        if view.ndim != 2 or len(view) != len(views[0]):
            raise ValueError(f"views number {number} has shape {view.shape}; expected ({len(views[0])}, D).")
        norm = np.linalg.norm(view, axis=1, keepdims=True)
        scaled.append(np.divide(view * weight, norm, out=np.zeros(view.shape), where=norm > 0))
    return np.concatenate(scaled, axis=1).astype(np.float32)
