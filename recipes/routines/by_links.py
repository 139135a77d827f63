"""
Exact match and depth by number of links, for the test users of the routines.

    python recipes/routines/by_links.py direct=outputs/routines/stage1@0 LASAR-SFT=outputs/routines/stage2
"""

import sys

import numpy as np

from lasar_hf import LasarForGenerativeRec, LasarProcessor
from lasar_hf.data import PreparedData
from lasar_hf.data.routines import MAX_LINKS, links
from lasar_hf.evaluation import recommend_samples


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


if __name__ == "__main__":
    main(sys.argv[1:])
