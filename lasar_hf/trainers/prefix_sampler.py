"""Samplers that keep the samples of a user together, because the model reads their common history once."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from transformers.trainer_pt_utils import BatchRebalanceSampler
from trl.trainer.utils import RepeatSampler


def prefix_groups(bodies: Sequence[str] | Sequence[bytes]) -> list[list[int]]:
    """
    Group prompts, given without their `<|latent_start|>`, that are prefixes of one another: the samples of a user, as
    long as all of the history fits into the prompt. Returns lists of indices, each from the shortest prompt to the
    longest.
    """
    order = sorted(range(len(bodies)), key=bodies.__getitem__)  # those that begin with a prompt follow it
    groups = [order[:1]]
    for before, index in zip(order, order[1:], strict=False):
        if bodies[index].startswith(bodies[before]):  # type: ignore[arg-type]
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


class PrefixRepeatSampler(RepeatSampler):
    """
    TRL's sampler of prompts with a few prompts of a user one after the other. The order depends on the seed and the
    epoch alone, so a run that resumes later sees the same prompts.

    `base` is TRL's own sampler, `groups` are those of [`prefix_groups`] and `size` is the number of prompts of a group
    that stay together. With a size of 1 the order is TRL's.
    """

    def __init__(self, base: RepeatSampler, groups: list[list[int]], size: int):
        super().__init__(
            base.data_source, base.mini_repeat_count, base.batch_size, base.repeat_count, base.shuffle, base.seed
        )
        self.pieces = [group[i : i + size] for group in groups for i in range(0, len(group), size)]

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)

    def __iter__(self) -> Iterator[int]:
        pieces = self.pieces
        if self.shuffle:
            pieces = [pieces[i] for i in torch.randperm(len(pieces), generator=self.generator).tolist()]
        order = [index for piece in pieces for index in piece]
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            for _ in range(self.repeat_count):
                for index in order[start : start + self.batch_size]:
                    yield from [index] * self.mini_repeat_count


class PrefixBatchSampler(BatchRebalanceSampler):
    """
    Batches of whole groups of [`prefix_groups`], filled up to a number of tokens. A batch holds groups of similar
    size, so all batches cost about the same. Batches and their order depend on the seed and the epoch alone.

    The Trainer recognises the base class, and does not split the batches among the processes again.

    Args:
        sequences (`Iterable[list[int]]`):
            Token ids of the examples.
        start_token_id (`int`):
            Id of `<|latent_start|>`.
        max_tokens (`int`):
            Largest number of tokens per batch, where a shared prefix counts once and padding counts.
        num_processes, process_index (`int`, *optional*):
            Every process gets the same number of batches.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the batches.
        path_lengths (`Sequence[int]`, *optional*):
            Tokens of each example from `<|latent_start|>` on. Defaults to those of its sequence.

    Raises:
        `ValueError`: if a group has more than `max_tokens` tokens, or there are fewer examples than processes.
    """

    def __init__(
        self,
        sequences: Iterable[list[int]],
        start_token_id: int,
        max_tokens: int,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        path_lengths: Sequence[int] | None = None,
    ):
        self.num_processes, self.process_index = num_processes, process_index
        self.max_tokens, self.seed, self.epoch = max_tokens, seed, 0
        sequences = list(sequences)

        # Users with equal histories are in one group, which is cut where it exceeds the budget, while the samples of
        # one user fit into it.
        tails = np.array([len(ids) - ids.index(start_token_id) if start_token_id in ids else 1 for ids in sequences])
        bodies = np.array([len(ids) for ids in sequences]) - tails  # (n,), tokens before the path
        paths = tails if path_lengths is None else np.asarray(path_lengths)  # (n,)
        # Big-endian bytes sort like the numbers.
        pairs = zip(sequences, bodies, strict=True)
        groups = prefix_groups([np.asarray(ids[:body], dtype=">u4").tobytes() for ids, body in pairs])
        self.trees = []  # (tokens of the body, number of paths, tokens of a path, examples)
        for group in groups:
            body, path = bodies[group[-1]], paths[group].max()
            needed = body + path * len(np.unique(bodies[group]))
            if needed > max_tokens:
                raise ValueError(
                    f"max_tokens_per_batch is {max_tokens}, but the samples of one user have {needed} tokens. Use a "
                    "larger budget, or a smaller max_history in the LasarProcessor."
                )
            size = (max_tokens - body) // path
            pieces = [group[i : i + size] for i in range(0, len(group), size)]
            self.trees += [(body, len(piece), path, piece) for piece in pieces]
        self.num_batches = len(self._batches(np.random.default_rng(seed)))

    def _batches(self, generator: np.random.Generator) -> list[list[int]]:
        """Batches of examples. Their sizes and number do not depend on the generator."""
        # 1. Trees of similar size are together, since all are padded to the largest. Those of equal size are shuffled.
        trees = [self.trees[index] for index in generator.permutation(len(self.trees))]
        trees.sort(key=lambda tree: tree[:3])

        # 2. Fill batches.
        batches: list[list[int]] = []
        largest = np.zeros(3, dtype=np.int64)
        num_trees = 0
        for *size, examples in trees:
            largest, num_trees = np.maximum(largest, size), num_trees + 1
            if not batches or num_trees * (largest[0] + largest[1] * largest[2]) > self.max_tokens:
                batches.append([])
                largest, num_trees = np.array(size), 1
            batches[-1] += examples

        # 3. The same number for every process: split the largest batches.
        while len(batches) % self.num_processes:
            batches.sort(key=len)
            longest = batches.pop()
            if len(longest) < 2:
                num_examples = sum(map(len, batches), len(longest))
                raise ValueError(
                    f"There are {num_examples} examples for {self.num_processes} processes. Start fewer processes."
                )
            batches += [longest[: len(longest) // 2], longest[len(longest) // 2 :]]
        return batches

    def __len__(self) -> int:
        return self.num_batches // self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        batches = self._batches(generator)
        for index in generator.permutation(len(batches))[self.process_index :: self.num_processes]:
            yield batches[index]
