"""Rows of numbers, the table of several rows, and its files."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_file
from .metrics import DEFAULT_KS, score_predictions


def evaluate_recommendations(
    predictions: Any,
    targets: Any,
    num_items: int,
    latent_steps: Any = None,
    seconds: float | None = None,
    ks: Sequence[int] = DEFAULT_KS,
) -> dict[str, float | int]:
    """
    Row of the results table for any recommender: the numbers of [`score_predictions`], depth and time.

    Args:
        predictions, targets, num_items, ks:
            As for [`score_predictions`], whose `references` are the targets.
        latent_steps (of shape `(U,)`, *optional*):
            Number of latent steps of each user, for `mean_depth`.
        seconds (`float`, *optional*):
            Wall-clock time of all users together, for `ms_per_user` (milliseconds).
    """
    row = score_predictions(predictions, targets, num_items, ks)
    if latent_steps is not None:
        latent_steps = np.asarray(latent_steps)
        if latent_steps.shape != (row["n"],):
            raise ValueError(f"latent_steps has shape {latent_steps.shape}; expected {(row['n'],)}.")
        row["mean_depth"] = float(latent_steps.mean())
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
            digits = 2 if column in ("mean_depth", "ms_per_user") else 4
            value = row.get(column, "–")
            cells.append(f"{value:.{digits}f}" if isinstance(value, float) else str(value))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def save_report(
    folder: str | os.PathLike, rows: Mapping[str, Mapping[str, float | int]], details: Mapping[str, Any] | None = None
) -> None:
    """
    Write `report.json` (`{"results": rows, "details": details}`) and `report.md` ([`comparison_table`]).

    Args:
        folder (`str` or `PathLike`), rows (`Mapping[str, Mapping]`):
            Folder, created if missing, and the numbers of each recommender by its name.
        details (`Mapping`, *optional*):
            Anything else to keep with the numbers, such as settings or the seed.

    Raises:
        `ValueError`: if a number is not finite. Nothing is written then.
    """
    content = json.dumps({"results": rows, "details": details or {}}, indent=2, allow_nan=False) + "\n"
    for name, text in {"report.json": content, "report.md": comparison_table(rows)}.items():
        with atomic_file(Path(folder, name)) as temporary:
            temporary.write_text(text, encoding="utf-8")
