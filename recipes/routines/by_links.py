"""
Exact match, depth and time by number of links, for the test users of the routines, as a table and as `by_links.png`.

    python recipes/routines/by_links.py direct=outputs/routines/stage1@0 LASAR-SFT=outputs/routines/stage2

A model is `name=path`, `name=path@N` with `N` latent steps, or `name=path@text`, which writes a chain of thought.
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

TIMED_USERS = 100  # one at a time
BATCH_SIZE = 64
COLUMNS = ["mean depth", "depth = links", "tokens of text", f"ms, batch of {BATCH_SIZE}", "ms, one user"]


def main(models: list[str], data_dir: str = "outputs/routines/data") -> dict[str, dict[str | int, float]]:
    """
    Print a row of a table for each model. Returns the numbers by its name: exact match for each number of links, and
    `COLUMNS`: mean depth, share of users whose depth is their number of links, mean length of the text that was
    written, and milliseconds per user.
    """
    samples = PreparedData.load(data_dir).samples["test"]
    needed = np.array([links(history) for history in samples["history"]])
    columns = [*range(1, MAX_LINKS + 1), *COLUMNS]
    print(f"| links | {' | '.join(map(str, columns))} |\n|---|" + "---:|" * len(columns))
    rows = {}
    for entry in models:
        name, _, location = entry.partition("=")
        rows[name] = row = evaluate(*location.partition("@")[::2], samples, needed)
        cells = [f"{row[column]:.{1 if 'ms' in str(column) else 3}f}" for column in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return rows


def evaluate(path: str, reasoning: str, samples, needed: np.ndarray) -> dict[str | int, float]:
    """The numbers of one model; `reasoning` is a number of latent steps, `text`, or empty for the policy."""
    model, processor = LasarForGenerativeRec.from_pretrained(path).eval(), LasarProcessor.from_pretrained(path)
    options = {"latent_steps": int(reasoning) if reasoning.isdecimal() else None, "write_text": reasoning == "text"}

    def recommend(users, batch_size):
        return recommend_samples(model, users, processor, 10, 10, batch_size=batch_size, **options)

    recommend(samples.select(range(BATCH_SIZE)), BATCH_SIZE)  # warm up
    output = recommend(samples, BATCH_SIZE)
    single = recommend(samples.select(range(TIMED_USERS)), 1)
    hits = output.items[:, 0] == np.array(samples["target"])
    row = {number: float(hits[needed == number].mean()) for number in range(1, MAX_LINKS + 1)}
    text_tokens = 0.0 if output.text_tokens is None else float(output.text_tokens.mean())
    values = [
        float(output.latent_steps.mean()), float((output.latent_steps == needed).mean()), text_tokens,
        1000 * output.seconds / len(samples), 1000 * single.seconds / TIMED_USERS,
    ]
    return row | dict(zip(COLUMNS, values, strict=True))


def plot(rows: dict[str, dict[str | int, float]], path: Path) -> None:
    """Exact match by number of links, a line per model."""
    from matplotlib import pyplot

    numbers = range(1, MAX_LINKS + 1)
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    for number, (name, row) in enumerate(rows.items()):
        width = len(rows) - number  # lines that are drawn later are thinner, so that equal ones are both seen
        exact = [row[needed] for needed in numbers]
        axes.plot(numbers, exact, marker="o", linewidth=1 + 0.6 * width, label=name)
    axes.set(xlabel="links from the last item to the next", ylabel="exact match", ylim=(-0.05, 1.05))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


if __name__ == "__main__":
    plot(main(sys.argv[1:]), Path("outputs/routines/by_links.png"))
