"""Semantic anchors (METHOD.md, section 4): the stage-1 backbone's hidden state of each reasoning segment, on disk."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..files import write_json


class AnchorStore:
    """
    Anchors of each sample: `store[i]` is `(N_i, H)`, one row a segment, in order.

    Equal segments share one stored vector, so the repetition of a template teacher costs nothing.

    Args:
        vectors (`np.ndarray`):
            Distinct anchors `(U, H)`, float32; may be memory-mapped.
        index (`np.ndarray`):
            Row of `vectors` of each segment, all samples after each other, `(sum of N_i,)`, int64.
        offsets (`np.ndarray`):
            Where each sample begins in `index`, `(samples + 1,)`, int64.
        checkpoint_hash (`str`):
            `checkpoint_hash` of the model that made the vectors.
        inputs_hash (`str`, *optional*, defaults to `""`):
            Hash of all that `encode_anchors` was given, the checkpoint included.
    """

    def __init__(
        self, vectors: np.ndarray, index: np.ndarray, offsets: np.ndarray, checkpoint_hash: str, inputs_hash: str = ""
    ):
        if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(index) or (np.diff(offsets) < 1).any():
            raise ValueError("`offsets` must go from 0 to the number of segments, with one or more a sample.")
        if len(index) and not 0 <= index.min() <= index.max() < len(vectors):
            raise ValueError(f"`index` goes from {index.min()} to {index.max()}, for {len(vectors)} vectors.")
        self.vectors = vectors
        self.index = index
        self.offsets = offsets
        self.checkpoint_hash = checkpoint_hash
        self.inputs_hash = inputs_hash

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, sample: int) -> np.ndarray:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} has no anchors: the store holds {len(self)} samples.")
        return np.asarray(self.vectors[self.index[self.offsets[sample] : self.offsets[sample + 1]]])

    @property
    def depths(self) -> np.ndarray:
        """Number of segments of each sample: its depth label `N`, `(samples,)`."""
        return np.diff(self.offsets)

    def save(self, folder: str | Path) -> None:
        """
        Write `vectors.npy`, `index.npy`, `offsets.npy` and, last, `anchors.json`, each under a temporary name first: a
        folder in which writing was cut short has no `anchors.json` and is refused by `load`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "anchors.json").unlink(missing_ok=True)
        scratch = folder / "vectors.npy.partial"
        with scratch.open("wb") as file:
            np.save(file, self.vectors, allow_pickle=False)
        os.replace(scratch, folder / "vectors.npy")
        self.save_index(folder)

    def save_index(self, folder: Path) -> None:
        """Write all but `vectors.npy`; its part of `save`."""
        for name in ("index", "offsets"):
            scratch = folder / f"{name}.npy.partial"
            with scratch.open("wb") as file:
                np.save(file, getattr(self, name), allow_pickle=False)
            os.replace(scratch, folder / f"{name}.npy")
        facts = {
            "checkpoint_hash": self.checkpoint_hash,
            "inputs_hash": self.inputs_hash,
            "hidden_size": self.vectors.shape[1],
            "num_vectors": len(self.vectors),
            "num_segments": len(self.index),
            "num_samples": len(self),
        }
        write_json(folder / "anchors.json", facts)

    @classmethod
    def load(cls, folder: str | Path, checkpoint_hash: str) -> "AnchorStore":
        """
        Open a saved store; the vectors stay on disk, memory-mapped.

        Args:
            folder (`str` or `Path`):
                Where `save` wrote.
            checkpoint_hash (`str`):
                `checkpoint_hash` of the stage-1 model at hand.

        Raises:
            FileNotFoundError: no store there, or one whose writing was cut short.
            ValueError: the anchors were made by another checkpoint, or the files do not belong together.
        """
        folder = Path(folder)
        path = folder / "anchors.json"
        if not path.exists():
            raise FileNotFoundError(f"{folder} holds no complete anchors (no anchors.json): make them first.")
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["checkpoint_hash"] != checkpoint_hash:
            raise ValueError(
                f"{folder}: stale anchors, made by checkpoint {facts['checkpoint_hash'][:12]} and not by "
                f"{checkpoint_hash[:12]}; make them again with the stage-1 checkpoint at hand."
            )
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("vectors", "index", "offsets")}
        store = cls(**arrays, checkpoint_hash=checkpoint_hash, inputs_hash=facts.get("inputs_hash", ""))
        if store.vectors.shape != (facts["num_vectors"], facts["hidden_size"]) or len(store) != facts["num_samples"]:
            raise ValueError(f"{folder}: the arrays do not have the sizes in anchors.json; make the anchors again.")
        return store


def checkpoint_hash(model: nn.Module) -> str:
    """
    SHA-256 over names, types, shapes and bytes of a model's state: equal for equal weights of one precision.

    Args:
        model (`nn.Module`):
            The stage-1 model.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
