"""Make semantic anchors (METHOD.md, section 4): the stage-1 backbone over segments, in resumable shards."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..files import write_json
from ..onednn import onednn_linear
from .anchors import AnchorStore


_AS_TEXT = {"add_special_tokens": False, "split_special_tokens": True}


def encode_anchors(
    backbone: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    segments: Sequence[Sequence[str]],
    checkpoint_hash: str,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    max_tokens: int = 256,
    folder: str | Path | None = None,
    context: str = "segment",
    prompts: Sequence[Sequence[int]] | None = None,
    shard_size: int = 8192,
) -> AnchorStore:
    """
    Encode segments; the anchor `h_t^cot` of one is the backbone's final hidden state at its last token.

    Distinct texts are encoded once, sorted by length so that batches hold little padding. Segments are tokenised as
    plain text: SID and control tokens in them stay text.

    Args:
        backbone (`nn.Module`):
            Called as `backbone(input_ids=..., attention_mask=...)`, gives `last_hidden_state` `(B, L, H)`; its
            `config.hidden_size` is `H`. Put in evaluation mode meanwhile.
        tokenizer (`PreTrainedTokenizerBase`):
            The stage-1 tokenizer.
        segments (`Sequence[Sequence[str]]`):
            Segments of each sample, from `segment`.
        checkpoint_hash (`str`):
            `checkpoint_hash` of the stage-1 model, stored beside the vectors.
        batch_size (`int`, *optional*, defaults to `64`):
            Sequences a pass.
        device (`str` or `torch.device`, *optional*):
            Where to run, and where the backbone is moved to; where it is if not given.
        max_tokens (`int`, *optional*, defaults to `256`):
            Of a longer segment the last tokens are kept: the anchor is read at its end.
        folder (`str` or `Path`, *optional*):
            Where the store is written while it is made, a shard of one memory-mapped file after the other: a call that
            was cut short goes on after the last whole shard, and one whose inputs are those of a complete store opens
            it. Not written if not given.
        context (`str`, *optional*, defaults to `"segment"`):
            What a segment is encoded after: `"segment"` nothing (the paper), `"chain"` the sample's prompt and its
            earlier segments, all anchors of a sample in one pass.
        prompts (`Sequence[Sequence[int]]`, *optional*):
            Token ids of each sample's prompt (`PromptEncoder.prompt`), for `context="chain"`.
        shard_size (`int`, *optional*, defaults to `8192`):
            Sequences of a shard, rounded up to whole batches.

    Returns:
        `AnchorStore`: anchors of all samples, float32.

    Raises:
        ValueError: a sample without segments, a segment without a token, an unknown context, or `prompts` that do not
            go with it.
    """
    work = _Work(tokenizer, segments, context, prompts, max_tokens)
    inputs_hash = work.hash(checkpoint_hash, batch_size)
    store = partial(AnchorStore, index=work.index, offsets=work.offsets, checkpoint_hash=checkpoint_hash)
    shape = (work.num_vectors, backbone.config.hidden_size)
    encode = partial(_encode, backbone, work, batch_size, device)
    if folder is None:
        vectors = np.empty(shape, dtype=np.float32)
        encode(vectors, range(len(work.order)))
        return store(vectors, inputs_hash=inputs_hash)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = folder / "anchors.json"
    if facts.exists() and json.loads(facts.read_text(encoding="utf-8")).get("inputs_hash") == inputs_hash:
        (folder / "progress.json").unlink(missing_ok=True)  # of a run that was killed between the two
        return AnchorStore.load(folder, checkpoint_hash)
    facts.unlink(missing_ok=True)
    vectors, done = _open_shards(folder, inputs_hash, shape)
    step = batch_size * max(1, -(-shard_size // batch_size))
    for start in range(done, len(work.order), step):
        encode(vectors, range(start, min(start + step, len(work.order))))
        vectors.flush()
        write_json(folder / "progress.json", {"inputs_hash": inputs_hash, "done": start + step})
    store(vectors, inputs_hash=inputs_hash).save_index(folder)
    (folder / "progress.json").unlink()
    return AnchorStore.load(folder, checkpoint_hash)


class _Work:
    """
    Which sequences are encoded and where their anchors go. A sequence is a segment (`"segment"`), or a prompt with all
    segments of a sample (`"chain"`); the vectors lie in the order of encoding.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        segments: Sequence[Sequence[str]],
        context: str,
        prompts: Sequence[Sequence[int]] | None,
        max_tokens: int,
    ):
        if context not in ("segment", "chain"):
            raise ValueError(f"`context` is {context!r}, expected 'segment' or 'chain'.")
        if (prompts is not None) != (context == "chain"):
            raise ValueError(f"`context` is {context!r}: `prompts` are needed for 'chain', and for nothing else.")
        if prompts is not None and len(prompts) != len(segments):
            raise ValueError(f"`prompts` has {len(prompts)} entries for {len(segments)} samples.")
        counts = np.fromiter((len(sample) for sample in segments), dtype=np.int64)
        if not len(counts) or counts.min() < 1:
            raise ValueError(f"sample {counts.argmin() if len(counts) else 0} has no segments: nothing to encode.")
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        unique: dict[tuple, int] = {}
        if prompts is None:
            keys = (((), (text,)) for sample in segments for text in sample)
        else:
            keys = ((tuple(ids), tuple(sample)) for ids, sample in zip(prompts, segments, strict=True))
        members = np.fromiter((unique.setdefault(key, len(unique)) for key in keys), dtype=np.int64)
        self.sequences = list(unique)
        # By length in letters, a token of a prompt counting for four: it only decides how well batches are filled.
        length = [4 * len(ids) + sum(map(len, texts)) for ids, texts in self.sequences]
        self.order = np.argsort(length, kind="stable")
        sizes = np.array([len(texts) for _, texts in self.sequences], dtype=np.int64)
        self.first = np.empty(len(sizes), dtype=np.int64)  # row of each sequence's first anchor
        self.first[self.order] = np.cumsum(sizes[self.order]) - sizes[self.order]
        self.num_vectors = int(sizes.sum())
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        if prompts is None:
            self.index = self.first[members]
        else:
            self.index = np.repeat(self.first[members] - self.offsets[:-1], counts) + np.arange(self.offsets[-1])

    def hash(self, checkpoint_hash: str, batch_size: int) -> str:
        """Of all that decides the vectors, to the bit: batches are padded, and sums are rounded by their padding."""
        digest = hashlib.sha256(json.dumps([checkpoint_hash, batch_size, self.max_tokens]).encode())
        for sequence in self.sequences:
            digest.update(json.dumps(sequence).encode())
        digest.update(self.index.tobytes() + self.offsets.tobytes())
        return digest.hexdigest()

    def tokens(self, sequence: int) -> tuple[list[int], list[int]]:
        """Token ids of a sequence, and the places of its anchors: each segment's last token."""
        prompt, texts = self.sequences[sequence]
        ids, places = list(prompt), []
        texts = [" " + text if place else text for place, text in enumerate(texts)]
        for text, row in zip(texts, self.tokenizer(texts, **_AS_TEXT).input_ids, strict=True):
            if not text.strip() or not row:
                raise ValueError(f"the segment {text.strip()!r} has no token: leave empty segments out.")
            ids += row[-self.max_tokens :]
            places.append(len(ids) - 1)
        return ids, places


def _open_shards(folder: Path, inputs_hash: str, shape: tuple[int, int]) -> tuple[np.memmap, int]:
    """The file of vectors, and how many sequences it holds already; begun anew when it belongs to other inputs."""
    path, progress = folder / "vectors.npy", folder / "progress.json"
    if progress.exists() and path.exists():
        state = json.loads(progress.read_text(encoding="utf-8"))
        if state["inputs_hash"] == inputs_hash:
            return np.lib.format.open_memmap(path, mode="r+"), state["done"]
    progress.unlink(missing_ok=True)
    path.unlink(missing_ok=True)  # who reads the old vectors keeps them
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape), 0


@torch.inference_mode()
def _encode(
    backbone: nn.Module,
    work: _Work,
    batch_size: int,
    device: str | torch.device | None,
    vectors: np.ndarray,
    positions: range,
) -> None:
    """Write the anchors of some sequences, told by their positions in the order of encoding."""
    device = device or next(backbone.parameters()).device
    was_training = backbone.training
    backbone.to(device).eval()
    with onednn_linear(backbone):
        for start in tqdm(range(positions.start, positions.stop, batch_size), desc="anchors", disable=None):
            sequences = work.order[start : min(start + batch_size, positions.stop)]
            ids, places = zip(*(work.tokens(sequence) for sequence in sequences), strict=True)
            rows = [np.arange(len(own)) + work.first[one] for one, own in zip(sequences, places, strict=True)]
            vectors[np.concatenate(rows)] = _states(backbone, ids, places, device)
    backbone.train(was_training)


def _states(
    backbone: nn.Module, ids: Sequence[list[int]], places: Sequence[list[int]], device: str | torch.device
) -> np.ndarray:
    """Final hidden states at the places of each row, all rows after each other, `(P, H)`; padded on the right."""
    lengths = torch.tensor([len(row) for row in ids])
    input_ids = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
    for position, row in enumerate(ids):
        input_ids[position, : len(row)] = torch.tensor(row)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    output = backbone(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
    rows = torch.tensor([row for row, own in enumerate(places) for _ in own])
    columns = torch.tensor([place for own in places for place in own])
    return output.last_hidden_state[rows, columns].float().cpu().numpy()
