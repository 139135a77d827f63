"""The mixture that stage 1 trains on: the main task and the alignment tasks, by weights."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from datasets import Dataset, concatenate_datasets

from .prepared import PreparedData
from .prompts import PromptEncoder
from .rows import ALIGNMENT_TASKS, alignment_rows, history_rows, sft_rows


def mix_rows(tables: Mapping[str, Dataset], weights: Mapping[str, float] | None = None, seed: int = 0) -> Dataset:
    """
    Mix tables of rows, such as the main task and the alignment tasks, by weights.

    Args:
        tables (`Mapping[str, Dataset]`):
            Rows by name; columns that not all tables have are left out.
        weights (`Mapping[str, float]`, *optional*):
            How often each row of a table is seen in a pass over the mix: `2` gives each row twice, `0.25` a quarter of
            the rows (drawn by `seed`), `1.5` each row once and half of them again, `0` none. A table without a weight
            has `1`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `Dataset`: the rows of one table after those of another; trainers shuffle them anew in each epoch.

    Raises:
        ValueError: a weight of an unknown table, one that is negative or not finite, or no row left.
    """
    weights = dict.fromkeys(tables, 1.0) | dict(weights or {})
    parts = []
    for number, (name, weight) in enumerate(weights.items()):
        if name not in tables:
            raise ValueError(f"`weights` names {name!r}, which is no table: choose among {', '.join(tables)}.")
        if not 0 <= weight < np.inf:
            raise ValueError(f"the weight of {name!r} is {weight}, expected a number of 0 or more.")
        size = len(tables[name])
        whole, part = divmod(weight, 1)
        drawn = np.random.default_rng([seed, number]).permutation(size)[: round(part * size)]
        parts.append(tables[name].select(np.concatenate([np.tile(np.arange(size), int(whole)), np.sort(drawn)])))
    if not sum(map(len, parts)):
        raise ValueError("the mix has no rows: give a table with rows a weight above 0.")
    columns = [column for column in parts[0].column_names if all(column in part.column_names for part in parts)]
    return concatenate_datasets([part.select_columns(columns) for part in parts])


def stage1_rows(data: PreparedData, encoder: PromptEncoder, rows: Sequence[str]) -> Dataset:
    """
    The rows of stage 1 that a recipe asks for, mixed.

    Args:
        data (`PreparedData`):
            What `recipes/prepare.py` left behind.
        encoder (`PromptEncoder`):
            Token ids of histories and items.
        rows (`Sequence[str]`):
            Kinds of rows, each `name` or `name=weight` (see `mix_rows`): `next_item` (`sft_rows`), `history`
            (`history_rows`), `alignment` (`alignment_rows`) or single tasks of it (`ALIGNMENT_TASKS`).

    Returns:
        `Dataset`: `input_ids`, `labels`.

    Raises:
        ValueError: an unknown or repeated kind, a weight that is no number of 0 or more, or no row left.
    """
    align = partial(alignment_rows, data.interactions, data.split, encoder)
    makers = {
        "next_item": lambda: sft_rows(data.samples["train"], encoder),
        "history": lambda: history_rows(data.split, encoder),
        "alignment": align,
        **{task: partial(align, [task]) for task in ALIGNMENT_TASKS},
    }
    weights = _row_weights(rows)
    unknown = sorted(set(weights) - set(makers))
    if unknown:
        raise ValueError(f"rows holds {unknown}: choose among {sorted(makers)}.")
    return mix_rows({name: makers[name]() for name in weights}, weights).select_columns(["input_ids", "labels"])


def _row_weights(rows: Sequence[str]) -> dict[str, float]:
    """Weight of each kind of row: `["next_item", "alignment=0.5"]` is 1 and 0.5."""
    weights = {}
    for entry in rows:
        name, sign, weight = entry.partition("=")
        if name in weights:
            raise ValueError(f"rows holds {name!r} twice: give it once, with a weight.")
        try:
            weights[name] = float(weight) if sign else 1.0
        except ValueError:
            raise ValueError(f"rows holds {entry!r}: expected a name, or name=weight with a number.") from None
    return weights
