"""Quality of Semantic IDs: collisions, use of the codes, reconstruction error, and shared codes of near neighbours."""

import numpy as np
from sklearn.neighbors import NearestNeighbors

from .quantizer import Quantizer


NUM_NEIGHBOURS = 10  # per item
MAX_QUERIES = 2_000  # random items whose neighbours are looked up; enough for a standard error of about 0.01


def quality_report(codes: np.ndarray, embeddings: np.ndarray, quantizer: Quantizer | None = None) -> dict:
    """
    Measure the Semantic IDs of a catalogue.

    Args:
        codes (`np.ndarray` of shape `(I, M)`):
            Semantic IDs of the items.
        embeddings (`np.ndarray` of shape `(I, D)`):
            Item vectors, used for neighbours and errors.
        quantizer ([`Quantizer`], *optional*):
            The quantizer of the codes. Adds the effect of resolving collisions, and the reconstruction error.

    Returns:
        `dict` with
            - **items** (`int`) -- `I`.
            - **collisions** (`int`) -- `I` minus the number of different Semantic IDs.
            - **levels** (`list[dict]`) -- per level: `codes_used`; `entropy_bits` of the code; `prefixes`, the number
              of different prefixes up to this level; `neighbours_kept`, the share of the 10 nearest neighbours by
              cosine similarity that share the prefix; `neighbours_by_chance`, that share for random pairs.
            - **collisions_before**, **items_moved** (`int`) -- with a quantizer: collisions of the codes from its
              `encode`, and the number of items with other codes than these.
            - **reconstruction_error** (`float`) -- with a quantizer: mean squared distance of the vectors to their
              reconstructions, divided by the variance.
    """
    codes, embeddings = np.asarray(codes), np.asarray(embeddings, dtype=np.float32)
    if codes.ndim != 2 or embeddings.ndim != 2 or len(codes) != len(embeddings) or not len(codes):
        raise ValueError(
            f"codes has shape {codes.shape} and embeddings has shape {embeddings.shape}; expected one row per item in "
            "both."
        )
    report = {"items": len(codes), "collisions": _num_collisions(codes), "levels": _levels(codes, embeddings)}
    if quantizer is not None:
        before = quantizer.encode(embeddings)
        report["collisions_before"] = _num_collisions(before)
        report["items_moved"] = int((before != codes).any(axis=1).sum())
        variance = embeddings.var(axis=0, dtype=np.float64).sum()
        error = np.square(embeddings - quantizer.decode(codes), dtype=np.float64).sum(axis=1).mean()
        report["reconstruction_error"] = float(error / variance) if variance > 0 else 0.0
    return report


def _num_collisions(codes: np.ndarray) -> int:
    return len(codes) - len(np.unique(codes, axis=0))


def _levels(codes: np.ndarray, embeddings: np.ndarray) -> list[dict]:
    items, neighbours = _neighbours(embeddings)
    same_code = codes[items][:, None, :] == codes[neighbours]  # (queries, neighbours, M)
    same_prefix = np.logical_and.accumulate(same_code, axis=2)
    pairs = len(codes) * (len(codes) - 1)
    levels = []
    for level in range(codes.shape[1]):
        share = np.unique(codes[:, level], return_counts=True)[1] / len(codes)
        prefix_sizes = np.unique(codes[:, : level + 1], axis=0, return_counts=True)[1]
        levels.append(
            {
                "codes_used": len(share),
                "entropy_bits": float(share @ np.log2(1 / share)),
                "prefixes": len(prefix_sizes),
                "neighbours_kept": float(same_prefix[:, :, level].mean()) if same_prefix.size else 0.0,
                "neighbours_by_chance": float((prefix_sizes * (prefix_sizes - 1)).sum() / pairs) if pairs else 0.0,
            }
        )
    return levels


def _neighbours(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sample of items without a zero vector, `(Q,)`, and the indices of their nearest neighbours, `(Q, 10)`."""
    items = np.flatnonzero(embeddings.any(axis=1))
    items = np.random.default_rng(0).permutation(items)[:MAX_QUERIES]
    count = min(NUM_NEIGHBOURS, len(embeddings) - 1)
    if not len(items) or not count:
        return items, np.empty((len(items), count), dtype=np.int64)
    search = NearestNeighbors(n_neighbors=count + 1, metric="cosine").fit(embeddings)
    nearest = search.kneighbors(embeddings[items], return_distance=False)  # (Q, count + 1)
    # Remove the item itself. If it is not among its nearest, because of identical vectors, remove the last one.
    is_item = nearest == items[:, None]
    is_item[~is_item.any(axis=1), -1] = True
    return items, nearest[~is_item].reshape(len(items), count)


def format_report(report: dict) -> str:
    """Format the result of [`quality_report`] as Markdown: a line of totals and a table with one row per level."""
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
