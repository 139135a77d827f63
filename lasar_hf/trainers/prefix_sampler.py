"""Batches of users: the samples of a user share the prefix of their histories, so they belong into one batch."""

from collections.abc import Iterable, Iterator

import numpy as np
from transformers.trainer_pt_utils import BatchRebalanceSampler


def prefix_groups(sequences: Iterable[list[int]], start_token_id: int) -> list[list[int]]:
    """
    Group sequences whose prompts, without `<|latent_start|>`, are prefixes of one another: the samples of a user, as
    long as all of the history fits into the prompt. Returns lists of indices, each from the shortest prompt to the
    longest.
    """
    # Big-endian bytes sort like the numbers, so the prompts that begin with a prompt follow it.
    bodies = [
        np.asarray(ids[: ids.index(start_token_id)] if start_token_id in ids else ids[:-1], dtype=">u4").tobytes()
        for ids in sequences
    ]
    order = sorted(range(len(bodies)), key=bodies.__getitem__)
    groups = [order[:1]]
    for before, index in zip(order, order[1:], strict=False):
        if bodies[index].startswith(bodies[before]):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


class PrefixBatchSampler(BatchRebalanceSampler):
    """
    Batches of whole groups of [`prefix_groups`], filled up to a number of tokens. A batch holds groups of similar size,
    so all batches cost about the same. The batches depend on the seed alone, and their order on the seed and the epoch.

    The base class marks it as a sampler that knows its process; the Trainer then does not split it once more.

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
            Seed of batches and order.

    Raises:
        `ValueError`: if a group has more than `max_tokens` tokens, or there are fewer examples than processes.
    """

    def __init__(
        self, sequences: Iterable[list[int]], start_token_id: int, max_tokens: int, num_processes: int = 1,
        process_index: int = 0, seed: int = 0,
    ):
        sequences = list(sequences)
        self.num_processes, self.process_index, self.seed, self.epoch = num_processes, process_index, seed, 0

        # 1. Groups in random order, then stably by size.
        groups = prefix_groups(sequences, start_token_id)
        groups = [groups[index] for index in np.random.default_rng(seed).permutation(len(groups))]
        groups.sort(key=lambda group: len(sequences[group[-1]]))

        # 2. Fill batches. Trees are padded to the longest trunk, the most paths and the longest path.
        batches, sizes = [], np.zeros((1, 3), dtype=np.int64)  # of the batch's groups: trunk, paths, tokens per path
        for group in groups:
            rows = [sequences[index] for index in group]
            paths = [len(ids) - ids.index(start_token_id) if start_token_id in ids else 1 for ids in rows]
            size = np.array([[len(rows[-1]) - paths[-1], len(group), max(paths)]])
            if _num_tokens(size) > max_tokens:
                raise ValueError(
                    f"max_tokens_per_batch is {max_tokens}, but the samples of one user have {_num_tokens(size)} tokens. "
                    "Use a larger budget, or a smaller max_history in the LasarProcessor."
                )
            grown = np.concatenate([sizes, size])
            if not batches or _num_tokens(grown) > max_tokens:
                batches.append([])
                grown = size
            batches[-1] += group
            sizes = grown

        # 3. The same number for every process: split the largest batches.
        while len(batches) % num_processes:
            batches.sort(key=len)
            largest = batches.pop()
            if len(largest) < 2:
                raise ValueError(f"There are {len(sequences)} examples for {num_processes} processes; expected more.")
            batches += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches) // self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.batches))
        for index in order[self.process_index :: self.num_processes]:
            yield self.batches[index]


def _num_tokens(sizes: np.ndarray) -> int:
    """Tokens of a batch of trees with `sizes` `(T, 3)`: trunk, paths, tokens per path."""
    trunk, paths, per_path = sizes.max(axis=0)
    return int(len(sizes) * (trunk + paths * per_path))
