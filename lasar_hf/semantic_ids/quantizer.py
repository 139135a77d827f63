"""
Residual k-means: an item vector becomes `M` codes, and each level quantizes the residual of the levels before it.

Level 0 clusters the vectors into `K` groups, level 1 clusters the differences to the group means, and so on. Each
level is scikit-learn's `KMeans`. [`Quantizer`] lists what another quantizer must offer to be used in its place.
"""

import os
import warnings
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from ..arguments import import_dotted
from ..files import atomic_file, read_json


QUANTIZER_NAME = "quantizer.safetensors"

# More points, iterations or starts lower the error by less than 1 %.
POINTS_PER_CODE = 256  # drawn at random to fit the centres of a level
SEEDS_PER_CODE = 32  # of these, used by k-means++
MAX_ITERATIONS = 25
CHUNK = 16_384  # vectors whose distances to all codes are in memory at once


class Quantizer(Protocol):
    """Methods that a quantizer must have. [`ResidualKMeans`] documents them; it can also be loaded again."""

    num_sid_levels: int
    codebook_size: int

    def fit_encode(self, x: np.ndarray) -> np.ndarray: ...
    def encode(self, x: np.ndarray, prefix: np.ndarray | None = None) -> np.ndarray: ...
    def decode(self, codes: np.ndarray) -> np.ndarray: ...
    def distances(self, x: np.ndarray, prefix: np.ndarray) -> np.ndarray: ...
    def first_columns(self, width: int) -> "Quantizer": ...
    def save_pretrained(self, save_directory: str | os.PathLike) -> None: ...


class ResidualKMeans:
    """
    Residual k-means quantizer (RQ-KMeans).

    Args:
        num_sid_levels (`int`, *optional*, defaults to `4`):
            Number of levels `M`, the length of a Semantic ID.
        codebook_size (`int`, *optional*, defaults to `256`):
            Codes per level, `K`.
        seed (`int`, *optional*, defaults to `0`):
            Random seed. The same vectors and seed give the same codes on the same machine.

    Example:

    ```python
    >>> import numpy as np
    >>> from lasar_hf.semantic_ids import ResidualKMeans

    >>> x = np.random.default_rng(0).normal(size=(1000, 16)).astype("float32")
    >>> quantizer = ResidualKMeans(num_sid_levels=3, codebook_size=8)
    >>> quantizer.fit_encode(x).shape
    (1000, 3)
    ```
    """

    def __init__(self, num_sid_levels: int = 4, codebook_size: int = 256, seed: int = 0):
        for name, value in (("num_sid_levels", num_sid_levels), ("codebook_size", codebook_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1.")
        self.num_sid_levels, self.codebook_size, self.seed = num_sid_levels, codebook_size, seed
        self.centres: np.ndarray | None = None  # (M, K, D) float32, zero for unused codes
        self.codes_used: np.ndarray | None = None  # (M,): codes from this number on are unused

    @property
    def codebooks(self) -> torch.Tensor:
        """The centres of all levels as a tensor of shape `(M, K, D)`, float32. Unused codes have a zero centre."""
        return torch.from_numpy(self._fitted())

    def fit_encode(self, x: np.ndarray) -> np.ndarray:
        """
        Fit the codebooks to vectors `x` of shape `(N, D)` and return their codes, as [`~ResidualKMeans.encode`] does.

        If a level has fewer distinct vectors than codes, its last codes stay unused.
        """
        residuals = self._check_vectors(x)  # (N, D)
        num_vectors, width = residuals.shape
        self.centres = np.zeros((self.num_sid_levels, self.codebook_size, width), dtype=np.float32)
        self.codes_used = np.zeros(self.num_sid_levels, dtype=np.int64)
        codes = np.empty((num_vectors, self.num_sid_levels), dtype=np.int64)
        seeds = np.random.SeedSequence(self.seed).generate_state(self.num_sid_levels).tolist()
        for level, seed in enumerate(seeds):
            # 1. Fit the centres of this level.
            centres = _fit_centres(residuals, self.codebook_size, seed)  # (k, D), k <= K
            self.codes_used[level] = len(centres)
            self.centres[level, : len(centres)] = centres
            # 2. Subtract the nearest centre; the next level quantizes the rest.
            codes[:, level] = self._nearest(residuals, level)
            residuals -= self.centres[level, codes[:, level]]
        return codes

    def encode(self, x: np.ndarray, prefix: np.ndarray | None = None) -> np.ndarray:
        """
        Codes `(N, M)`, int64, of vectors `x` `(N, D)`: per level the nearest centre to the residual so far.

        With `prefix`, codes `(N, l)` of the first `l` levels, only the other levels are chosen. Raises a `ValueError`
        for a wrong shape or a row that is not finite.
        """
        prefix = np.empty((len(x), 0), dtype=np.int64) if prefix is None else np.asarray(prefix)
        residuals = self._residuals(x, prefix)  # (N, D)
        codes = np.empty((len(residuals), self.num_sid_levels), dtype=np.int64)
        codes[:, : prefix.shape[1]] = prefix
        for level in range(prefix.shape[1], self.num_sid_levels):
            codes[:, level] = self._nearest(residuals, level)
            residuals -= self.centres[level, codes[:, level]]
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """
        Reconstruct vectors `(N, D)`, float32, from the codes `(N, l)` of the first `l ≤ M` levels: the sum of the
        centres. Raises a `ValueError` for a wrong shape or a code outside `[0, K)`.
        """
        codes = check_codes(codes, "codes", self)
        vectors = np.zeros((len(codes), self._fitted().shape[2]), dtype=np.float32)
        for level in range(codes.shape[1]):
            vectors += self.centres[level, codes[:, level]]
        return vectors

    def distances(self, x: np.ndarray, prefix: np.ndarray) -> np.ndarray:
        """
        Squared distances `(N, K)`, float64, of the residuals after a prefix to all codes of the next level.

        Arguments as for [`~ResidualKMeans.encode`]; the prefix has shape `(N, 0)` for level 0. The result is a full
        matrix, so pass the rows in question and not the catalogue. An unused code counts as the zero vector.
        """
        residuals = self._residuals(x, prefix).astype(np.float64)  # (N, D)
        centres = self.centres[np.shape(prefix)[1]]  # (K, D)
        squared = np.square(residuals).sum(axis=1, keepdims=True) + np.square(centres).sum(axis=1)
        return np.maximum(squared - 2 * residuals @ centres.T, 0)

    def first_columns(self, width: int) -> "ResidualKMeans":
        """
        A quantizer with the same codes for vectors of which only the first `width` columns are known.

        Distances ignore the other columns. Zeros there would favour the codes whose centres are near zero.
        """
        centres = self._fitted()
        if not 1 <= width <= centres.shape[2]:
            raise ValueError(f"width is {width}; expected 1 to {centres.shape[2]}, the width of the codebooks.")
        quantizer = ResidualKMeans(self.num_sid_levels, self.codebook_size, self.seed)
        quantizer.centres, quantizer.codes_used = np.ascontiguousarray(centres[..., :width]), self.codes_used
        return quantizer

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the codebooks and the seed into one safetensors file of a folder, created if missing."""
        tensors = {"codebooks": self._fitted(), "codes_used": self.codes_used}
        with atomic_file(Path(save_directory) / QUANTIZER_NAME) as temporary:
            save_file(tensors, temporary, metadata={"seed": str(self.seed)})

    @classmethod
    def from_pretrained(cls, save_directory: str | os.PathLike) -> "ResidualKMeans":
        """Load a quantizer that [`~ResidualKMeans.save_pretrained`] wrote; it gives exactly the same codes."""
        with safe_open(Path(save_directory) / QUANTIZER_NAME, "np") as file:
            centres, codes_used = file.get_tensor("codebooks"), file.get_tensor("codes_used")
            quantizer = cls(centres.shape[0], centres.shape[1], seed=int(file.metadata()["seed"]))
        quantizer.centres, quantizer.codes_used = centres, codes_used
        return quantizer

    def _nearest(self, residuals: np.ndarray, level: int) -> np.ndarray:
        """The nearest code in use, `(N,)`."""
        centres = self.centres[level, : self.codes_used[level]]  # (k, D)
        half_norms = np.square(centres).sum(axis=1) / 2
        codes = np.empty(len(residuals), dtype=np.int64)
        for start in range(0, len(residuals), CHUNK):
            chunk = residuals[start : start + CHUNK]
            codes[start : start + CHUNK] = (half_norms - chunk @ centres.T).argmin(axis=1)
        return codes

    def _residuals(self, x: np.ndarray, prefix: np.ndarray) -> np.ndarray:
        residuals = self._check_vectors(x, self._fitted().shape[2])
        if len(prefix) != len(residuals):
            raise ValueError(f"prefix has {len(prefix)} rows; expected {len(residuals)}, one per vector.")
        residuals -= self.decode(prefix)
        return residuals

    def _fitted(self) -> np.ndarray:
        if self.centres is None:
            raise ValueError("ResidualKMeans is not fitted; call fit_encode(x) or from_pretrained(folder) first.")
        return self.centres

    def _check_vectors(self, x: np.ndarray, width: int | None = None) -> np.ndarray:
        """A float32 copy of the vectors."""
        x = np.asarray(x)
        if x.ndim != 2 or 0 in x.shape or (width is not None and x.shape[1] != width):
            raise ValueError(f"x has shape {x.shape}; expected (N, {width or 'D'}) with at least one row and column.")
        with np.errstate(over="ignore"):
            x = np.array(x, dtype=np.float32, order="C")
        finite = np.isfinite(x).all(axis=1)
        if not finite.all():
            raise ValueError(f"x row {finite.argmin()} is not finite in float32; repair that vector.")
        return x


def check_codes(codes: np.ndarray, name: str, quantizer: Quantizer, min_length: int = 0) -> np.ndarray:
    """Codes `(N, l)` as int64; raises an error that calls them `name` if `l` or a code is out of range."""
    codes = np.asarray(codes, dtype=np.int64)
    if codes.ndim != 2 or not min_length <= codes.shape[1] <= quantizer.num_sid_levels:
        lengths = f"{min_length} to {quantizer.num_sid_levels}"
        raise ValueError(f"{name} has shape {codes.shape}; expected (N, l) with l from {lengths}.")
    wrong = ((codes < 0) | (codes >= quantizer.codebook_size)).any(axis=1)
    if wrong.any():
        row = wrong.argmax()
        limit = quantizer.codebook_size
        raise ValueError(f"{name} row {row} is {codes[row].tolist()}; expected codes in [0, {limit}).")
    return codes


def load_quantizer(data_dir: str | Path):
    """The quantizer that `recipes/prepare.py` fitted; the class is named in `semantic_ids.json`."""
    path = read_json(Path(data_dir, "semantic_ids.json"))["quantizer"]
    return import_dotted(path).from_pretrained(Path(data_dir, "quantizer"))


def _fit_centres(points: np.ndarray, num_codes: int, seed: int) -> np.ndarray:
    """Centres of the clusters that have a point, `(k, D)`, `k ≤ num_codes`."""
    order = np.random.default_rng(seed).permutation(len(points))
    sample = points[order[: POINTS_PER_CODE * num_codes]]  # (S, D)
    # With several OpenMP threads, the rounding of the centres would differ from run to run.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than codes
        seeds = sample[: SEEDS_PER_CODE * num_codes]
        init = kmeans_plusplus(seeds, min(num_codes, len(seeds)), random_state=seed)[0]
        kmeans = KMeans(len(init), init=init, n_init=1, max_iter=MAX_ITERATIONS).fit(sample)
    return kmeans.cluster_centers_[np.unique(kmeans.labels_)]
