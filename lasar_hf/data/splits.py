"""Leave-one-out and global-time splits, and the (history, target) samples of each part as a `datasets.Dataset`."""

import warnings
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
from datasets import Dataset

from .interactions import Interactions


# Histories of one user overlap, so a table of samples is longer than the data: so many of its entries at a time.
_ENTRIES_A_CHUNK = 2**22


@dataclass(frozen=True)
class Split:
    """
    Leave-one-out split: row `i` of each list belongs to `user_ids[i]`.

    Args:
        user_ids (`list[str]`):
            Users that were kept.
        train (`list[list[int]]`):
            Item rows of each user without the last two, oldest first.
        validation (`list[int]`):
            The last item but one.
        test (`list[int]`):
            The last item.
        num_skipped (`int`, *optional*, defaults to `0`):
            Users left out for having fewer than three items.
    """

    user_ids: list[str]
    train: list[list[int]]
    validation: list[int]
    test: list[int]
    num_skipped: int = 0


def leave_one_out(interactions: Interactions) -> Split:
    """
    Split each history: last item test, the one before validation, the rest training (the field's protocol).

    Users with fewer than three items are skipped and counted; one warning says how many.

    Raises:
        ValueError: a history is empty (named by its user), or no user has three items.
    """
    user_ids, train, validation, test = [], [], [], []
    for user, history in zip(interactions.user_ids, interactions.histories, strict=True):
        if not len(history):
            raise ValueError(f"user {user!r} has an empty history: give the user an item or leave the user out.")
        if len(history) < 3:
            continue
        user_ids.append(user)
        train.append(list(history[:-2]))
        validation.append(history[-2])
        test.append(history[-1])
    num_skipped = len(interactions.user_ids) - len(user_ids)
    if not user_ids:
        raise ValueError(f"none of the {num_skipped} users has three items, so there is nothing to split.")
    if num_skipped:
        warnings.warn(
            f"skipped {num_skipped} of {len(interactions.user_ids)} users: fewer than three items.", stacklevel=2
        )
    return Split(user_ids, train, validation, test, num_skipped)


@dataclass(frozen=True)
class TimeSplit:
    """
    Global-time split: row `i` of each list belongs to `user_ids[i]`; each of a user's lists may be empty.

    Args:
        user_ids (`list[str]`):
            All users.
        train (`list[list[int]]`):
            Item rows taken before `validation_from`, oldest first.
        validation (`list[list[int]]`):
            Those from `validation_from` on, but before `test_from`.
        test (`list[list[int]]`):
            Those from `test_from` on.
        validation_from, test_from (`float`):
            Points in time, in the unit of the timestamps.
    """

    user_ids: list[str]
    train: list[list[int]]
    validation: list[list[int]]
    test: list[list[int]]
    validation_from: float
    test_from: float


def global_time(interactions: Interactions, validation_share: float = 0.1, test_share: float = 0.1) -> TimeSplit:
    """
    Split all interactions at two points in time: nothing that a model trains on is later than what it is tested on,
    which leave-one-out does not promise.

    Args:
        interactions (`Interactions`):
            With timestamps.
        validation_share (`float`, *optional*, defaults to `0.1`):
            Share of the interactions between the two points.
        test_share (`float`, *optional*, defaults to `0.1`):
            Share of the interactions after the second point; equal times stay on one side.

    Raises:
        ValueError: no timestamps, shares that leave no training part, or a part without interactions.
    """
    if interactions.timestamps is None:
        raise ValueError("a global-time split needs timestamps: read them with a time column, or use leave_one_out.")
    if not (0 < validation_share < 1 and 0 < test_share < 1 and validation_share + test_share < 1):
        raise ValueError(f"the shares {validation_share} and {test_share} must be above 0 and leave a training part.")
    times = np.sort(np.concatenate([np.asarray(one) for one in interactions.timestamps]))
    validation_from, test_from = (
        float(times[int(len(times) * share)]) for share in (1 - validation_share - test_share, 1 - test_share)
    )
    if not times[0] < validation_from < test_from:
        raise ValueError("too few distinct timestamps for these shares: a part would be empty.")
    parts: dict[str, list[list[int]]] = {"train": [], "validation": [], "test": []}
    for history, one in zip(interactions.histories, interactions.timestamps, strict=True):
        first, second = np.searchsorted(one, [validation_from, test_from]).tolist()
        for name, part in zip(parts, (slice(first), slice(first, second), slice(second, None)), strict=True):
            parts[name].append(list(history[part]))
    return TimeSplit(interactions.user_ids, **parts, validation_from=validation_from, test_from=test_from)


def samples(split: Split | TimeSplit, name: str, targets: str = "all", max_history: int | None = None) -> Dataset:
    """
    The samples of one part of the split.

    Args:
        split (`Split` or `TimeSplit`):
            From `leave_one_out` or `global_time`.
        name (`str`):
            `"train"`: targets lie inside the training sequence. `"validation"`: the history is the training
            sequence. `"test"`: the history is the training sequence and the validation item. In a global-time split
            every item of the part is a target, and its history is all that the user took before.
        targets (`str`, *optional*, defaults to `"all"`):
            For `"train"` only: `"all"` takes every position from the second on, `"last"` only the last (one target
            a user, as the paper seems to do).
        max_history (`int`, *optional*):
            Newest items of a history that a sample keeps, all if not given. The table grows with a user's number of
            targets times the length of their histories: the square of a long sequence without a limit.

    Returns:
        `Dataset`: columns `user_id` (`str`), `history` (`list[int]`, item rows, oldest first, never empty),
        `target` (`int`, item row), in the order of the users, then of time.
    """
    if name not in ("train", "validation", "test"):
        raise ValueError(f"`name` is {name!r}, expected 'train', 'validation' or 'test'.")
    if targets not in ("all", "last"):
        raise ValueError(f"`targets` is {targets!r}, expected 'all' or 'last'.")
    if max_history is not None and max_history < 1:
        raise ValueError(f"`max_history` is {max_history}, expected at least 1.")
    parts = [split.train]
    for held_out in {"train": [], "validation": [split.validation], "test": [split.validation, split.test]}[name]:
        parts.append([[item] for item in held_out] if isinstance(split, Split) else held_out)
    num_targets = np.array([len(own) for own in parts[-1]])
    if name == "train" and targets == "last":
        num_targets = np.minimum(num_targets, 1)
    longest = np.sum([[len(own) for own in part] for part in parts], axis=0)
    entries = np.cumsum(num_targets * np.minimum(longest, max_history or longest.max()))
    edges = np.flatnonzero(np.diff(entries // _ENTRIES_A_CHUNK)) + 1
    tables = []
    for first, last in zip([0, *edges], [*edges, len(entries)], strict=True):
        own = slice(first, last)
        sequences = [[*chain.from_iterable(pieces)] for pieces in zip(*(part[own] for part in parts), strict=True)]
        tables.append(_sample_table(split.user_ids[own], sequences, num_targets[own], max_history))
    return Dataset(pa.concat_tables(tables))


def _sample_table(
    user_ids: list[str], sequences: list[list[int]], num_targets: np.ndarray, max_history: int | None
) -> pa.Table:
    """
    The last `num_targets` items of each sequence are targets, each with the items before it as history; a sequence's
    first item is none. Each history is a slice of its sequence; all slices are copied by one index.
    """
    lengths = np.fromiter((len(sequence) for sequence in sequences), dtype=np.int64, count=len(sequences))
    items = np.fromiter(chain.from_iterable(sequences), dtype=np.int64, count=lengths.sum())
    starts = np.cumsum(lengths) - lengths
    first = np.maximum(lengths - num_targets, 1)  # place of a sequence's first target
    users = np.repeat(np.arange(len(sequences)), np.maximum(lengths - first, 0))
    target = starts[users] + first[users] + np.arange(len(users)) - np.searchsorted(users, users)
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
