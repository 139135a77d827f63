"""Results of an evaluation in the card of a checkpoint: a section, and the model index that the Hub reads."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .headings import join_headings, split_headings
from .model_card import add_section, folder_card, save_card


METRICS = {"HR@10": "hit_rate", "NDCG@10": "ndcg"}  # columns of a report, and types of the Hub's model index
HEADING = "Results"


def add_results(
    folder: str | os.PathLike,
    report: Mapping[str, Any],
    dataset: str = "own data",
    rows: Mapping[str, str] | None = None,
) -> None:
    """
    Write the results of an evaluation into the card of a checkpoint. Those of the same part of the data are replaced.

    Args:
        folder (`str` or `PathLike`):
            Folder of the checkpoint.
        report (`Mapping`):
            Content of the `report.json` that `recipes/eval.py` wrote.
        dataset (`str`, *optional*, defaults to `"own data"`):
            Name of the data set.
        rows (`Mapping[str, str]`, *optional*):
            Rows of the report that are results of this checkpoint, and what the card calls them. By default those
            whose path in the report is the folder.

    Raises:
        `ValueError`: if the report has no row of the checkpoint.
    """
    rows = own_rows(folder, report) if rows is None else rows
    if not rows:
        raise ValueError(f"The report has no results of {folder}. Pass the names of its rows.")
    details, card = report["details"], folder_card(folder)
    split = details.get("arguments", {}).get("split", "test")
    before = split_headings(split_headings(card.text).get(HEADING, ""), 3)
    parts = {name: text for name, text in before.items() if name} | {split.capitalize(): text_of(report, rows)}
    add_section(card, HEADING, join_headings(parts, 3))
    others = [result for result in card.data.eval_results or [] if result.dataset_split != split]
    title = card.text.lstrip().splitlines()[0].removeprefix("# ")
    card.data.model_name = card.data.model_name or title
    card.data.eval_results = others + eval_results(report, rows, dataset, split)
    save_card(card, folder)


def own_rows(folder: str | os.PathLike, report: Mapping[str, Any]) -> dict[str, str]:
    """Rows of a report whose checkpoint is in a folder, and how the card calls them."""
    rows = {}
    for entry in report["details"].get("arguments", {}).get("models", []):
        name, _, location = entry.partition("=")
        path, _, depth = location.partition("@")
        if Path(path).resolve() != Path(folder).resolve():
            continue
        how = {"": "", "text": ", with written reasoning"}.get(depth, f", {depth} latent steps")
        rows[name] = f"this model{how}"
        rows[f"{name} + memory"] = f"this model + item memory{how}"
    return {name: label for name, label in rows.items() if name in report["results"]}


def text_of(report: Mapping[str, Any], rows: Mapping[str, str]) -> str:
    """A sentence on how it was measured, the table with the baselines, the depths, and the test against item-kNN."""
    details, results = report["details"], report["results"]
    others = {name.partition("=")[0] for name in details.get("arguments", {}).get("models", [])}
    others |= {f"{name} + memory" for name in others}
    labels = {**rows, **{name: name for name in results if name not in others and name not in rows}}
    lines = ["| | " + " | ".join(METRICS) + " | latent steps |", "|---|---:|---:|---:|"]
    for name, label in labels.items():
        row, ranges = results[name], details.get("intervals", {}).get(name, {})
        cells = [
            f"{row[metric]:.4f}" + ("" if metric not in ranges else " ({:.4f} – {:.4f})".format(*ranges[metric]))
            for metric in METRICS
        ]
        depth = f"{row['mean_depth']:.2f}" if "mean_depth" in row else "–"
        bold = f"**{label}**" if name in rows else label
        lines.append(f"| {bold} | {' | '.join(cells)} | {depth} |")
    excluded = {True: " without those of the history", False: " with those of the history"}
    users, which = results[next(iter(rows))]["n"], excluded.get(details.get("exclude_history"), "")
    intro = f"Rank of the held-out item among all items{which}; {users:,} samples."
    if "intervals" in details:
        intro += " In brackets the 95 % interval of a bootstrap over users."
    tests = [test_sentence(details, name, label) for name, label in rows.items()]
    depths = [depth_table(details["depths"][name]) for name in rows if name in details.get("depths", {})][:1]
    return "\n\n".join([intro, "\n".join(lines), *filter(None, tests), *depths])


def test_sentence(details: Mapping[str, Any], name: str, label: str) -> str:
    """The difference of a row to item-kNN, if it was tested."""
    test = details.get("NDCG@10_against_item-kNN", {}).get(f"{name} - item-kNN")
    if test is None:
        return ""
    return (
        f"NDCG@10 of {label} minus that of item-kNN: {test['difference']:+.4f} ({test['low']:+.4f} to "
        f"{test['high']:+.4f}, p = {test['p_value']:.4f})."
    )


def depth_table(counts: list[int]) -> str:
    """Share of the users at each number of latent steps, from their counts."""
    total, depths = sum(counts), range(len(counts))
    return "\n".join(
        f"| {' | '.join([name, *cells])} |"
        for name, cells in (
            ("latent steps", [str(depth) for depth in depths]),
            ("---", ["---:" for _ in depths]),
            ("samples", [f"{counts[depth] / total:.1%}" for depth in depths]),
        )
    )


def eval_results(report: Mapping[str, Any], rows: Mapping[str, str], dataset: str, split: str) -> list[EvalResult]:
    """Metrics of the rows for the Hub's model index."""
    details = report["details"]
    results = []
    for name, label in rows.items():
        for metric, kind in METRICS.items():
            ranges = details.get("intervals", {}).get(name, {}).get(metric)
            results.append(
                EvalResult(
                    task_type="generative-recommendation",
                    task_name="Generative recommendation",
                    dataset_type=dataset,
                    dataset_name=dataset,
                    dataset_split=split,
                    metric_type=kind,
                    metric_name=f"{metric} ({label})",
                    metric_value=report["results"][name][metric],
                    metric_args={"k": 10} | ({} if ranges is None else {"interval_95": list(ranges)}),
                )
            )
    return results
