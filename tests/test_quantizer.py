"""Residual k-means: clusters are found, codes are nearest, files reload, odd input is handled."""

import warnings

import numpy as np
import pytest

from lasar_hf.semantic_ids import ResidualKMeans


@pytest.fixture
def points() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)


def kmeans(num_sid_levels: int = 3, codebook_size: int = 8, seed: int = 0) -> ResidualKMeans:
    return ResidualKMeans(num_sid_levels, codebook_size, seed)


def fitted(points, **kwargs) -> ResidualKMeans:
    quantizer = kmeans(**kwargs)
    quantizer.fit_encode(points)
    return quantizer


def error(quantizer, points, codes) -> float:
    return float(np.square(points - quantizer.decode(codes)).sum())


def test_first_level_finds_separate_clusters():
    rng = np.random.default_rng(1)
    truth = np.repeat(np.arange(8), 30)
    x = 10 * np.eye(8)[truth] + 0.1 * rng.normal(size=(240, 8))
    codes = kmeans().fit_encode(x)[:, 0]
    assert len(set(codes)) == 8
    assert len(set(zip(truth, codes, strict=True))) == 8


def test_fit_encode_equals_encode(points):
    quantizer = kmeans()
    codes = quantizer.fit_encode(points)
    assert codes.shape == (400, 3)
    assert codes.dtype == np.int64
    np.testing.assert_array_equal(codes, quantizer.encode(points))


def test_each_level_uses_the_nearest_code(points):
    quantizer = fitted(points)
    codes = quantizer.encode(points)
    residuals = points.astype(np.float64)
    for level, codebook in enumerate(quantizer.codebooks.double().numpy()):
        squared = ((residuals[:, None] - codebook) ** 2).sum(-1)
        np.testing.assert_array_equal(codes[:, level], squared.argmin(1))
        np.testing.assert_allclose(quantizer.distances(points, codes[:, :level]), squared, atol=1e-4)
        residuals -= codebook[codes[:, level]]
    np.testing.assert_allclose(points - quantizer.decode(codes), residuals, atol=1e-5)


def test_every_level_lowers_the_error(points):
    quantizer = kmeans()
    codes = quantizer.fit_encode(points)
    errors = [error(quantizer, points, codes[:, :level]) for level in range(4)]
    assert all(later < 0.9 * earlier for earlier, later in zip(errors, errors[1:], strict=False))


def test_error_is_near_the_best_of_many_plain_runs(points):
    best = np.inf
    for seed in range(10):
        rng = np.random.default_rng(seed)
        centres = points[rng.choice(400, 8, replace=False)].astype(np.float64)
        for _ in range(50):
            codes = ((points[:, None] - centres) ** 2).sum(-1).argmin(1)
            centres = np.stack([points[codes == k].mean(0) for k in range(8)])
        best = min(best, ((points - centres[codes]) ** 2).sum())
    quantizer = kmeans(num_sid_levels=1)
    assert error(quantizer, points, quantizer.fit_encode(points)) < 1.03 * best


def test_same_seed_gives_same_codes(points):
    np.testing.assert_array_equal(kmeans(seed=5).fit_encode(points), kmeans(seed=5).fit_encode(points))


def test_seed_changes_the_codes(points):
    assert (kmeans(seed=5).fit_encode(points) != kmeans(seed=6).fit_encode(points)).any()


def test_large_catalogue_is_fitted_to_a_sample():
    # Two codes are fitted to at most 512 of the 4,000 points.
    x = np.random.default_rng(0).normal(size=(4000, 4)).astype(np.float32)
    quantizer = kmeans(num_sid_levels=1, codebook_size=2)
    codes = quantizer.fit_encode(x)
    np.testing.assert_array_equal(codes, quantizer.encode(x))
    means = np.stack([x[codes[:, 0] == code].mean(axis=0) for code in range(2)])
    distance = np.abs(quantizer.codebooks[0].numpy() - means).max()
    assert 1e-3 < distance < 0.5


def test_chunks_do_not_change_the_codes(points, monkeypatch):
    whole = fitted(points).encode(points)
    monkeypatch.setattr("lasar_hf.semantic_ids.quantizer.CHUNK", 33)
    np.testing.assert_array_equal(whole, kmeans().fit_encode(points))


def test_same_codes_after_reload(points, tmp_path):
    quantizer = fitted(points, seed=3)
    quantizer.save_pretrained(tmp_path / "new" / "folder")
    loaded = ResidualKMeans.from_pretrained(tmp_path / "new" / "folder")
    np.testing.assert_array_equal(quantizer.encode(points), loaded.encode(points))
    assert (loaded.num_sid_levels, loaded.codebook_size, loaded.seed) == (3, 8, 3)
    assert loaded.codebooks.equal(quantizer.codebooks)


def test_interrupted_save_keeps_the_old_file(points, tmp_path, monkeypatch):
    old = fitted(points)
    old.save_pretrained(tmp_path)

    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("lasar_hf.semantic_ids.quantizer.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        fitted(points, seed=1).save_pretrained(tmp_path)
    loaded = ResidualKMeans.from_pretrained(tmp_path)
    np.testing.assert_array_equal(old.encode(points), loaded.encode(points))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"quantizer\.safetensors"):
        ResidualKMeans.from_pretrained(tmp_path)


def test_fewer_distinct_points_than_codes_leaves_codes_unused():
    x = np.repeat(np.eye(3), [5, 1, 2], axis=0)
    quantizer = kmeans()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scikit-learn's ConvergenceWarning must not reach the user
        codes = quantizer.fit_encode(x)
    assert len(np.unique(codes, axis=0)) == 3
    assert set(codes[:, 0]) == {0, 1, 2}
    np.testing.assert_allclose(quantizer.decode(codes), x, atol=1e-6)
    assert not quantizer.codebooks[0, 3:].any()
    assert np.isfinite(quantizer.distances(x, codes[:, :2])).all()


def test_unused_codes_are_never_chosen(tmp_path):
    fitted(np.eye(3)).save_pretrained(tmp_path)
    quantizer = ResidualKMeans.from_pretrained(tmp_path)
    # This vector is nearer to the zero centre of the unused codes than to the three others.
    assert quantizer.encode(np.full((1, 3), -9.0))[0, 0] < 3


def test_prefix_is_kept_and_the_rest_chosen(points):
    quantizer = fitted(points)
    codes = quantizer.encode(points)
    np.testing.assert_array_equal(quantizer.encode(points, codes[:, :2]), codes)
    other = quantizer.encode(points, (codes[:, :1] + 1) % 8)
    np.testing.assert_array_equal(other[:, 0], (codes[:, 0] + 1) % 8)
    residuals = points - quantizer.decode(other[:, :1])
    squared = ((residuals[:, None] - quantizer.codebooks[1].numpy()) ** 2).sum(-1)
    np.testing.assert_array_equal(other[:, 1], squared.argmin(1))


def test_first_columns_ignore_the_others(points):
    quantizer = fitted(points)
    narrow = quantizer.first_columns(2)
    residuals = points[:, :2].copy()
    for level, codes in enumerate(narrow.encode(points[:, :2]).T):
        centres = quantizer.codebooks[level, :, :2].numpy()
        squared = ((residuals[:, None] - centres) ** 2).sum(axis=2)
        np.testing.assert_array_equal(codes, squared.argmin(axis=1))
        residuals -= centres[codes]
    np.testing.assert_array_equal(quantizer.first_columns(8).encode(points), quantizer.encode(points))
    assert quantizer.codebooks.shape == (3, 8, 8)


@pytest.mark.parametrize("width", [0, 9])
def test_first_columns_out_of_range_are_refused(points, width):
    with pytest.raises(ValueError, match=f"width is {width}"):
        fitted(points).first_columns(width)


def test_input_is_not_changed(points):
    before = points.copy()
    fitted(points).encode(points)
    np.testing.assert_array_equal(points, before)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_vectors_that_are_not_finite_are_named(points, value):
    broken = points.astype(np.float64)
    broken[7, 3] = value
    with pytest.raises(ValueError, match="row 7"):
        kmeans().fit_encode(broken)
    with pytest.raises(ValueError, match="row 7"):
        fitted(points).encode(broken)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (8, 0)])
def test_vectors_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match="x has shape"):
        kmeans().fit_encode(np.zeros(shape))


def test_vectors_of_another_width_are_refused(points):
    with pytest.raises(ValueError, match=r"\(N, 8\)"):
        fitted(points).encode(points[:, :4])


def test_prefix_of_another_length_is_refused(points):
    with pytest.raises(ValueError, match="prefix has 3 rows"):
        fitted(points).encode(points, np.zeros((3, 1), dtype=int))


@pytest.mark.parametrize("codes", [[[8]], [[-1]], [[0, 0, 0, 0]], [0]])
def test_wrong_codes_are_refused(points, codes):
    with pytest.raises(ValueError, match="codes"):
        fitted(points).decode(np.array(codes))


def test_quantizer_must_be_fitted(points):
    with pytest.raises(ValueError, match="fit_encode"):
        kmeans().encode(points)


@pytest.mark.parametrize("argument", ["num_sid_levels", "codebook_size"])
def test_sizes_below_one_are_refused(argument):
    with pytest.raises(ValueError, match=argument):
        kmeans(**{argument: 0})
