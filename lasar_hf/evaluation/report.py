"""From recommendations to one row of numbers, from rows to a table, from a table to files."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_file
from .metrics import DEFAULT_KS, score_predictions


Row = Mapping[str, float | int]


def evaluate_recommendations(
    predictions: Any,
    targets: Any,
    num_items: int,
    latent_steps: Any = None,
    seconds: float | None = None,
    ks: Sequence[int] = DEFAULT_KS,
) -> dict[str, float | int]:
    """
    Row of the results table for one recommender, of any kind.

    Args:
        predictions, targets, num_items, ks:
            As `predictions`, `references`, `num_items` and `ks` of [`score_predictions`].
        latent_steps (of shape `(U,)`, *optional*):
            Number of latent steps of each user.
        seconds (`float`, *optional*):
            Wall-clock time of all users together.

    Returns:
        `dict`: the numbers of [`score_predictions`], `mean_depth` if `latent_steps` is given and `ms_per_user`
        (milliseconds) if `seconds` is given.
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


def comparison_table(rows: Mapping[str, Row]) -> str:
    """
    Markdown table with one line per recommender and one column per number.

    Args:
        rows (`Mapping[str, Mapping]`):
            Numbers of each recommender by its name. A number that a recommender does not have is shown as `–`.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in rows.items():
        cells = [_cell(column, row[column]) if column in row else "–" for column in columns]
        lines.append("| " + " | ".join([name.replace("|", r"\|"), *cells]) + " |")
    return "\n".join(lines) + "\n"


def save_report(folder: str | os.PathLike, rows: Mapping[str, Row], details: Mapping[str, Any] | None = None) -> None:
    """
    Write `report.json` (`{"results": rows, "details": details}`) and `report.md` ([`comparison_table`]).

    Args:
        folder (`str` or `PathLike`):
            Folder, created if missing.
        rows (`Mapping[str, Mapping]`):
            As for [`comparison_table`].
        details (`Mapping`, *optional*):
            Anything else to keep with the numbers, such as settings or the seed.

    Raises:
        `ValueError`: if a number is not finite. Nothing is written then.
    """
    content = json.dumps({"results": rows, "details": details or {}}, indent=2, allow_nan=False) + "\n"
    for name, text in {"report.json": content, "report.md": comparison_table(rows)}.items():
        with atomic_file(Path(folder, name)) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _cell(column: str, value: float | int) -> str:
    if isinstance(value, int):
        return str(value)
    # Ranking metrics differ in the third or fourth digit, depth and milliseconds do not.
    return f"{value:.2f}" if column in ("mean_depth", "ms_per_user") else f"{value:.4f}"
