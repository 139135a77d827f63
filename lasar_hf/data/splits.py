"""Leave-one-out and global-time splits, and the (history, target) samples of each part as a `datasets.Dataset`."""

import warnings
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from .interactions import Interactions


PARTS = ("train", "validation", "test")
CHUNK_SIZE = 2**22  # history entries per chunk of a table, which is longer than the data since histories overlap


@dataclass(frozen=True)
class Split:
    """
    Training, validation and test items of each user. Entry `i` of each list belongs to `user_ids[i]`.

    Args:
        user_ids (`list[str]`):
            Users.
        train, validation, test (`list[list[int]]`):
            Item indices of each user in each part, oldest first. A user's parts follow each other in time. With
            leave-one-out, validation and test have one item per user; with a global-time split any part of a user may
            be empty.
        num_skipped (`int`, *optional*, defaults to `0`):
            Number of users that were left out because they have fewer than three items (leave-one-out).
        validation_from, test_from (`float`, *optional*):
            Times at which the validation and the test part start (global time).
    """

    user_ids: list[str]
    train: list[list[int]]
    validation: list[list[int]]
    test: list[list[int]]
    num_skipped: int = 0
    validation_from: float | None = None
    test_from: float | None = None


def drawn(count: int, size: int) -> np.ndarray:
    """Indices of at most `size` of `count` samples, drawn at random, `(at most size,)`; always the same, in order."""
    return np.sort(np.random.default_rng(0).permutation(count)[:size])


def repeat_rate(sequences: list[list[int]]) -> float:
    """Share of the items that occur earlier in their sequence. The first item of each sequence does not count."""
    num_repeats = sum(len(sequence) - len(set(sequence)) for sequence in sequences)
    return num_repeats / max(sum(max(len(sequence) - 1, 0) for sequence in sequences), 1)


def leave_one_out(interactions: Interactions) -> Split:
    """
    Split each history: the last item is test, the one before is validation, the others are training (the protocol of
    SASRec, TIGER and LC-Rec).

    Users with fewer than three items are left out, with a warning. Unlike [`global_time`], the training items of one
    user may be later than the test item of another.

    Args:
        interactions (`Interactions`):
            The data set.

    Raises:
        `ValueError`: if no user has three items.
    """
    pairs = zip(interactions.user_ids, interactions.histories, strict=True)
    histories = {user: list(history) for user, history in pairs if len(history) >= 3}
    num_users = len(interactions.user_ids)
    if not histories:
        raise ValueError(f"None of the {num_users} users has three items; leave-one-out needs at least three.")
    num_skipped = num_users - len(histories)
    if num_skipped:
        warnings.warn(f"Left out {num_skipped} of {num_users} users with fewer than three items.", stacklevel=2)
    return Split(
        user_ids=list(histories),
        train=[history[:-2] for history in histories.values()],
        validation=[history[-2:-1] for history in histories.values()],
        test=[history[-1:] for history in histories.values()],
        num_skipped=num_skipped,
    )


def global_time(interactions: Interactions, validation_share: float = 0.1, test_share: float = 0.1) -> Split:
    """
    Split all interactions at two points in time, so that no training item is later than a validation or test item.

    Args:
        interactions (`Interactions`):
            The data set, with timestamps.
        validation_share, test_share (`float`, *optional*, default to `0.1`):
            Share of the interactions between the two points, and after the second. Interactions with equal times stay
            in one part.

    Raises:
        `ValueError`: if there are no timestamps, or a part would be empty.
    """
    if interactions.timestamps is None:
        raise ValueError("A global-time split needs timestamps; set time_column, or use leave_one_out.")
    if not (0 < validation_share < 1 and 0 < test_share < 1 and validation_share + test_share < 1):
        raise ValueError(
            f"validation_share is {validation_share} and test_share is {test_share}; expected positive numbers with a "
            "sum below 1."
        )
    times = np.sort(np.concatenate([np.asarray(user_times) for user_times in interactions.timestamps]))
    shares = (1 - validation_share - test_share, 1 - test_share)
    validation_from, test_from = (float(times[int(len(times) * share)]) for share in shares)
    if not times[0] < validation_from < test_from:
        raise ValueError("Too few distinct timestamps for validation_share and test_share: a part would be empty.")
    parts: dict[str, Any] = {part: [] for part in PARTS}
    for history, user_times in zip(interactions.histories, interactions.timestamps, strict=True):
        first, second = np.searchsorted(user_times, [validation_from, test_from]).tolist()
        for part, items in zip(PARTS, (slice(first), slice(first, second), slice(second, None)), strict=True):
            parts[part].append(list(history[items]))
    return Split(interactions.user_ids, **parts, validation_from=validation_from, test_from=test_from)


def samples(split: Split, part: str, targets: str = "all", max_history: int | None = None) -> Dataset:
    """
    The samples of one part of a split: each item of the part is a target, and its history is all that the user
    interacted with before, in earlier parts too. The first item of a user has no history and is not a target.

    Args:
        split (`Split`):
            From [`leave_one_out`] or [`global_time`].
        part (`str`):
            `"train"`, `"validation"` or `"test"`.
        targets (`str`, *optional*, defaults to `"all"`):
            For `"train"`: every item from the second on (`"all"`), or only a user's last one (`"last"`).
        max_history (`int`, *optional*):
            Maximum number of history items of a sample; the newest are kept. All by default, which makes the table
            grow with the square of the length of a history.

    Returns:
        `Dataset`: columns `user_id` (`str`), `history` (`list[int]`, item indices, oldest first, never empty) and
        `target` (`int`, item index), sorted by user, then time.

    Example:

    ```python
    >>> from lasar_hf.data import Split, samples

    >>> samples(Split(["anna"], [[4, 2]], [[0]], [[3]]), "test")[0]
    {'user_id': 'anna', 'history': [4, 2, 0], 'target': 3}
    ```
    """
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; expected 'train', 'validation' or 'test'.")
    if targets not in ("all", "last"):
        raise ValueError(f"targets is {targets!r}; expected 'all' or 'last'.")
    if max_history is not None and max_history < 1:
        raise ValueError(f"max_history is {max_history}; expected at least 1.")
    parts = [getattr(split, name) for name in PARTS[: PARTS.index(part) + 1]]
    num_targets = np.array([len(items) for items in parts[-1]])
    if part == "train" and targets == "last":
        num_targets = np.minimum(num_targets, 1)

    # Cut the users into chunks of about CHUNK_SIZE history entries.
    lengths = np.sum([[len(items) for items in sequences] for sequences in parts], axis=0)
    entries = np.cumsum(num_targets * np.minimum(lengths, max_history or lengths.max()))
    edges = np.flatnonzero(np.diff(entries // CHUNK_SIZE)) + 1
    tables = []
    for first, last in zip([0, *edges], [*edges, len(entries)], strict=True):
        users = slice(first, last)
        sequences = [[*chain(*items)] for items in zip(*(sequences[users] for sequences in parts), strict=True)]
        tables.append(_sample_table(split.user_ids[users], sequences, num_targets[users], max_history))
    return Dataset(pa.concat_tables(tables))


def _sample_table(
    user_ids: list[str], sequences: list[list[int]], num_targets: np.ndarray, max_history: int | None
) -> pa.Table:
    """Samples of the last `num_targets` items of each sequence."""
    # All sequences as one array, and the index in it of each target.
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    items = np.fromiter(chain.from_iterable(sequences), dtype=np.int64, count=lengths.sum())
    starts = np.cumsum(lengths) - lengths
    first = np.maximum(lengths - num_targets, 1)  # position of each sequence's first target
    users = np.repeat(np.arange(len(sequences)), np.maximum(lengths - first, 0))
    target = starts[users] + first[users] + np.arange(len(users)) - np.searchsorted(users, users)
    # Each history is a slice of its sequence. One index copies all slices.
    history_lengths = np.minimum(target - starts[users], max_history or len(items))
    offsets = np.concatenate([[0], np.cumsum(history_lengths)])
    index = np.arange(offsets[-1]) + np.repeat(target - history_lengths - offsets[:-1], history_lengths)
    return pa.table(
        {
            "user_id": pa.array(user_ids, type=pa.string()).take(pa.array(users)),
            "history": pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), pa.array(items[index])),
            "target": pa.array(items[target]),
        }
    )
