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


def main(models: list[str], data_dir: str = "outputs/routines/data") -> list[str]:
    """Rows of a table, one per `name=path` or `name=path@N` with `N` latent steps; printed as well."""
    samples = PreparedData.load(data_dir).samples["test"]
    needed, targets = np.array([links(history) for history in samples["history"]]), np.array(samples["target"])
    columns = " | ".join(f"{number} links" for number in range(1, MAX_LINKS + 1))
    rows = [f"| model | {columns} | mean depth | depth = links |", "|---|" + "---:|" * (MAX_LINKS + 2)]
    for entry in models:
        name, _, location = entry.partition("=")
        path, _, depth = location.partition("@")
        model, processor = LasarForGenerativeRec.from_pretrained(path).eval(), LasarProcessor.from_pretrained(path)
        output = recommend_samples(model, samples, processor, 10, 10, int(depth) if depth else None)
        hits = output.items[:, 0] == targets
        cells = [f"{hits[needed == number].mean():.3f}" for number in range(1, MAX_LINKS + 1)]
        cells += [f"{output.latent_steps.mean():.2f}", f"{(output.latent_steps == needed).mean():.3f}"]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join(rows))
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
