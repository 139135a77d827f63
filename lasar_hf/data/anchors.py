"""Semantic anchors (METHOD.md, section 4): the stage-1 backbone's hidden state of each reasoning segment, on disk."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase


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
    """

    def __init__(self, vectors: np.ndarray, index: np.ndarray, offsets: np.ndarray, checkpoint_hash: str):
        if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(index) or (np.diff(offsets) < 1).any():
            raise ValueError("`offsets` must go from 0 to the number of segments, with one or more a sample.")
        if len(index) and not 0 <= index.min() <= index.max() < len(vectors):
            raise ValueError(f"`index` goes from {index.min()} to {index.max()}, for {len(vectors)} vectors.")
        self.vectors = vectors
        self.index = index
        self.offsets = offsets
        self.checkpoint_hash = checkpoint_hash

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
        for name in ("vectors", "index", "offsets"):
            partial = folder / f"{name}.npy.partial"
            with partial.open("wb") as file:
                np.save(file, getattr(self, name), allow_pickle=False)
            os.replace(partial, folder / f"{name}.npy")
        facts = {
            "checkpoint_hash": self.checkpoint_hash,
            "hidden_size": self.vectors.shape[1],
            "num_vectors": len(self.vectors),
            "num_segments": len(self.index),
            "num_samples": len(self),
        }
        partial = folder / "anchors.json.partial"
        partial.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / "anchors.json")

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
        store = cls(**arrays, checkpoint_hash=checkpoint_hash)
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


@torch.inference_mode()
def encode_anchors(
    backbone: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    segments: Sequence[Sequence[str]],
    checkpoint_hash: str,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    max_tokens: int = 256,
) -> AnchorStore:
    """
    Encode each segment alone; its anchor `h_t^cot` is the backbone's final hidden state at the segment's last token.

    Distinct segments are encoded once, sorted by length so that batches hold little padding. Segments are tokenised as
    plain text: SID and control tokens in them stay text.

    Args:
        backbone (`nn.Module`):
            Called as `backbone(input_ids=..., attention_mask=...)`, gives `last_hidden_state` `(B, L, H)`. Put in
            evaluation mode for the time of the call.
        tokenizer (`PreTrainedTokenizerBase`):
            The stage-1 tokenizer.
        segments (`Sequence[Sequence[str]]`):
            Segments of each sample, from `segment`.
        checkpoint_hash (`str`):
            `checkpoint_hash` of the stage-1 model, stored beside the vectors.
        batch_size (`int`, *optional*, defaults to `64`):
            Segments a pass.
        device (`str` or `torch.device`, *optional*):
            Where to run, and where the backbone is moved to; where it is if not given.
        max_tokens (`int`, *optional*, defaults to `256`):
            Of a longer segment the last tokens are kept: the anchor is read at its end.

    Returns:
        `AnchorStore`: anchors of all samples, float32.

    Raises:
        ValueError: a sample without segments, or a segment without a token.
    """
    unique: dict[str, int] = {}
    index = np.array([unique.setdefault(text, len(unique)) for sample in segments for text in sample], dtype=np.int64)
    counts = np.array([len(sample) for sample in segments], dtype=np.int64)
    if not len(counts) or counts.min() < 1:
        raise ValueError(f"sample {counts.argmin() if len(counts) else 0} has no segments: nothing to encode.")
    ids = tokenizer(list(unique), add_special_tokens=False, split_special_tokens=True).input_ids
    ids = [row[-max_tokens:] for row in ids]
    empty = next((text for text, row in zip(unique, ids, strict=True) if not row), None)
    if empty is not None:
        raise ValueError(f"the segment {empty!r} has no token: leave empty segments out.")

    device = device or next(backbone.parameters()).device
    was_training = backbone.training
    backbone.to(device).eval()
    vectors: np.ndarray | None = None
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for start in tqdm(range(0, len(order), batch_size), desc="anchors", disable=None):
        rows = order[start : start + batch_size]
        states = _last_states(backbone, [ids[row] for row in rows], device)
        if vectors is None:
            vectors = np.empty((len(ids), states.shape[1]), dtype=np.float32)
        vectors[rows] = states
    backbone.train(was_training)
    return AnchorStore(vectors, index, np.concatenate([[0], np.cumsum(counts)]), checkpoint_hash)


def _last_states(backbone: nn.Module, ids: list[list[int]], device: str | torch.device) -> np.ndarray:
    """Final hidden state at the last token of each row, `(B, H)`; rows are padded on the right."""
    lengths = torch.tensor([len(row) for row in ids])
    input_ids = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
    for position, row in enumerate(ids):
        input_ids[position, : len(row)] = torch.tensor(row)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    output = backbone(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
    states = output.last_hidden_state[torch.arange(len(ids)), lengths - 1]
    return states.float().cpu().numpy()
