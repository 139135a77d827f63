"""
Exact match and depth by number of links, for the test users of the routines, as a table and as `by_links.png`.

    python recipes/routines/by_links.py direct=outputs/routines/stage1@0 LASAR-SFT=outputs/routines/stage2
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

from lasar_hf import LasarForGenerativeRec, LasarProcessor
from lasar_hf.data import PreparedData
from lasar_hf.data.routines import MAX_LINKS, links
from lasar_hf.evaluation import recommend_samples
from lasar_hf.files import atomic_file


matplotlib.use("Agg")


def main(models: list[str], data_dir: str = "outputs/routines/data") -> dict[str, list[float]]:
    """
    Print a row of a table for each `name=path`, or `name=path@N` with `N` latent steps. Returns the numbers by name:
    exact match at each number of links, mean depth, share of users whose depth is their number of links.
    """
    samples = PreparedData.load(data_dir).samples["test"]
    needed, targets = np.array([links(history) for history in samples["history"]]), np.array(samples["target"])
    columns = " | ".join(map(str, range(1, MAX_LINKS + 1)))
    print(f"| links | {columns} | mean depth | depth = links |\n|---|" + "---:|" * (MAX_LINKS + 2))
    rows = {}
    for entry in models:
        name, _, location = entry.partition("=")
        path, _, depth = location.partition("@")
        model, processor = LasarForGenerativeRec.from_pretrained(path).eval(), LasarProcessor.from_pretrained(path)
        output = recommend_samples(model, samples, processor, 10, 10, int(depth) if depth else None)
        hits = output.items[:, 0] == targets
        rows[name] = [float(hits[needed == number].mean()) for number in range(1, MAX_LINKS + 1)]
        rows[name] += [float(output.latent_steps.mean()), float((output.latent_steps == needed).mean())]
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in rows[name]) + " |", flush=True)
    return rows


def plot(rows: dict[str, list[float]], path: Path) -> None:
    """Exact match by number of links, a line per model."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    for number, (name, row) in enumerate(rows.items()):
        width = len(rows) - number  # lines that are drawn later are thinner, so that equal ones are both seen
        axes.plot(range(1, MAX_LINKS + 1), row[:MAX_LINKS], marker="o", linewidth=1 + 0.6 * width, label=name)
    axes.set(xlabel="links from the last item to the next", ylabel="exact match", ylim=(-0.05, 1.05))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


if __name__ == "__main__":
    plot(main(sys.argv[1:]), Path("outputs/routines/by_links.png"))
