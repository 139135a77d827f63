"""Parts of the users that a recommender may serve differently: what it can have memorised, and what is rare."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .baselines import flat_sequences


def slices(samples: Mapping[str, Sequence[Any]], train: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """
    Six parts of the samples, in three pairs that each cover all of them.

    * `pair seen` and `pair unseen`: whether the target directly follows the newest item of the history somewhere in
      the training sequences.
    * `history <= m items` and `history > m items`: `m` is the median length of the samples' histories.
    * `target <= m times` and `target > m times`: how often the target is in the training sequences; `m` is the median
      over the samples.

    Args:
        samples (`Dataset` or `Mapping`):
            Columns `history` (item indices, oldest first) and `target`, of `U` samples.
        train (`Sequence[Sequence[int]]`):
            Training items of each user, oldest first.

    Returns:
        `dict[str, np.ndarray]`: the part's name with its threshold, and `(U,)` booleans.

    Example:

    ```python
    >>> slices({"history": [[0], [1, 0]], "target": [1, 2]}, train=[[0, 1], [1, 2]])
    {'pair seen': array([ True, False]), 'pair unseen': array([False,  True]), 'history <= 1.5 items': …}
    ```
    """
    histories, targets = list(samples["history"]), np.asarray(samples["target"], dtype=np.int64)
    newest = np.array([history[-1] for history in histories], dtype=np.int64)
    users, items, _ = flat_sequences(train)
    num_items = 1 + max(items.max(initial=0), newest.max(initial=0), targets.max(initial=0))
    is_pair = users[:-1] == users[1:]
    pairs = np.unique((items[:-1] * num_items + items[1:])[is_pair])
    is_seen = np.isin(newest * num_items + targets, pairs)
    lengths = np.array([len(history) for history in histories])
    popularity = np.bincount(items, minlength=num_items)[targets]
    parts = {"pair seen": is_seen, "pair unseen": ~is_seen}
    for name, unit, values in (("history", "items", lengths), ("target", "times", popularity)):
        median = np.median(values)
        parts[f"{name} <= {median:g} {unit}"] = values <= median
        parts[f"{name} > {median:g} {unit}"] = values > median
    return parts
