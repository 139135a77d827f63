"""Vectors of texts on disk, found by content: a killed run goes on, and a grown catalogue embeds what is new."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np


SHARD = 256  # texts embedded between two writes: what a kill costs at most, under a minute on a slow CPU


def cached_vectors(
    texts: Sequence[str], model: str, embed: Callable[[list[str]], np.ndarray], folder: str | os.PathLike
) -> np.ndarray:
    """
    Vectors of texts, from the cache where they are in it, else embedded and put there.

    The cache is a folder of shards, `.npy` files of records `(key, vector)`; a key is the SHA-256 of model and text.
    A shard appears whole or not at all. One run at a time may write to the folder.

    Args:
        texts (`Sequence[str]`):
            `I` texts; equal ones are embedded once.
        model (`str`):
            Name of the model. The cache cannot see weights that change under the same name: delete it then.
        embed (`Callable[[list[str]], np.ndarray]`):
            From at most 256 texts to as many vectors of width `D`; not called when every text is known.
        folder (`str` or `os.PathLike`):
            The cache, made if missing.

    Returns:
        `np.ndarray` of shape `(I, D)`, float32.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(".*.partial"):  # of a run that was killed
        path.unlink()
    keys = [hashlib.sha256(f"{model}\0{text}".encode("utf-8", "surrogatepass")).digest() for text in texts]
    missing = dict(zip(keys, texts, strict=True))
    found: dict[bytes, np.ndarray] = {}
    for path in sorted(folder.glob("*.npy")):
        shard = np.load(path, mmap_mode="r")
        known = zip(shard["key"].tolist(), shard["vector"], strict=True)
        found.update((key, vector) for key, vector in known if missing.pop(key, None) is not None)
    left = list(missing)
    for start in range(0, len(left), SHARD):
        part = left[start : start + SHARD]
        vectors = np.asarray(embed([missing[key] for key in part]), dtype=np.float32)
        _write(folder, part, vectors)
        found.update(zip(part, vectors, strict=True))
    return np.stack([found[key] for key in keys])


def _write(folder: Path, keys: list[bytes], vectors: np.ndarray) -> None:
    shard = np.empty(len(keys), dtype=[("key", "V32"), ("vector", "<f4", vectors.shape[1:])])
    shard["key"], shard["vector"] = np.array(keys, dtype="V32"), vectors
    name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
    partial = folder / f".{name}.partial"
    with partial.open("wb") as file:
        np.save(file, shard)
    os.replace(partial, folder / f"{name}.npy")
