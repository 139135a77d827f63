"""Residual k-means: clusters found, codes that are nearest, balance, reload, odd input."""

import numpy as np
import pytest
import torch

from lasar_hf.semantic_ids import ResidualKMeans, quantizer


@pytest.fixture
def points() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)


def kmeans(**kwargs) -> ResidualKMeans:
    return ResidualKMeans(**{"num_sid_levels": 3, "codebook_size": 8, "device": "cpu", **kwargs})


def test_first_level_finds_separate_clusters():
    rng = np.random.default_rng(1)
    truth = np.repeat(np.arange(8), 30)
    x = 10 * np.eye(8)[truth] + 0.1 * rng.normal(size=(240, 8))
    codes = kmeans().fit_encode(x)[:, 0]
    assert len({(a, b) for a, b in zip(truth, codes, strict=True)}) == 8 == len(set(codes))


def test_each_level_takes_the_nearest_code_to_the_residual(points):
    model = kmeans()
    codes = model.fit_encode(points)
    np.testing.assert_array_equal(codes, model.encode(points))
    assert codes.dtype == np.int64 and codes.shape == (400, 3)
    residuals = points.astype(np.float64)
    for level, book in enumerate(model.codebooks.double().numpy()):
        squared = ((residuals[:, None] - book) ** 2).sum(-1)
        np.testing.assert_array_equal(codes[:, level], squared.argmin(1))
        np.testing.assert_allclose(model.distances(points, codes[:, :level]), squared, atol=1e-4)
        residuals -= book[codes[:, level]]
    np.testing.assert_allclose(points - model.decode(codes), residuals, atol=1e-5)


@pytest.mark.parametrize("balanced", [False, True])
def test_every_level_lowers_the_error(points, balanced):
    model = kmeans(balanced=balanced)
    codes = model.fit_encode(points)
    errors = [np.square(points - model.decode(codes[:, :level])).sum() for level in range(4)]
    assert all(later < 0.9 * earlier for earlier, later in zip(errors, errors[1:], strict=False))


def test_error_is_near_that_of_the_best_of_many_plain_runs(points):
    best = np.inf
    for seed in range(10):
        rng = np.random.default_rng(seed)
        centres = points[rng.choice(400, 8, replace=False)].astype(np.float64)
        for _ in range(50):
            codes = ((points[:, None] - centres) ** 2).sum(-1).argmin(1)
            centres = np.stack([points[codes == k].mean(0) for k in range(8)])
        best = min(best, ((points - centres[codes]) ** 2).sum())
    model = kmeans(num_sid_levels=1)
    assert np.square(points - model.decode(model.fit_encode(points))).sum() < 1.03 * best


def test_same_seed_same_codes_and_seed_matters(points):
    first = kmeans(seed=5).fit_encode(points)
    np.testing.assert_array_equal(first, kmeans(seed=5).fit_encode(points))
    assert (first != kmeans(seed=6).fit_encode(points)).any()


def test_chunks_do_not_change_the_codes(points, monkeypatch):
    whole = kmeans().fit(points)
    monkeypatch.setattr(quantizer, "CHUNK", 33)
    np.testing.assert_array_equal(whole.encode(points), kmeans().fit_encode(points))


def test_sample_of_the_points_is_enough(points):
    model = kmeans(sample_size=100)
    codes = model.fit_encode(points)
    np.testing.assert_array_equal(codes, model.encode(points))
    full = kmeans().fit(points)
    error, full_error = (np.square(points - m.decode(m.encode(points))).sum() for m in (model, full))
    assert full_error < error < 1.5 * full_error


@pytest.mark.parametrize("balanced", [False, True])
def test_same_codes_after_reload(points, tmp_path, balanced):
    model = kmeans(balanced=balanced).fit(points)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = ResidualKMeans.from_pretrained(tmp_path / "new" / "folder", device="cpu")
    np.testing.assert_array_equal(model.encode(points), loaded.encode(points))
    assert (loaded.balanced, loaded.seed, loaded.codebook_size) == (balanced, 0, 8)
    assert sorted(path.suffix for path in (tmp_path / "new" / "folder").iterdir()) == [".json", ".safetensors"]


def test_interrupted_save_leaves_the_old_files(points, tmp_path, monkeypatch):
    old = kmeans().fit(points)
    old.save_pretrained(tmp_path)

    def broken(tensors, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(quantizer, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        kmeans(seed=1).fit(points).save_pretrained(tmp_path)
    loaded = ResidualKMeans.from_pretrained(tmp_path, device="cpu")
    np.testing.assert_array_equal(old.encode(points), loaded.encode(points))


def test_load_refuses_missing_and_mixed_files(points, tmp_path):
    with pytest.raises(FileNotFoundError, match="quantizer_config.json"):
        ResidualKMeans.from_pretrained(tmp_path)
    kmeans().fit(points).save_pretrained(tmp_path)
    kmeans(num_sid_levels=2).fit(points).save_pretrained(tmp_path / "other")
    (tmp_path / "quantizer.safetensors").write_bytes((tmp_path / "other" / "quantizer.safetensors").read_bytes())
    with pytest.raises(ValueError, match="3 levels of 8 codes"):
        ResidualKMeans.from_pretrained(tmp_path)


def test_fewer_distinct_points_than_codes_leaves_codes_unused():
    x = np.repeat(np.eye(3), [5, 1, 2], axis=0)
    model = kmeans()
    codes = model.fit_encode(x)
    assert len(np.unique(codes, axis=0)) == 3 and set(codes[:, 0]) == {0, 1, 2}
    np.testing.assert_allclose(model.decode(codes), x, atol=1e-6)
    # An item far from all of them must still not fall on an unused code, which has no meaning.
    assert model.encode(np.full((1, 3), -9.0))[0, 0] < 3
    assert np.isfinite(model.distances(x, codes[:, :2])).all()


def test_dead_clusters_move_to_the_points_that_fit_worst():
    x = torch.tensor([[0.0, 0.0], [0.1, 0.0], [10.0, 0.0], [10.1, 0.0], [0.0, 10.0]])
    centres = quantizer._lloyd(x, torch.tensor([[0.0, 0.0], [10.0, 0.0], [1e3, -1e3]]), max_iterations=10)
    error = torch.cdist(x, centres).min(dim=1).values.max()
    assert error < 0.06


@pytest.mark.parametrize("num_points", [3, 8, 61, 400])
def test_balanced_codes_respect_the_capacity(points, num_points):
    x = points[:num_points].copy()
    x[: num_points // 3] = x[0]  # one third of the points are one point
    codes = kmeans(balanced=True).fit_encode(x)
    for level in range(3):
        assert np.bincount(codes[:, level]).max() <= -(-num_points // 8)


def test_balanced_costs_little_and_encode_stays_nearly_balanced(points):
    plain, balanced = kmeans(num_sid_levels=1), kmeans(num_sid_levels=1, balanced=True)
    plain_codes, codes = plain.fit_encode(points), balanced.fit_encode(points)
    error, plain_error = (
        np.square(points - model.decode(given)).sum() for model, given in ((balanced, codes), (plain, plain_codes))
    )
    assert error < 1.05 * plain_error
    assert np.bincount(balanced.encode(points)[:, 0]).max() <= 55  # 50 are exact balance
    assert np.bincount(plain_codes[:, 0]).max() > 55


def test_balanced_centres_fit_the_rounded_codes():
    rng = np.random.default_rng(0)
    clumps = rng.normal(size=(10, 8))[rng.choice(10, 400, p=np.arange(1, 11) / 55)]  # of 7 to 70 points
    x = clumps + 0.02 * rng.normal(size=(400, 8)) * rng.exponential(size=(400, 1))
    model = kmeans(codebook_size=16, balanced=True)
    codes = model.fit_encode(x)
    errors = [np.square(x - model.decode(codes[:, :level])).sum() for level in range(4)]
    assert all(later < 0.8 * earlier for earlier, later in zip(errors, errors[1:], strict=False))


def test_rounding_places_every_point_and_keeps_those_that_would_lose_most():
    x = torch.tensor([[0.0], [0.1], [0.2], [5.0]])
    centres = torch.tensor([[0.0], [1.0]])
    codes = quantizer._assign_within_capacity(x, centres, quantizer._half_norms(centres))
    assert codes.tolist() == [0, 0, 1, 1]


def test_prefix_is_kept_and_only_the_rest_chosen(points):
    model = kmeans().fit(points)
    codes = model.encode(points)
    np.testing.assert_array_equal(model.encode(points, codes[:, :2]), codes)
    other = model.encode(points, (codes[:, :1] + 1) % 8)
    np.testing.assert_array_equal(other[:, 0], (codes[:, 0] + 1) % 8)
    residuals = points - model.decode(other[:, :1])
    squared = ((residuals[:, None] - model.codebooks[1].numpy()) ** 2).sum(-1)
    np.testing.assert_array_equal(other[:, 1], squared.argmin(1))


def test_bad_vectors_are_named(points):
    broken = points.copy()
    broken[7, 3] = np.nan
    broken[9, 0] = np.inf
    with pytest.raises(ValueError, match="row 7 is not finite"):
        kmeans().fit(broken)
    with pytest.raises(ValueError, match=r"shape \(8,\)"):
        kmeans().fit(points[0])
    with pytest.raises(ValueError, match=r"shape \(0, 8\)"):
        kmeans().fit(points[:0])
    model = kmeans().fit(points)
    with pytest.raises(ValueError, match=r"expected \(N, 8\)"):
        model.encode(points[:, :4])
    with pytest.raises(ValueError, match="row 7 is not finite"):
        model.encode(broken)
    with pytest.raises(ValueError, match=r"row 0 is \[8\]"):
        model.decode(np.array([[8]]))
    with pytest.raises(ValueError, match="no codebooks yet"):
        kmeans().encode(points)
    with pytest.raises(ValueError, match="at least 1"):
        kmeans(codebook_size=0)
