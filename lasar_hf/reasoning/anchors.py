"""Semantic anchors: the stage-1 model's hidden state at the end of each reasoning segment, stored on disk.

LASAR, arXiv 2605.10207, stage 2 (SFT): the anchor `h_t^cot` of segment `t` is the final hidden state at the segment's
last token. Anchors are computed once and never trained through.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..files import atomic_file, file_hash, read_json, remove_temporary_files, write_json
from ..model.processing_lasar import LasarProcessor
from ..onednn import onednn_linear


ARRAYS = ("vectors", "index", "offsets")
SHARD_SIZE = 8192  # sequences


class AnchorStore:
    """
    Anchors of each sample: `store[i]` is `(N_i, H)`, one anchor per segment, in order. Equal segments share a vector.

    Args:
        vectors (`np.ndarray` of shape `(U, H)`):
            Distinct anchors, float32; may be memory-mapped.
        index (`np.ndarray` of shape `(sum of N_i,)`):
            Index into `vectors` of each segment, sample after sample.
        offsets (`np.ndarray` of shape `(S + 1,)`):
            Where each sample starts in `index`.
        checkpoint_hash (`str`):
            [`checkpoint_hash`] of the model that made the vectors.
        inputs_hash (`str`, *optional*, defaults to `""`):
            Hash of everything that determines the vectors.

    Raises:
        `ValueError`: if the arrays do not fit, or a vector is not finite.
    """

    def __init__(
        self, vectors: np.ndarray, index: np.ndarray, offsets: np.ndarray, checkpoint_hash: str, inputs_hash: str = ""
    ):
        if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(index) or (np.diff(offsets) < 1).any():
            raise ValueError("offsets must rise from 0 to the number of segments, by at least one per sample.")
        if len(index) and not 0 <= index.min() <= index.max() < len(vectors):
            raise ValueError(f"index goes from {index.min()} to {index.max()}, but there are {len(vectors)} vectors.")
        if not np.isfinite(vectors.sum(dtype=np.float64)):  # reads the file once and copies nothing
            raise ValueError("vectors has NaN or infinity. Check the weights and the data type of the checkpoint.")
        self.vectors, self.index, self.offsets = vectors, index, offsets
        self.checkpoint_hash, self.inputs_hash = checkpoint_hash, inputs_hash

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, sample: int) -> np.ndarray:
        if not 0 <= sample < len(self):
            raise IndexError(f"Sample {sample} has no anchors: the store has {len(self)} samples.")
        return np.asarray(self.vectors[self.index[self.offsets[sample] : self.offsets[sample + 1]]])

    def at_depth(self, sample: int, depth: int) -> np.ndarray:
        """
        Anchors of a sample for `depth` latent steps, `(depth, H)`: step `t` has that of segment `⌈t · n / depth⌉` of
        the `n` segments, so its place in the chain of thought is the same.
        """
        anchors = self[sample]
        return anchors[np.ceil(np.arange(1, depth + 1) * len(anchors) / depth).astype(int) - 1]

    @property
    def depths(self) -> np.ndarray:
        """Number of segments of each sample, its depth label `N`, `(S,)`."""
        return np.diff(self.offsets)

    def terminal(self) -> np.ndarray:
        """The last anchor of each sample, `(S, H)`, float32; in memory."""
        return np.asarray(self.vectors[self.index[self.offsets[1:] - 1]], dtype=np.float32)

    def save(self, folder: str | Path, vectors: bool = True) -> None:
        """Write the arrays (`vectors=False`: they are in `vectors.npy` already) and, last, `anchors.json`."""
        folder = Path(folder)
        (folder / "anchors.json").unlink(missing_ok=True)
        for name in ARRAYS if vectors else ARRAYS[1:]:
            with atomic_file(folder / f"{name}.npy") as temporary:
                np.save(temporary, getattr(self, name), allow_pickle=False)
        metadata = {"checkpoint_hash": self.checkpoint_hash, "inputs_hash": self.inputs_hash}
        write_json(folder / "anchors.json", metadata | {"sha256": _array_hashes(folder)})

    @classmethod
    def load(cls, folder: str | Path, checkpoint_hash: str) -> "AnchorStore":
        """
        Open the store in a folder, made by the model with this [`checkpoint_hash`]; the vectors are memory-mapped.

        Raises:
            `FileNotFoundError`: if the folder has no store, or an incomplete one.
            `ValueError`: if another checkpoint made the anchors, or a file changed after it was written.
        """
        folder = Path(folder)
        if not (folder / "anchors.json").exists():
            raise FileNotFoundError(f"{folder} has no complete anchors (no anchors.json). Run encode_anchors first.")
        metadata = _metadata(folder)
        if metadata["checkpoint_hash"] != checkpoint_hash:
            raise ValueError(
                f"{folder}: the anchors are stale. They were made by checkpoint {metadata['checkpoint_hash'][:12]}, "
                f"expected {checkpoint_hash[:12]}. Encode them again with the current stage-1 checkpoint."
            )
        for name, digest in _array_hashes(folder).items():
            if metadata["sha256"].get(name) != digest:
                raise ValueError(
                    f"{folder / name}.npy is not the file that anchors.json describes. Delete the folder and encode "
                    "the anchors again."
                )
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        return cls(**arrays, checkpoint_hash=checkpoint_hash, inputs_hash=metadata["inputs_hash"])


def _metadata(folder: Path) -> dict:
    metadata = read_json(folder / "anchors.json")
    fields = {"checkpoint_hash": str, "inputs_hash": str, "sha256": dict}
    if not isinstance(metadata, dict) or any(type(metadata.get(name)) is not kind for name, kind in fields.items()):
        raise ValueError(
            f"{folder / 'anchors.json'} is damaged; expected {', '.join(fields)}. Delete the folder and encode the "
            "anchors again."
        )
    return metadata


def _array_hashes(folder: Path) -> dict[str, str | None]:
    paths = [folder / f"{name}.npy" for name in ARRAYS]
    return {path.stem: file_hash(path) if path.exists() else None for path in paths}


def checkpoint_hash(model: nn.Module) -> str:
    """SHA-256 of a model's weights as 64 hexadecimal digits: equal for equal names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def encode_anchors(
    model: nn.Module,
    processor: LasarProcessor,
    segments: Sequence[Sequence[str]],
    folder: str | Path | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    batch_size: int = 64,
    max_tokens: int = 256,
    device: str | torch.device | None = None,
) -> AnchorStore:
    """
    Encode segments with the stage-1 model.

    Each distinct segment is encoded once, sorted by length so that batches hold little padding. With `prompts`, the
    samples of a user are encoded together and their history is read once. Segments are tokenised as plain text:
    Semantic-ID and control tokens in them stay text. With `folder`, the vectors are written in shards: an interrupted
    call continues after the last complete one, and a call with equal inputs opens the finished store.

    Args:
        model, processor ([`LasarForGenerativeRec`] and [`LasarProcessor`]):
            The stage-1 model and its processor. A segment that is encoded alone starts with BOS if prompts do.
        segments (`list[list[str]]`):
            Segments of each sample, from [`segment`].
        folder (`str` or `Path`, *optional*):
            Where the store is written. Defaults to memory only.
        prompts (`list[list[int]]`, *optional*):
            Token ids of each sample's prompt, from [`LasarProcessor.prompt_ids`]. With them, a segment is encoded
            after the prompt and the sample's earlier segments. Without them it is encoded alone, as in the paper.
        batch_size (`int`, *optional*, defaults to `64`):
            Number of sequences per forward pass.
        max_tokens (`int`, *optional*, defaults to `256`):
            Maximum number of tokens of a segment. The last tokens are kept, since the anchor is read at the end.
        device (`str` or `torch.device`, *optional*):
            Device to move the model to. Defaults to the model's device.

    Returns:
        [`AnchorStore`]: anchors of all samples, float32.

    Raises:
        `ValueError`: if a sample has no segments, a segment has no token, or `prompts` does not have one per sample.

    Example:

    ```python
    >>> store = encode_anchors(model, processor, samples["segments"], folder="outputs/anchors")
    >>> store[0].shape  # a sample with three segments
    (3, 64)
    ```
    """
    plan = _EncodingPlan(processor, segments, prompts, max_tokens)
    model_hash = checkpoint_hash(model)
    inputs_hash = plan.hash(model_hash, batch_size)
    shape = (plan.num_vectors, model.config.hidden_size)
    arrays = {"index": plan.index, "offsets": plan.offsets, "checkpoint_hash": model_hash, "inputs_hash": inputs_hash}
    base = model.model.to(device)
    if folder is None:
        vectors = np.empty(shape, dtype=np.float32)
        _encode(base, plan, vectors, range(len(plan.sequences)), batch_size)
        return AnchorStore(vectors, **arrays)

    folder = Path(folder)
    remove_temporary_files(folder)
    progress = folder / "progress.json"
    if not (folder / "anchors.json").exists() or _metadata(folder)["inputs_hash"] != inputs_hash:
        (folder / "anchors.json").unlink(missing_ok=True)
        vectors, done = _open_vectors(folder, inputs_hash, shape)
        step = batch_size * -(-SHARD_SIZE // batch_size)  # whole batches, so that padding does not depend on resuming
        for start in range(done, len(plan.sequences), step):
            shard = range(start, min(start + step, len(plan.sequences)))
            _encode(base, plan, vectors, shard, batch_size)
            vectors.flush()
            write_json(progress, {"inputs_hash": inputs_hash, "done": shard.stop})
        AnchorStore(vectors, **arrays).save(folder, vectors=False)
    progress.unlink(missing_ok=True)
    return AnchorStore.load(folder, model_hash)


class _EncodingPlan:
    """The distinct token sequences to encode, sorted by length, and where each segment's anchor is stored."""

    def __init__(
        self,
        processor: LasarProcessor,
        segments: Sequence[Sequence[str]],
        prompts: Sequence[Sequence[int]] | None,
        max_tokens: int,
    ):
        if prompts is not None and len(prompts) != len(segments):
            raise ValueError(f"prompts has {len(prompts)} entries; expected {len(segments)}, one per sample.")
        counts = np.fromiter((len(sample) for sample in segments), dtype=np.int64)
        if not len(counts) or counts.min() < 1:
            raise ValueError(f"segments: sample {counts.argmin() if len(counts) else 0} has no segments to encode.")
        self.processor, self.max_tokens = processor, max_tokens
        self.offsets = np.concatenate([[0], np.cumsum(counts)])

        # 1. A sequence is (prompt, texts): BOS and one segment, or a prompt and all segments of a sample.
        bos = (processor.tokenizer.bos_token_id,) if processor.add_bos else ()
        if prompts is None:
            keys: list[tuple[tuple, tuple[str, ...]]] = [(bos, (text,)) for sample in segments for text in sample]
        else:
            keys = [(tuple(ids), tuple(sample)) for ids, sample in zip(prompts, segments, strict=True)]

        # 2. Sort by length in characters, which needs no tokenisation. Prompts sort by their tokens, so those that are
        #    prefixes of one another are in one batch, and the model reads them once.
        self.sequences = sorted(dict.fromkeys(keys), key=lambda key: (key[0], sum(map(len, key[1]))))
        sizes = np.array([len(texts) for _, texts in self.sequences])
        self.num_vectors = int(sizes.sum())
        self.first = np.cumsum(sizes) - sizes  # index of the first anchor of each sequence

        # 3. Index of each segment's anchor. Without prompts a sequence has one anchor, with prompts one per segment.
        position = {key: number for number, key in enumerate(self.sequences)}
        self.index = self.first[[position[key] for key in keys]]
        if prompts is not None:
            self.index = np.repeat(self.index - self.offsets[:-1], counts) + np.arange(self.offsets[-1])

    def hash(self, checkpoint_hash: str, batch_size: int) -> str:
        """Hash of everything that determines the vectors; the batch size does, since padding affects rounding."""
        digest = hashlib.sha256(json.dumps([checkpoint_hash, batch_size, self.max_tokens]).encode())
        for sequence in self.sequences:
            digest.update(json.dumps(sequence).encode())
        digest.update(self.index.tobytes() + self.offsets.tobytes())
        return digest.hexdigest()

    def batch(self, start: int, stop: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """Token ids of some sequences, and `(sequence, position)` of each of their anchors."""
        sequences = self.sequences[start:stop]
        # After another segment, a segment starts with a space as in running text.
        texts = [" " + text if number else text for _, texts in sequences for number, text in enumerate(texts)]
        token_ids = zip(texts, self.processor.text_ids(texts), strict=True)
        ids, anchors = [], []
        for row, (prompt, segments) in enumerate(sequences):
            ids.append(list(prompt))
            for _ in segments:
                text, tokens = next(token_ids)
                if not text.strip() or not tokens:
                    raise ValueError(f"segments: {text.strip()!r} has no token; leave empty segments out.")
                ids[row] += tokens[-self.max_tokens :]
                anchors.append((row, len(ids[row]) - 1))
        return ids, anchors


def _open_vectors(folder: Path, inputs_hash: str, shape: tuple[int, int]) -> tuple[np.memmap, int]:
    """The file of vectors and the number of sequences in it. Other inputs start a new file."""
    path, progress = folder / "vectors.npy", folder / "progress.json"
    try:
        state = read_json(progress) if progress.exists() and path.exists() else {}
        if state.get("inputs_hash") == inputs_hash:
            np.lib.format.open_memmap(path, mode="r")  # refuses a file that was cut, which "r+" would fill with zeros
            return np.lib.format.open_memmap(path, mode="r+"), state["done"]
    except (ValueError, AttributeError, KeyError, EOFError):
        pass  # damaged: encode all again
    folder.mkdir(parents=True, exist_ok=True)
    progress.unlink(missing_ok=True)
    path.unlink(missing_ok=True)  # not overwritten: open readers keep the old file
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape), 0


@torch.inference_mode()
def _encode(base: nn.Module, plan: _EncodingPlan, vectors: np.ndarray, sequences: range, batch_size: int) -> None:
    """Write the anchors of some sequences of the plan to `vectors`."""
    device, was_training = base.device, base.training
    base.eval()
    with onednn_linear(base):
        for start in tqdm(range(sequences.start, sequences.stop, batch_size), desc="anchors", disable=None):
            ids, anchors = plan.batch(start, min(start + batch_size, sequences.stop))
            # Right-padded, so that positions in a sequence are columns.
            rows = [torch.tensor(row) for row in ids]
            input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, L)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)  # (B, L)
            states = base(input_ids=input_ids.to(device), attention_mask=mask.to(device)).last_hidden_state
            row, column = torch.tensor(anchors).T
            first = plan.first[start]
            vectors[first : first + len(anchors)] = states[row, column].float().cpu().numpy()  # (anchors, H)
    base.train(was_training)
