"""Quality of Semantic IDs in numbers: collisions, use of the codes, reconstruction error, neighbours kept."""

import numpy as np

from .quantizer import ResidualKMeans


NEIGHBOURS = 10  # nearest neighbours an item
QUERIES = 2_000  # items whose neighbours are looked up; a share estimated on them is good to about 0.01
CHUNK = 250  # queries whose similarities to all items exist at one time


def quality_report(
    codes: np.ndarray, embeddings: np.ndarray, quantizer: ResidualKMeans | None = None, seed: int = 0
) -> dict:
    """
    Measure the Semantic IDs of a catalogue.

    Args:
        codes (`np.ndarray` of shape `(I, M)`):
            Semantic IDs of the items.
        embeddings (`np.ndarray` of shape `(I, D)`):
            Vectors that neighbours and errors are measured in.
        quantizer ([`ResidualKMeans`], *optional*):
            The quantizer the codes come from; adds what the resolution of collisions changed and the error.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sample of items whose neighbours are looked up.

    Returns:
        `dict` with
            - **items** (`int`) -- `I`.
            - **collisions** (`int`) -- `I` minus the number of different SIDs.
            - **levels** (`list[dict]`) -- for each level `codes_used`; `entropy_bits` of the code; `prefixes`, number
              of different codes up to this level; `neighbours_kept`, share of the items' 10 nearest neighbours
              (cosine) with the same codes up to this level; `neighbours_by_chance`, that share for random pairs.
            - **collisions_before**, **items_moved** (`int`) -- with a quantizer: collisions of the codes that its
              `encode` gives, and items whose codes differ from these.
            - **reconstruction_error** (`float`) -- with a quantizer: mean squared distance of the embeddings to the
              vectors that the codes stand for, as a share of their variance.

    Raises:
        `ValueError`: `codes` and `embeddings` differ in their number of rows.
    """
    codes, embeddings = np.asarray(codes), np.asarray(embeddings, dtype=np.float32)
    if codes.ndim != 2 or embeddings.ndim != 2 or len(codes) != len(embeddings) or not len(codes):
        raise ValueError(
            f"codes has shape {codes.shape} and embeddings {embeddings.shape}: expected one row an item in both."
        )
    report = {"items": len(codes), "collisions": _collisions(codes), "levels": _levels(codes, embeddings, seed)}
    if quantizer is not None:
        before = quantizer.encode(embeddings)
        report["collisions_before"] = _collisions(before)
        report["items_moved"] = int((before != codes).any(axis=1).sum())
        variance = embeddings.var(axis=0, dtype=np.float64).sum()
        error = np.square(embeddings - quantizer.decode(codes), dtype=np.float64).sum(axis=1).mean()
        report["reconstruction_error"] = float(error / variance) if variance > 0 else 0.0
    return report


def _collisions(codes: np.ndarray) -> int:
    return len(codes) - len(np.unique(codes, axis=0))


def _levels(codes: np.ndarray, embeddings: np.ndarray, seed: int) -> list[dict]:
    items, neighbours = _neighbours(embeddings, seed)
    same = codes[items][:, None, :] == codes[neighbours]  # (queries, neighbours, M)
    kept = np.logical_and.accumulate(same, axis=2)
    levels = []
    for level in range(codes.shape[1]):
        share = np.unique(codes[:, level], return_counts=True)[1] / len(codes)
        prefixes = np.unique(codes[:, : level + 1], axis=0, return_counts=True)[1]
        pairs = len(codes) * (len(codes) - 1)
        levels.append(
            {
                "codes_used": len(share),
                "entropy_bits": float(share @ np.log2(1 / share)),
                "prefixes": len(prefixes),
                "neighbours_kept": float(kept[:, :, level].mean()) if kept.size else 0.0,
                "neighbours_by_chance": float((prefixes * (prefixes - 1)).sum() / pairs) if pairs else 0.0,
            }
        )
    return levels


def _neighbours(embeddings: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items `(Q,)`, none with a zero vector, and the row numbers of their nearest neighbours by cosine `(Q, 10)`."""
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = np.divide(embeddings, norms, out=np.zeros_like(embeddings), where=norms > 0)
    items = np.random.default_rng(seed).permutation(np.flatnonzero(norms[:, 0] > 0))[:QUERIES]
    count = min(NEIGHBOURS, len(embeddings) - 1)
    found = [np.empty((0, count), dtype=np.int64)]
    for start in range(0, len(items), CHUNK):
        rows = items[start : start + CHUNK]
        similarity = unit[rows] @ unit.T
        similarity[np.arange(len(rows)), rows] = -np.inf
        found.append(np.argpartition(-similarity, max(count - 1, 0), axis=1)[:, :count])
    return items, np.concatenate(found)


def format_report(report: dict) -> str:
    """
    The report as Markdown.

    Args:
        report (`dict`):
            What [`quality_report`] returned.

    Returns:
        `str`: a line of totals and a table of the levels.
    """
    totals = f"{report['items']:,} items, {report['collisions']:,} collisions"
    if "collisions_before" in report:
        totals += (
            f" ({report['collisions_before']:,} before resolution, {report['items_moved']:,} items moved), "
            f"reconstruction error {report['reconstruction_error']:.4f} of the variance"
        )
    lines = [
        totals + ".",
        "",
        "| level | codes used | entropy (bits) | prefixes | neighbours kept | by chance |",
        "|---|---|---|---|---|---|",
    ]
    for number, level in enumerate(report["levels"], start=1):
        lines.append(
            f"| {number} | {level['codes_used']} | {level['entropy_bits']:.2f} | {level['prefixes']:,} "
            f"| {level['neighbours_kept']:.4f} | {level['neighbours_by_chance']:.4f} |"
        )
    return "\n".join(lines) + "\n"
