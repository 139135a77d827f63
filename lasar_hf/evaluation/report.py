"""Rows of numbers, the tables of several rows and of parts of the users, and their files."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_file
from .metrics import DEFAULT_KS, ranking_metrics, ranks, repeat_share, score_predictions


def evaluate_recommendations(
    predictions: Any,
    targets: Any,
    num_items: int,
    latent_steps: Any = None,
    seconds: float | None = None,
    ks: Sequence[int] = DEFAULT_KS,
    histories: Sequence[Sequence[int]] | None = None,
    text_tokens: Any = None,
) -> dict[str, float | int]:
    """
    Row of the results table for any recommender: the numbers of [`score_predictions`], repeats, depth and time.

    Args:
        predictions, targets, num_items, ks:
            As for [`score_predictions`], whose `references` are the targets.
        latent_steps (of shape `(U,)`, *optional*):
            Number of latent steps of each user, for `mean_depth`.
        seconds (`float`, *optional*):
            Wall-clock time of all users together, for `ms_per_user` (milliseconds).
        histories (`Sequence[Sequence[int]]` of length `U`, *optional*):
            Items of each user, for `repeats`: [`repeat_share`] of the first 10 entries.
        text_tokens (of shape `(U,)`, *optional*):
            Number of tokens of each user's written chain of thought, for `text_tokens`, their mean.
    """
    row = score_predictions(predictions, targets, num_items, ks)
    if histories is not None:
        row["repeats"] = repeat_share(predictions, histories)
    if latent_steps is not None:
        latent_steps = np.asarray(latent_steps)
        if latent_steps.shape != (row["n"],):
            raise ValueError(f"latent_steps has shape {latent_steps.shape}; expected {(row['n'],)}.")
        row["mean_depth"] = float(latent_steps.mean())
    if text_tokens is not None:
        row["text_tokens"] = float(np.mean(text_tokens))
    if seconds is not None:
        row["ms_per_user"] = 1000.0 * seconds / row["n"]
    return row


def comparison_table(rows: Mapping[str, Mapping[str, float | int]]) -> str:
    """Markdown table of the numbers of recommenders by their names; `–` where a recommender does not have a number."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| model | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, row in rows.items():
        cells = [name.replace("|", r"\|")]
        for column in columns:
            # Ranking metrics differ in the third or fourth digit, depth and milliseconds do not.
            digits = 2 if column in ("mean_depth", "text_tokens", "ms_per_user") else 4
            value = row.get(column, "–")
            cells.append(f"{value:.{digits}f}" if isinstance(value, float) else str(value))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def slice_report(
    predictions: Mapping[str, Any], targets: Any, slices: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """
    HR@10 and NDCG@10 of recommenders for parts of the users.

    Args:
        predictions (`Mapping[str, Any]`):
            Lists `(U, k)` of each recommender by its name, as for [`ranks`].
        targets (of shape `(U,)`):
            Item index of each user's target.
        slices (`Mapping[str, np.ndarray]`):
            Name of each part, and its users as `(U,)` booleans, as from [`slices`].

    Returns:
        `dict`: for `"all"` and each part `n`, the number of users, and `results`, HR@10 and NDCG@10 by the
        recommender's name. A part without users has no `results`.
    """
    target_ranks = {name: ranks(items, targets) for name, items in predictions.items()}
    report: dict[str, dict[str, Any]] = {}
    for part, users in ({"all": np.ones(len(targets), dtype=bool)} | dict(slices)).items():
        report[part] = {"n": int(users.sum())}
        if users.any():
            results = {name: ranking_metrics(values[users], ks=(10,)) for name, values in target_ranks.items()}
            report[part]["results"] = results
    return report


def slice_table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown table of a [`slice_report`]: a row per part, a column per recommender with HR@10 / NDCG@10."""
    names = list(report["all"]["results"])
    header = [name.replace("|", r"\|") for name in names]
    lines = [f"| users | n | {' | '.join(header)} |", "|---|---:|" + "---:|" * len(names)]
    for part, row in report.items():
        values = row["results"].values() if "results" in row else []
        cells = [f"{numbers['HR@10']:.4f} / {numbers['NDCG@10']:.4f}" for numbers in values] or ["–"] * len(names)
        lines.append(f"| {part} | {row['n']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def exclusion_note(exclude_history: bool) -> str:
    """The sentence under a table that says whether lists hold items of the history."""
    if exclude_history:
        return "Items of a user's history are left out of every list."
    return "Items of a user's history are not left out of the lists."


def save_report(
    folder: str | os.PathLike,
    rows: Mapping[str, Mapping[str, float | int]],
    details: Mapping[str, Any] | None = None,
    slices: Mapping[str, Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """
    Write `report.json` (`{"results": rows, "details": details}`) and `report.md` ([`comparison_table`]).

    Args:
        folder (`str` or `PathLike`), rows (`Mapping[str, Mapping]`):
            Folder, created if missing, and the numbers of each recommender by its name.
        details (`Mapping`, *optional*):
            Anything else to keep with the numbers, such as settings or the seed.
        slices (`Mapping[str, Mapping]`, *optional*):
            A [`slice_report`], which becomes `"slices"` in `report.json` and a second table in `report.md`.
        notes (`Sequence[str]`, *optional*):
            Sentences under the first table of `report.md`, such as [`exclusion_note`].

    Raises:
        `ValueError`: if a number is not finite. Nothing is written then.
    """
    content: dict[str, Any] = {"results": rows, "details": details or {}}
    tables = [comparison_table(rows)]
    if notes:
        tables.append("".join(f"* {note}\n" for note in notes))
    if slices is not None:
        content["slices"] = slices
        tables.append("HR@10 / NDCG@10 of parts of the users:\n\n" + slice_table(slices))
    files = {"report.json": json.dumps(content, indent=2, allow_nan=False) + "\n", "report.md": "\n".join(tables)}
    for name, text in files.items():
        with atomic_file(Path(folder, name)) as temporary:
            temporary.write_text(text, encoding="utf-8")
