"""From recommendations to one row of numbers, from rows to a table, from a table to files."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
    The row of numbers of one recommender, whatever model it is.

    Args:
        predictions (`Tensor`, `np.ndarray` or nested `list` of shape `(U, k)`): item rows, best first, `-1` pads.
        targets (of shape `(U,)`): the target's item row.
        num_items (`int`): size of the catalogue.
        latent_steps (of shape `(U,)`, *optional*): number of latent steps each user took.
        seconds (`float`, *optional*): wall-clock time of all users together.
        ks (`Sequence[int]`, *optional*, defaults to `(5, 10, 20)`): cut-offs.

    Returns:
        `dict` of [`score_predictions`], with `mean_depth` if `latent_steps` is given and `ms_per_user` (milliseconds)
        if `seconds` is given.

    Raises:
        `ValueError`: as [`score_predictions`], or `latent_steps` that are not one per user.
    """
    row = score_predictions(predictions, targets, num_items, ks)
    if latent_steps is not None:
        latent_steps = np.asarray(latent_steps)
        if latent_steps.shape != (row["n"],):
            raise ValueError(f"latent_steps of shape {latent_steps.shape} must hold one for each of {row['n']} users")
        row["mean_depth"] = float(latent_steps.mean())
    if seconds is not None:
        row["ms_per_user"] = 1000.0 * seconds / row["n"]
    return row


def comparison_table(rows: Mapping[str, Row]) -> str:
    """
    Markdown table with a line for each recommender and a column for each metric.

    Args:
        rows (`Mapping[str, Mapping]`): from a recommender's name to its numbers. Columns come in the order in which
            they first occur; a number a recommender does not have is shown as `–`.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in rows.items():
        cells = [_cell(column, row[column]) if column in row else "–" for column in columns]
        lines.append("| " + " | ".join([name.replace("|", r"\|"), *cells]) + " |")
    return "\n".join(lines) + "\n"


def save_report(folder: str | os.PathLike, rows: Mapping[str, Row], details: Mapping[str, Any] | None = None) -> None:
    """
    Writes `report.json` (`{"results": rows, "details": details}`) and `report.md` ([`comparison_table`]).

    Each file is replaced whole or not at all; the folder is made if it is missing.

    Args:
        folder (`str` or `PathLike`): where to write.
        rows (`Mapping[str, Mapping]`): from a recommender's name to its numbers.
        details (`Mapping`, *optional*): what else to keep beside the numbers: settings, seed, versions.

    Raises:
        `ValueError`: a number that is not finite, which JSON cannot hold.
        `TypeError`: a detail that JSON cannot hold.
    """
    contents = {
        "report.json": json.dumps({"results": rows, "details": details or {}}, indent=2, allow_nan=False) + "\n",
        "report.md": comparison_table(rows),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, folder / name)


def _cell(column: str, value: float | int) -> str:
    if isinstance(value, int):
        return str(value)
    # Depth and milliseconds are read at a glance; ranking metrics differ in the third digit.
    return f"{value:.2f}" if column in ("mean_depth", "ms_per_user") else f"{value:.4f}"
