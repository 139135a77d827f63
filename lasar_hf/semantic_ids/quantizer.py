"""
Residual k-means: an item vector as `M` codes, each level quantizing what the levels before it left over.

Level 0 clusters the vectors into `K` groups; level 1 clusters the differences to the group means; and so on. Nothing
is held as an `(N, K)` matrix beyond a chunk of rows. Added to the textbook: dead clusters move to the points that fit
worst, and balanced codes come from entropic optimal transport with an exact rounding.
"""

import copy
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


QUANTIZER_WEIGHTS_NAME = "quantizer.safetensors"
QUANTIZER_CONFIG_NAME = "quantizer_config.json"

CHUNK = 16_384  # rows whose (rows, K) costs exist at one time
SEEDING_ROWS_PER_CODE = 32  # k-means++ reads its points once a code: a sample loses nothing that Lloyd does not repair
TOLERANCE = 3e-5  # Lloyd stops when an iteration lowers the error by less than this share
SAME_POINT = 1e-5  # squared distances below this share of the squared norm are rounding noise
TEMPERATURE = 0.05  # of the optimal transport, in units of the spread of a point's costs over the codes
SINKHORN_STEPS = 3  # between two updates of the centres; prices carry over, so few are enough


class ResidualKMeans:
    """
    Residual k-means quantizer (RQ-KMeans).

    Args:
        num_sid_levels (`int`, *optional*, defaults to `4`):
            Number of levels `M`, codes of one Semantic ID.
        codebook_size (`int`, *optional*, defaults to `256`):
            Codes a level, `K`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of sampling and seeding. The same vectors and seed give the same codes on the same machine.
        balanced (`bool`, *optional*, defaults to `False`):
            Whether [`~ResidualKMeans.fit_encode`] gives no code of a level more than `ceil(N / K)` points.
        max_iterations (`int`, *optional*, defaults to `25`):
            Most Lloyd iterations a level.
        sample_size (`int`, *optional*, defaults to `262_144`):
            Most points that the centres of a level are computed from.
        device (`str` or `torch.device`, *optional*):
            Where to compute. Defaults to the GPU if there is one, else the CPU.

    Example:

    ```python
    >>> import numpy as np
    >>> from lasar_hf.semantic_ids import ResidualKMeans

    >>> x = np.random.default_rng(0).normal(size=(1000, 16)).astype("float32")
    >>> quantizer = ResidualKMeans(num_sid_levels=3, codebook_size=8).fit(x)
    >>> quantizer.encode(x).shape
    (1000, 3)
    ```
    """

    def __init__(
        self,
        num_sid_levels: int = 4,
        codebook_size: int = 256,
        seed: int = 0,
        balanced: bool = False,
        max_iterations: int = 25,
        sample_size: int = 262_144,
        device: str | torch.device | None = None,
    ):
        if min(num_sid_levels, codebook_size, max_iterations, sample_size) < 1:
            raise ValueError("num_sid_levels, codebook_size, max_iterations and sample_size must be at least 1.")
        self.num_sid_levels = num_sid_levels
        self.codebook_size = codebook_size
        self.seed = seed
        self.balanced = balanced
        self.max_iterations = max_iterations
        self.sample_size = sample_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.codebooks: torch.Tensor | None = None  # (M, K, D)
        # (M, K): what is added to −x·c to choose a code: half the squared norm of c, less the code's price when
        # balanced; infinite for a code that is not in use (fewer distinct points than codes).
        self.bias: torch.Tensor | None = None

    def fit(self, x: np.ndarray | torch.Tensor) -> "ResidualKMeans":
        """
        Compute the codebooks.

        Args:
            x (`np.ndarray` or `torch.Tensor` of shape `(N, D)`):
                Vectors. With fewer distinct vectors than codes, the codes left over stay unused.

        Returns:
            [`ResidualKMeans`]: itself.

        Raises:
            `ValueError`: `x` is not a non-empty matrix, or a row is not finite.
        """
        self.fit_encode(x)
        return self

    def fit_encode(self, x: np.ndarray | torch.Tensor) -> np.ndarray:
        """
        Compute the codebooks and return the codes of the same vectors, `(N, M)` int64.

        Without balancing this equals `fit(x).encode(x)`. With it, only these codes respect the capacity exactly: it is
        a property of the whole set, while [`~ResidualKMeans.encode`] looks at one row at a time.
        """
        residuals = self._check(x).clone()
        num_points, width = residuals.shape
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.num_sid_levels, self.codebook_size)
        self.codebooks = torch.zeros(*shape, width, device=self.device)
        self.bias = torch.full(shape, torch.inf, device=self.device)
        codes = torch.empty(num_points, self.num_sid_levels, dtype=torch.long, device=self.device)
        for level in range(self.num_sid_levels):
            sample = residuals
            if num_points > self.sample_size:
                picked = torch.randperm(num_points, generator=generator)[: self.sample_size].sort().values
                sample = residuals[picked.to(self.device)]
            centres, prices = self._fit_level(sample, generator)
            self.codebooks[level, : len(centres)] = centres
            self.bias[level, : len(centres)] = _half_norms(centres) - prices
            if self.balanced:
                codes[:, level] = _assign_within_capacity(residuals, self.codebooks[level], self.bias[level])
            else:
                codes[:, level] = _assign(residuals, self.codebooks[level], self.bias[level])[0]
            residuals -= self.codebooks[level][codes[:, level]]
        return codes.cpu().numpy()

    def encode(self, x: np.ndarray | torch.Tensor, prefix: np.ndarray | None = None) -> np.ndarray:
        """
        Codes of vectors, each level the nearest code to what the levels before it left over.

        A balanced quantizer adds the code's price to the distance, which keeps new vectors nearly balanced.

        Args:
            x (`np.ndarray` or `torch.Tensor` of shape `(N, D)`):
                Vectors.
            prefix (`np.ndarray` of shape `(N, l)`, *optional*):
                Codes of the first `l` levels that are already decided; only the rest is chosen.

        Returns:
            `np.ndarray` of shape `(N, M)`, int64.

        Raises:
            `ValueError`: a wrong shape, or a row that is not finite.
        """
        residuals = self._residuals(x, prefix)
        codes = torch.empty(len(residuals), self.num_sid_levels, dtype=torch.long, device=self.device)
        start = 0
        if prefix is not None:
            start = prefix.shape[1]
            codes[:, :start] = torch.as_tensor(prefix, device=self.device)
        for level in range(start, self.num_sid_levels):
            codes[:, level] = _assign(residuals, self.codebooks[level], self.bias[level])[0]
            residuals -= self.codebooks[level][codes[:, level]]
        return codes.cpu().numpy()

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """
        Vectors that the codes stand for, the sum of their centres over the levels.

        Args:
            codes (`np.ndarray` of shape `(N, l)`):
                Codes of the first `l ≤ M` levels.

        Returns:
            `np.ndarray` of shape `(N, D)`, float32.

        Raises:
            `ValueError`: a wrong shape or a code outside `[0, K)`.
        """
        codes = self._check_codes(codes)
        out = torch.zeros(len(codes), self._fitted().shape[2], device=self.device)
        for level in range(codes.shape[1]):
            out += self.codebooks[level][codes[:, level]]
        return out.cpu().numpy()

    def distances(self, x: np.ndarray | torch.Tensor, prefix: np.ndarray) -> np.ndarray:
        """
        Squared distances of what a prefix leaves over to every code of the next level.

        Args:
            x (`np.ndarray` or `torch.Tensor` of shape `(N, D)`):
                Vectors. The answer is a full `(N, K)` matrix: pass the rows in question, not the catalogue.
            prefix (`np.ndarray` of shape `(N, l)`, `l < M`):
                Codes of the first `l` levels; `(N, 0)` for level 0.

        Returns:
            `np.ndarray` of shape `(N, K)`, float64. An unused code stands for the zero vector, "no correction".
        """
        residuals = self._residuals(x, prefix)
        codebook = self.codebooks[prefix.shape[1]]
        squared = residuals.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)
        return (squared - 2 * residuals @ codebook.T).clamp(min=0).double().cpu().numpy()

    def first_columns(self, width: int) -> "ResidualKMeans":
        """
        The quantizer for vectors of which only the first columns are known: the others count in no distance.

        A view that knows nothing of an item is a zero row, but zero is not unknown: it lies near the codes whose
        centres have little of that view, and these would get most of the new items.

        Args:
            width (`int`):
                Columns that are known, `1 ≤ width ≤ D`.

        Returns:
            [`ResidualKMeans`]: a quantizer with the same codes; this one stays as it is.

        Raises:
            `ValueError`: no such number of columns.
        """
        codebooks = self._fitted()
        if not 1 <= width <= codebooks.shape[2]:
            raise ValueError(f"width is {width}, expected 1 to {codebooks.shape[2]}, the columns of the codebooks.")
        narrow = copy.copy(self)
        narrow.codebooks = codebooks[..., :width]
        narrow.bias = self.bias - codebooks[..., width:].square().sum(dim=2) / 2
        return narrow

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """
        Write the codebooks (safetensors) and the settings (JSON) into a folder, made if missing.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to write to. Files appear complete or not at all.
        """
        folder = Path(save_directory)
        tensors = {"codebooks": self._fitted().cpu().contiguous(), "bias": self.bias.cpu().contiguous()}
        config = {
            "num_sid_levels": self.num_sid_levels,
            "codebook_size": self.codebook_size,
            "seed": self.seed,
            "balanced": self.balanced,
            "max_iterations": self.max_iterations,
            "sample_size": self.sample_size,
        }
        folder.mkdir(parents=True, exist_ok=True)
        weights, settings = folder / QUANTIZER_WEIGHTS_NAME, folder / QUANTIZER_CONFIG_NAME
        save_file(tensors, f"{weights}.tmp")
        Path(f"{settings}.tmp").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(f"{weights}.tmp", weights)
        os.replace(f"{settings}.tmp", settings)

    @classmethod
    def from_pretrained(
        cls, save_directory: str | os.PathLike, device: str | torch.device | None = None
    ) -> "ResidualKMeans":
        """
        Read a quantizer that [`~ResidualKMeans.save_pretrained`] wrote; it encodes exactly as before.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to read.
            device (`str` or `torch.device`, *optional*):
                Where to compute. Defaults to the GPU if there is one, else the CPU.

        Raises:
            `FileNotFoundError`: one of the two files is missing.
            `ValueError`: the two files do not belong together.
        """
        folder = Path(save_directory)
        for name in (QUANTIZER_CONFIG_NAME, QUANTIZER_WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}: it is not a saved quantizer.")
        settings = json.loads((folder / QUANTIZER_CONFIG_NAME).read_text(encoding="utf-8"))
        quantizer = cls(**settings, device=device)
        tensors = load_file(folder / QUANTIZER_WEIGHTS_NAME)
        shape = (quantizer.num_sid_levels, quantizer.codebook_size)
        if tensors["codebooks"].shape[:2] != shape or tensors["bias"].shape != shape:
            raise ValueError(
                f"{folder / QUANTIZER_WEIGHTS_NAME} holds codebooks of shape {tuple(tensors['codebooks'].shape)}, but "
                f"{QUANTIZER_CONFIG_NAME} says {shape[0]} levels of {shape[1]} codes: save the quantizer again."
            )
        quantizer.codebooks = tensors["codebooks"].to(quantizer.device)
        quantizer.bias = tensors["bias"].to(quantizer.device)
        return quantizer

    def _fitted(self) -> torch.Tensor:
        if self.codebooks is None:
            raise ValueError("This quantizer has no codebooks yet: call fit(x) or from_pretrained(folder) first.")
        return self.codebooks

    def _check(self, x: np.ndarray | torch.Tensor, width: int | None = None) -> torch.Tensor:
        """`x` as a float32 matrix on the device, or an error that names the row."""
        x = torch.as_tensor(x)
        if x.ndim != 2 or 0 in x.shape or (width is not None and x.shape[1] != width):
            wanted = "(N, D) with at least one row and column" if width is None else f"(N, {width})"
            raise ValueError(f"x has shape {tuple(x.shape)}, expected {wanted}.")
        x = x.to(self.device, torch.float32)
        finite = torch.isfinite(x.sum(dim=1))  # a NaN or an infinity anywhere in the row reaches its sum
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise ValueError(f"x row {row} is not finite (NaN, infinite, or beyond float32): repair that vector.")
        return x

    def _check_codes(self, codes: np.ndarray) -> torch.Tensor:
        codes = torch.as_tensor(codes, device=self.device).long()
        if codes.ndim != 2 or codes.shape[1] > self.num_sid_levels:
            raise ValueError(
                f"codes has shape {tuple(codes.shape)}, expected (N, l) with l at most {self.num_sid_levels} levels."
            )
        wrong = ((codes < 0) | (codes >= self.codebook_size)).any(dim=1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(f"codes row {row} is {codes[row].tolist()}, outside [0, {self.codebook_size}).")
        return codes

    def _residuals(self, x: np.ndarray | torch.Tensor, prefix: np.ndarray | None) -> torch.Tensor:
        """What the prefix leaves over of `x`, as a new `(N, D)` tensor."""
        residuals = self._check(x, width=self._fitted().shape[2]).clone()
        if prefix is not None:
            prefix = self._check_codes(prefix)
            if len(prefix) != len(residuals):
                raise ValueError(f"prefix has {len(prefix)} rows for {len(residuals)} vectors.")
            for level in range(prefix.shape[1]):
                residuals -= self.codebooks[level][prefix[:, level]]
        return residuals

    def _fit_level(self, points: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Centres `(k, D)` and their prices `(k,)` for one level, `k ≤ K`."""
        rows = torch.randperm(len(points), generator=generator)[: SEEDING_ROWS_PER_CODE * self.codebook_size]
        # Seeding draws one point after the other: on the CPU it is quick and the same for every device.
        centres = _seed(points[rows.to(self.device)].cpu(), self.codebook_size, generator).to(self.device)
        if not self.balanced:
            return _lloyd(points, centres, self.max_iterations), torch.zeros(len(centres), device=self.device)
        # Balanced codes must all exist, also when points repeat: equal centres share their points by price.
        centres = centres.repeat(-(-self.codebook_size // len(centres)), 1)[: self.codebook_size]
        return _balanced_lloyd(points, centres, self.max_iterations)


def _seed(points: torch.Tensor, num_codes: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): `(k, D)`, fewer than `num_codes` when the points repeat."""
    norms = points.square().sum(dim=1)
    distance = torch.full_like(norms, torch.inf)
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    while len(chosen) < num_codes:
        newest = chosen[-1]
        distance = torch.minimum(distance, norms - 2 * (points @ points[newest]) + norms[newest])
        distance[distance <= SAME_POINT * norms] = 0
        if not distance.any():
            break
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    return points[chosen]


def _half_norms(centres: torch.Tensor) -> torch.Tensor:
    """`½‖c‖²`, `(k,)`: what makes the smallest `½‖c‖² − x·c` the nearest centre."""
    return centres.square().sum(dim=1) / 2


def _assign(points: torch.Tensor, centres: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`argmin_k bias_k − x·c_k` and its value, each `(N,)`."""
    cost, codes = zip(
        *(torch.addmm(bias, chunk, centres.T, alpha=-1).min(dim=1) for chunk in points.split(CHUNK)), strict=True
    )
    return torch.cat(codes), torch.cat(cost)


def _means(points: torch.Tensor, codes: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of each code's points (the old centre where there is none) and the number of points."""
    counts = torch.bincount(codes, minlength=len(centres))
    sums = torch.zeros_like(centres)
    if points.is_cuda:  # index_add_ adds in no fixed order on a GPU: a product with the 0/1 matrix is deterministic
        for chunk, part in zip(points.split(CHUNK), codes.split(CHUNK), strict=True):
            sums += torch.nn.functional.one_hot(part, len(centres)).to(chunk.dtype).T @ chunk
    else:
        sums.index_add_(0, codes, points)
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres), counts


def _lloyd(points: torch.Tensor, centres: torch.Tensor, max_iterations: int) -> torch.Tensor:
    """Lloyd iterations from seeds; a cluster that lost all its points moves to one of the points that fit worst."""
    norms = points.square().sum(dim=1)
    previous = torch.inf
    for _ in range(max_iterations):
        codes, cost = _assign(points, centres, _half_norms(centres))
        distance = (norms + 2 * cost).clamp(min=0)
        centres, counts = _means(points, codes, centres)
        moved = _revive(points, norms, distance, centres, counts)
        error = float(distance.mean(dtype=torch.float64))
        if not moved and previous - error <= TOLERANCE * error:
            break
        previous = error
    return centres


def _revive(
    points: torch.Tensor, norms: torch.Tensor, distance: torch.Tensor, centres: torch.Tensor, counts: torch.Tensor
) -> bool:
    """Move dead centres, in place, to the points farthest from theirs. Returns whether any moved."""
    dead = (counts == 0).nonzero().squeeze(1)
    if not len(dead):
        return False
    worst = distance.topk(min(len(dead), len(points))).indices
    worst = worst[distance[worst] > SAME_POINT * norms[worst]]
    centres[dead[: len(worst)]] = points[worst]
    return len(worst) > 0


def _balanced_lloyd(
    points: torch.Tensor, centres: torch.Tensor, max_iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd iterations with capacities: prices even out the loads of the codes, a rounding makes them exact.

    Returns centres `(K, D)` and prices `(K,)`.
    """
    spread = (points[:CHUNK] @ centres.T - _half_norms(centres)).std(dim=1).mean()
    temperature = TEMPERATURE * spread.clamp(min=1e-12)
    prices = torch.zeros(len(centres), device=centres.device)
    for _ in range(max_iterations):
        prices = _sinkhorn(points, centres, prices, temperature, SINKHORN_STEPS)
        codes = _assign_within_capacity(points, centres, _half_norms(centres) - prices)
        centres, _ = _means(points, codes, centres)
    for cooling in (
        1,
        4,
        16,
    ):  # sharper at the end: nearly one code a point, so that `encode` agrees with the rounding
        prices = _sinkhorn(points, centres, prices, temperature / cooling, 4 * SINKHORN_STEPS)
    return centres, prices


def _sinkhorn(
    points: torch.Tensor, centres: torch.Tensor, prices: torch.Tensor, temperature: torch.Tensor, steps: int
) -> torch.Tensor:
    """
    Prices of the codes under which they attract equal loads (Cuturi, 2013, with the points' potentials eliminated).

        P_ik = softmax_k((price_k − ½‖x_i − c_k‖²) / T),    price_k ← price_k − T · log(Σ_i P_ik · K / N)
    """
    half = _half_norms(centres)
    share = len(points) / len(centres)
    for _ in range(steps):
        load = torch.zeros_like(prices)
        for chunk in points.split(CHUNK):
            load += torch.addmm(prices - half, chunk, centres.T).div_(temperature).softmax(dim=1).sum(dim=0)
        prices = prices - temperature * (load / share).clamp(min=1e-6).log()
    return prices - prices.mean()


def _assign_within_capacity(points: torch.Tensor, centres: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """
    Codes `(N,)`, none more often than `ceil(N / K)`: the rounding of the transport plan.

    Each round the points left over ask for their best open code, and a code with too little room takes those that
    would lose most by their second choice. A round places every point or fills a code, so there are at most K + 1.
    """
    capacity = -(-len(points) // len(centres))
    codes = torch.empty(len(points), dtype=torch.long, device=points.device)
    room = torch.full((len(centres),), capacity, device=points.device)
    left = torch.arange(len(points), device=points.device)
    while len(left):
        open_bias = bias.masked_fill(room == 0, torch.inf)
        choice, regret = _two_best(points[left], centres, open_bias)
        order = regret.sort(descending=True, stable=True).indices
        order = order[choice[order].sort(stable=True).indices]  # by code, greatest regret first
        asked = torch.bincount(choice, minlength=len(centres))
        place = torch.arange(len(left), device=points.device) - (asked.cumsum(0) - asked)[choice[order]]
        accepted = order[place < room[choice[order]]]
        codes[left[accepted]] = choice[accepted]
        room -= torch.minimum(asked, room)
        keep = torch.ones(len(left), dtype=torch.bool, device=points.device)
        keep[accepted] = False
        left = left[keep]
    return codes


def _two_best(points: torch.Tensor, centres: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cheapest code of each point and what the second cheapest would cost more, each `(N,)`."""
    if len(centres) == 1:
        return torch.zeros(len(points), dtype=torch.long, device=points.device), torch.zeros_like(points[:, 0])
    parts = [
        torch.addmm(bias, chunk, centres.T, alpha=-1).topk(2, dim=1, largest=False) for chunk in points.split(CHUNK)
    ]
    cost = torch.cat([part.values for part in parts])
    return torch.cat([part.indices[:, 0] for part in parts]), cost[:, 1] - cost[:, 0]
