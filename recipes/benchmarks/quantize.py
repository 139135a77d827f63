"""
Compare residual k-means with faiss.ResidualQuantizer: time and error on the same points.

    python recipes/benchmarks/quantize.py
    python recipes/benchmarks/quantize.py --data outputs/scientific/data/embeddings.npy
    python recipes/benchmarks/quantize.py --collisions 1000000

Time: fitting and encoding the same points. Error: mean squared distance of the points to their reconstructions.
faiss runs with its defaults (beam of 5) and, as "faiss_greedy", with a beam of 1, which chooses codes level by level
as Semantic IDs do. All use the same number of threads (set OMP_NUM_THREADS). Ratios are ratios of medians.
"""

import argparse
import json
import resource
import statistics
import time

import numpy as np
import torch

from lasar_hf.semantic_ids import ResidualKMeans, resolve_collisions


BLOCK = 65_536  # points drawn at a time


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line; the default sizes are those of a mid-sized catalogue with sentence embeddings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100_000, help="number of points (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=384, help="width of the points (default: %(default)s)")
    parser.add_argument("--levels", type=int, default=4, help="levels of a Semantic ID (default: %(default)s)")
    parser.add_argument("--codes", type=int, default=256, help="codes per level, power of two (default: %(default)s)")
    parser.add_argument(
        "--data", default="mixture",
        help="mixture (like text embeddings), gaussian (no structure) or a .npy file of shape (N, D)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=1, help="runs of each quantizer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--collisions", type=int, metavar="N", help="also fit N points and resolve their collisions, without faiss"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(argv)
    if args.codes.bit_count() != 1:
        parser.error(f"--codes is {args.codes}; faiss expects a power of two.")
    return args


def make_points(data: str, num_points: int, dim: int, seed: int) -> np.ndarray:
    """
    Points of shape `(N, D)`, float32.

    The mixture resembles embeddings of item text: rows of length 1, groups of very different sizes (Zipf), and few
    strong directions (variances fall as 1/rank) between and within the groups.
    """
    if data not in ("mixture", "gaussian"):
        return np.load(data).astype(np.float32)
    rng = np.random.default_rng(seed)
    points = np.empty((num_points, dim), dtype=np.float32)
    scale = (1 / np.sqrt(np.arange(1, dim + 1))).astype(np.float32)
    groups = rng.standard_normal((1000, dim), dtype=np.float32) * scale
    share = 1 / np.arange(1, len(groups) + 1)
    for start in range(0, num_points, BLOCK):
        block = points[start : start + BLOCK]
        rng.standard_normal(out=block, dtype=np.float32)
        if data == "mixture":
            block *= 0.7 * scale
            block += groups[rng.choice(len(groups), len(block), p=share / share.sum())]
            block /= np.linalg.norm(block, axis=1, keepdims=True)
    return points


def fit_faiss(points: np.ndarray, levels: int, codes: int, beam: int | None) -> np.ndarray:
    """Reconstructions by faiss, `(N, D)`; a beam of `None` is faiss' default."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    quantizer = faiss.ResidualQuantizer(points.shape[1], levels, codes.bit_length() - 1)
    if beam is not None:
        quantizer.max_beam_size = beam
    quantizer.train(points)
    return quantizer.decode(quantizer.compute_codes(points))


def fit_kmeans(points: np.ndarray, levels: int, codes: int, seed: int) -> np.ndarray:
    """Reconstructions by `ResidualKMeans`, `(N, D)`."""
    quantizer = ResidualKMeans(levels, codes, seed)
    return quantizer.decode(quantizer.fit_encode(points))


def compare(args: argparse.Namespace) -> dict[str, float]:
    """Seconds and errors of the three quantizers, and their ratios."""
    points = make_points(args.data, args.points, args.dim, args.seed)
    calls = {
        "ours": lambda: fit_kmeans(points, args.levels, args.codes, args.seed),
        "faiss": lambda: fit_faiss(points, args.levels, args.codes, None),
        "faiss_greedy": lambda: fit_faiss(points, args.levels, args.codes, 1),
    }
    # 1. The quantizers take turns, so that a busy machine slows all of them.
    seconds, error = {name: [] for name in calls}, {}
    for _ in range(args.repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            decoded = call()
            seconds[name].append(time.perf_counter() - start)
            error[name] = float(np.square(points - decoded).sum(axis=1).mean(dtype=np.float64))
    # 2. Medians and ratios.
    result = {f"seconds_{name}": statistics.median(times) for name, times in seconds.items()}
    result |= {f"error_{name}": value for name, value in error.items()}
    for name in ("faiss", "faiss_greedy"):
        result[f"time_over_{name}"] = result["seconds_ours"] / result[f"seconds_{name}"]
        result[f"error_over_{name}"] = error["ours"] / error[name]
    return result


def collisions(args: argparse.Namespace) -> dict[str, float]:
    """Seconds for fitting and for resolving collisions, and the peak memory of this process."""
    points = make_points(args.data, args.collisions, args.dim, args.seed)
    quantizer = ResidualKMeans(args.levels, args.codes, args.seed)
    start = time.perf_counter()
    before = quantizer.fit_encode(points)
    fitted = time.perf_counter()
    after = resolve_collisions(before, quantizer, points)
    done = time.perf_counter()
    return {
        "collisions_points": len(points),
        "collisions_before": len(points) - len(np.unique(before, axis=0)),
        "collisions_after": len(points) - len(np.unique(after, axis=0)),
        "collisions_moved": int((before != after).any(axis=1).sum()),
        "collisions_fit_seconds": fitted - start,
        "collisions_resolve_seconds": done - fitted,
        "collisions_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse(argv)
    try:
        import faiss
    except ImportError as error:
        raise SystemExit("quantize.py needs faiss; run `pip install 'lasar_hf[embed]'`.") from error
    result = compare(args)
    if args.collisions:
        result |= collisions(args)
    if args.json:
        versions = {"faiss": faiss.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
        print(json.dumps({**result, **versions, "arguments": vars(args)}))
        return
    print("| measure | value |\n|---|---:|")
    for name, value in result.items():
        print(f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value:,} |")


if __name__ == "__main__":
    main()
