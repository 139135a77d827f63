"""
Time and memory of each step of the preparation on generated interactions: a CSV of users, items and times.

    python recipes/benchmarks/prepare.py --rows 10000000

Each step runs in its own process, so that its peak memory is measured alone. The popularity of items follows a power
law, and each user prefers one part of the catalogue.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv


RECIPE = Path(__file__).resolve().parents[1] / "prepare.py"
STEPS = ("interactions", "embeddings", "semantic_ids", "chains", "segments", "tokenizer", "samples", "card")
BLOCK = 1_000_000  # rows that are generated at a time
COLUMNS = {"title": "title", "brand": "brand", "categories": "categories"}


def interactions(rows: int, users: int, items: int, seed: int) -> Iterator[pa.Table]:
    """Random rows `user_id`, `item_id`, `timestamp`, in blocks."""
    generator = np.random.default_rng(seed)
    for start in range(0, rows, BLOCK):
        size = min(BLOCK, rows - start)
        user = generator.integers(0, users, size)
        item = (user * 7919 + (generator.pareto(1.2, size) * 20).astype(np.int64)) % items
        yield pa.table({"user_id": user, "item_id": item, "timestamp": generator.integers(0, 10**9, size)})


def write_shop(folder: Path, rows: int, seed: int, items: int | None = None) -> None:
    """`interactions.csv` with about ten rows per user, and `items.csv`, by default with one item per fifty rows."""
    users, items = max(rows // 10, 1), items or max(rows // 50, 50)
    blocks = interactions(rows, users, items, seed)
    first = next(blocks)
    with csv.CSVWriter(folder / "interactions.csv", first.schema) as file:
        for block in chain([first], blocks):
            file.write_table(block)
    number = np.arange(items)
    kind, brand = number % 60, number % 200
    table = {
        "item_id": number,
        "title": [f"Thing number {n} of kind {k}" for n, k in enumerate(kind)],
        "brand": [f"Brand{b}" for b in brand],
        "categories": [f"Shop>Kind{k}" for k in kind],
    }
    csv.write_csv(pa.table(table), folder / "items.csv")


def measure(folder: Path, step: str) -> dict[str, object]:
    """Time and peak memory of one step."""
    source_args = {
        "interactions": str(folder / "interactions.csv"), "items": str(folder / "items.csv"), "text_columns": COLUMNS
    }  # fmt: skip
    command = [
        sys.executable, str(RECIPE), "--output_dir", str(folder / "data"), "--source", "table",
        "--source_args", json.dumps(source_args), "--tokenizer_size", "2000", "--steps", step,
    ]  # fmt: skip
    # The operating system reports the peak of all children together, so a process in between runs this one alone.
    probe = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode; "
        "print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", probe, *command], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    code, peak = map(int, done.stdout.split())
    if code:
        raise SystemExit(f"Step {step} failed:\n{done.stderr[-3000:]}")
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes on macOS, KiB elsewhere
    return {"step": step, "seconds": seconds, "peak_gib": peak / unit}


def benchmark(args: argparse.Namespace) -> dict:
    """Measure every step; the report also has the counts of the data card."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        folder = Path(name)
        write_shop(folder, args.rows, args.seed, args.items)
        steps = [measure(folder, step) for step in STEPS]
        card = json.loads((folder / "data" / "data_card.json").read_text(encoding="utf-8"))
    return {
        "rows": args.rows, **card["counts"], "seconds": sum(step["seconds"] for step in steps),
        "peak_gib": max(step["peak_gib"] for step in steps), "steps": steps,
    }  # fmt: skip


def show(report: dict) -> None:
    """Print the report as two tables."""
    for name, value in report.items():
        if name != "steps":
            print(f"{name:20} {value:,.2f}" if isinstance(value, float) else f"{name:20} {value:,}")
    print("\n| step | seconds | peak GiB |\n|---|---:|---:|")
    for step in report["steps"]:
        print(f"| {step['step']} | {step['seconds']:.0f} | {step['peak_gib']:.2f} |")


def main(argv: list[str]) -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="Number of interactions.")
    parser.add_argument("--items", type=int, help="Number of items; one per fifty interactions by default.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random data.")
    parser.add_argument("--scratch", help="Folder for the files, 1 GiB per million rows; a temporary one by default.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    args = parser.parse_args(argv)
    report = benchmark(args)
    print(json.dumps(report, indent=1)) if args.json else show(report)


if __name__ == "__main__":
    main(sys.argv[1:])
