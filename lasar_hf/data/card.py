"""The numbers of a data set that belong beside it: sizes, lengths, text, ties in time, and what was left out."""

import numpy as np

from .interactions import TEXT_FIELDS, Interactions
from .splits import Split, TimeSplit


_ORDER = {
    True: "by time; interactions of one user at one time stay in the order of the file",
    False: "as in the file, which gives no times",
}


def describe(interactions: Interactions, split: Split | TimeSplit | None = None) -> dict[str, object]:
    """
    Describe a data set for its data card.

    Args:
        interactions (`Interactions`):
            The data set.
        split (`Split` or `TimeSplit`, *optional*):
            Adds the sizes of its parts.

    Returns:
        `dict`: ready for JSON. `users`, `items`, `interactions`, `density`; `history_length` (`min`, `median`, `mean`,
        `max`); `order` (what the histories are ordered by, and the tie rule); `items_never_taken`; `items_with` (each
        text field); `items_without_text`; with timestamps `time` (`first`, `last`) and `tied_neighbours`, the share of
        neighbours in a history with one time, whose order the tie rule decides; the reader's own counts as `reader`;
        with a split `split` (its kind and the size of each part).
    """
    lengths = np.array([len(history) for history in interactions.histories])
    taken = {item for history in interactions.histories for item in history}
    card: dict[str, object] = {
        "users": len(lengths),
        "items": len(interactions.items),
        "interactions": int(lengths.sum()),
        "density": float(lengths.sum() / (len(lengths) * len(interactions.items))),
        "history_length": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
        },
        "order": _ORDER[interactions.timestamps is not None],
        "items_never_taken": len(interactions.items) - len(taken),
        "items_with": {name: sum(name in item for item in interactions.items) for name in TEXT_FIELDS},
        "items_without_text": sum(not any(name in item for name in TEXT_FIELDS) for item in interactions.items),
    }
    if interactions.timestamps is not None:
        gaps = np.concatenate([np.diff(times) for times in interactions.timestamps])
        card["time"] = {
            "first": min(times[0] for times in interactions.timestamps),
            "last": max(times[-1] for times in interactions.timestamps),
        }
        card["tied_neighbours"] = float((gaps == 0).mean()) if len(gaps) else 0.0
    if interactions.counts:
        card["reader"] = dict(interactions.counts)
    if split is not None:
        card["split"] = _describe_split(split)
    return card


def _describe_split(split: Split | TimeSplit) -> dict[str, object]:
    train = sum(map(len, split.train))
    if isinstance(split, Split):
        return {
            "kind": "leave-one-out",
            "users": len(split.user_ids),
            "users_skipped": split.num_skipped,
            "train": train,
            "validation": len(split.validation),
            "test": len(split.test),
        }
    return {
        "kind": "global time",
        "users": len(split.user_ids),
        "train": train,
        "validation": sum(map(len, split.validation)),
        "test": sum(map(len, split.test)),
        "validation_from": split.validation_from,
        "test_from": split.test_from,
    }
