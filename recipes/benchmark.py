"""
Measurements whose tables stand in the README.

    python recipes/benchmark.py decode [--json] [--size qwen3-0.6b]

The first word names a file of `recipes/benchmarks/`; `--help` behind it tells its options.
"""

import runpy
import sys
from pathlib import Path


FOLDER = Path(__file__).resolve().parent
# Python puts a script's folder first on the path, where this folder's evaluate.py would hide the `evaluate` package.
sys.path[:] = [entry for entry in sys.path if entry != str(FOLDER)]


def main(argv: list[str]) -> None:
    """Run the benchmark that the first argument names with the others."""
    names = sorted(path.stem for path in (FOLDER / "benchmarks").glob("*.py"))
    if not argv or argv[0] not in names:
        raise SystemExit(f"usage: python recipes/benchmark.py {{{','.join(names)}}} [options]")
    runpy.run_path(str(FOLDER / "benchmarks" / f"{argv[0]}.py"))["main"](argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
