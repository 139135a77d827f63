"""Settings of baselines, chosen on validation by a stated budget; and the rankings of all baselines."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from ..data.splits import drawn
from .baselines import (
    EASE_MAX_ITEMS,
    ease_matrix,
    ease_ranking,
    item_knn_matrix,
    item_knn_ranking,
    markov_ranking,
    matrix_ranking,
    popularity_ranking,
)
from .metrics import hits_per_user, ndcg_per_user, ranks
from .sasrec import has_sasrec, sasrec_ranking


BASELINES = ("popularity", "Markov", "item-kNN", "EASE", "SASRec", "memory alone")
WITH_MEMORY = " + memory"  # end of the name of a row
ITEM_KNN_GRID = {
    "window": (1, 4, 8, 16),
    "gap_decay": (0.6, 0.8, 1.0),
    "mirror": (0.0, 0.25, 0.5, 1.0),
    "shrinkage": (1.0, 10.0, 50.0, 200.0),
}
EASE_GRID = {"regularization": (10.0, 50.0, 100.0, 300.0)}
HISTORY_DECAYS = (0.5, 0.7, 0.9)
SASREC_USERS = 2000


@dataclass(frozen=True)
class Tuning:
    """What [`tune`] found: `settings` with the best NDCG@10 on validation, and what it cost to find them."""

    settings: dict[str, Any]
    validation_ndcg: float
    settings_tried: int
    users: int


def tuning_notes(tunings: Mapping[str, Any]) -> list[str]:
    """A sentence for each baseline on its tuning, from the second return value of [`baseline_rankings`]."""
    notes = []
    for name, tuning in tunings.items():
        if isinstance(tuning, str):
            notes.append(f"{name}: {tuning}.")
            continue
        settings = ", ".join(f"{setting} {value:g}" for setting, value in tuning["settings"].items())
        notes.append(
            f"{name}: {settings}; best of {tuning['settings_tried']} settings by NDCG@10 of {tuning['users']} "
            f"validation samples ({tuning['validation_ndcg']:.4f})."
        )
    return notes


def compare_exclusion(
    train_sequences: Sequence[Sequence[int]],
    histories: Sequence[Sequence[int]],
    targets: Sequence[int],
    num_items: int,
    max_users: int = 10_000,
) -> tuple[float, float]:
    """
    HR@10 of item-kNN on validation samples with and without the items of the history in its lists, which says whether
    they should be recommended again. Arguments as for [`tune`]; of more than `max_users` samples, some are drawn.
    """
    users = drawn(len(targets), max_users)
    histories, targets = [histories[user] for user in users], [targets[user] for user in users]
    rankings = [item_knn_ranking(train_sequences, histories, num_items, 10, exclude) for exclude in (False, True)]
    kept, excluded = (float(hits_per_user(ranks(lists, targets), 10).mean()) for lists in rankings)
    return kept, excluded


def tune(
    matrix: Callable[..., Any],
    grid: Mapping[str, Sequence[Any]],
    train_sequences: Sequence[Sequence[int]],
    histories: Sequence[Sequence[int]],
    targets: Sequence[int],
    num_items: int,
    exclude_history: bool,
    num_matrices: int = 8,
    max_users: int = 10_000,
    seed: int = 0,
) -> Tuning:
    """
    Random search for the settings of a baseline with the best NDCG@10, each with every decay of `HISTORY_DECAYS`.

    Args:
        matrix (`Callable`):
            [`item_knn_matrix`] or [`ease_matrix`].
        grid (`Mapping[str, Sequence]`):
            Values of each setting of `matrix`.
        train_sequences, num_items, exclude_history:
            As for [`popularity_ranking`].
        histories, targets (of length `U`):
            Samples of the validation part.
        num_matrices (`int`, *optional*, defaults to `8`):
            Number of points of the grid, drawn without repeats. The defaults of `matrix` are always tried besides.
        max_users, seed (`int`, *optional*, default to `10000` and `0`):
            Number of samples to measure on, drawn if there are more, and the seed of both draws.

    Returns:
        [`Tuning`], whose `settings` are keywords of [`item_knn_ranking`] or [`ease_ranking`].
    """
    rng = np.random.default_rng(seed)
    users = np.sort(rng.permutation(len(targets))[:max_users])
    histories, wanted = [histories[user] for user in users], np.asarray(targets)[users]
    points = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    tries = [points[index] for index in rng.permutation(len(points))[:num_matrices]]
    defaults = {name: inspect.signature(matrix).parameters[name].default for name in grid}
    best: dict[str, Any] = {}
    best_ndcg, tried = -1.0, 0
    for settings in [defaults, *(point for point in tries if point != defaults)]:
        scores = matrix(train_sequences, num_items, **settings)
        for decay in HISTORY_DECAYS:
            rankings = matrix_ranking(scores, train_sequences, histories, 10, decay, exclude_history)
            ndcg = ndcg_per_user(ranks(rankings, wanted), 10).mean()
            tried += 1
            if ndcg > best_ndcg:
                best_ndcg, best = ndcg, settings | {"history_decay": decay}
    return Tuning(best, float(best_ndcg), tried, len(users))


def tune_item_knn(
    train_sequences: Sequence[Sequence[int]],
    validation: Mapping[str, Sequence[Any]],
    num_items: int,
    exclude_history: bool,
) -> Tuning:
    """[`tune`] for [`item_knn_ranking`] on the columns `history` and `target` of the validation part."""
    histories, targets = list(validation["history"]), list(validation["target"])
    return tune(item_knn_matrix, ITEM_KNN_GRID, train_sequences, histories, targets, num_items, exclude_history)


def draw_samples(validation: Mapping[str, Sequence[Any]], users: int) -> dict[str, list]:
    """Histories and targets of at most `users` random samples, always the same ones."""
    columns = {name: list(validation[name]) for name in ("history", "target")}
    indices = drawn(len(columns["target"]), users)
    return {name: [values[index] for index in indices] for name, values in columns.items()}


def baseline_rankings(
    train_sequences: Sequence[Sequence[int]],
    histories: Sequence[Sequence[int]],
    num_items: int,
    top_k: int,
    exclude_history: bool,
    validation: Mapping[str, Sequence[Any]],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """
    Rankings of popularity, Markov, item-kNN, EASE and, if cornac is installed, SASRec, for the same users.

    Args:
        train_sequences, histories, num_items, top_k, exclude_history:
            As for [`popularity_ranking`].
        validation (`Dataset` or `Mapping`):
            Columns `history` and `target` of the validation part, on which item-kNN and EASE are tuned by [`tune`]
            and which choose the number of epochs of SASRec.

    Returns:
        `tuple[dict, dict]`: the ranking `(U, k)` of each baseline by its name; and by the same names how it was tuned,
        or why it is left out.
    """
    common = (train_sequences, histories, num_items, top_k, exclude_history)
    rankings = {"popularity": popularity_ranking(*common), "Markov": markov_ranking(*common)}
    notes: dict[str, Any] = {"popularity": "nothing to tune", "Markov": "nothing to tune"}
    held_out = (train_sequences, list(validation["history"]), list(validation["target"]), num_items, exclude_history)

    tuning = tune_item_knn(train_sequences, validation, num_items, exclude_history)
    rankings["item-kNN"] = item_knn_ranking(*common, **tuning.settings)
    notes["item-kNN"] = asdict(tuning)
    if num_items <= EASE_MAX_ITEMS:
        tuning = tune(ease_matrix, EASE_GRID, *held_out)
        rankings["EASE"] = ease_ranking(*common, **tuning.settings)
        notes["EASE"] = asdict(tuning)
    else:
        notes["EASE"] = f"left out: it inverts a matrix of items x items, {num_items} > {EASE_MAX_ITEMS} items"
    if has_sasrec():
        part = draw_samples(validation, SASREC_USERS)
        rankings["SASRec"] = sasrec_ranking(*common, part)
        users = len(part["target"])
        notes["SASRec"] = f"best of 5, 10, … 40 epochs by NDCG@10 of {users} validation samples, history not excluded"
    else:
        notes["SASRec"] = 'left out: pip install "lasar_hf[baselines]" adds it'
    return rankings, notes
