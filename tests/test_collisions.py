"""No two items share a Semantic ID: optimal last codes, moves to other prefixes, new items, and the report."""

import json
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar_hf.semantic_ids import (
    ResidualKMeans,
    assign_new_items,
    build_semantic_ids,
    format_report,
    item_text,
    quality_report,
    resolve_collisions,
    text_embeddings,
)


def fitted(num_sid_levels: int, codebook_size: int, width: int = 3) -> ResidualKMeans:
    quantizer = ResidualKMeans(num_sid_levels, codebook_size)
    quantizer.fit_encode(np.random.default_rng(0).normal(size=(200, width)))
    return quantizer


QUANTIZERS = {shape: fitted(*shape) for shape in [(1, 5), (2, 3), (3, 2), (3, 3)]}


def distinct(codes: np.ndarray) -> int:
    return len(np.unique(codes, axis=0))


@st.composite
def catalogues(draw):
    """A quantizer, vectors and codes of `I ≤ K^M` items, crowded into few prefixes."""
    levels, size = draw(st.sampled_from(sorted(QUANTIZERS)))
    items = draw(st.integers(1, size**levels))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    crowd = draw(st.integers(1, size))
    return QUANTIZERS[levels, size], rng.normal(size=(items, 3)), rng.integers(0, crowd, size=(items, levels))


@settings(max_examples=60, deadline=None)
@given(catalogues())
def test_every_item_gets_its_own_sid_up_to_a_full_space(catalogue):
    quantizer, x, codes = catalogue
    before = codes.copy()
    resolved = resolve_collisions(codes, quantizer, x)
    assert distinct(resolved) == len(x)
    assert resolved.min() >= 0 and resolved.max() < quantizer.codebook_size
    np.testing.assert_array_equal(codes, before)
    np.testing.assert_array_equal(resolved, resolve_collisions(codes, quantizer, x))
    np.testing.assert_array_equal(resolved, resolve_collisions(resolved, quantizer, x))  # nothing left to move


@settings(max_examples=60, deadline=None)
@given(catalogues(), st.data())
def test_new_items_collide_with_nobody(catalogue, data):
    quantizer, x, codes = catalogue
    old = data.draw(st.integers(0, len(x)), label="old items")
    existing = resolve_collisions(codes[:old], quantizer, x[:old]) if old else codes[:0]
    new = assign_new_items(existing, quantizer, x[old:]) if old < len(x) else codes[:0]
    assert distinct(np.concatenate([existing, new])) == len(x)


def test_prefix_without_collision_stays_as_it_is():
    quantizer = QUANTIZERS[3, 3]
    codes = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 0, 0], [1, 0, 0]])
    resolved = resolve_collisions(codes, quantizer, np.random.default_rng(1).normal(size=(5, 3)))
    np.testing.assert_array_equal(resolved[:3], codes[:3])
    np.testing.assert_array_equal(resolved[:, :2], codes[:, :2])
    assert resolved[3, 2] != resolved[4, 2]


@pytest.mark.parametrize("seed", range(5))
def test_last_codes_have_minimal_total_distance(seed):
    quantizer = QUANTIZERS[1, 5]
    x = np.random.default_rng(seed).normal(size=(4, 3))
    resolved = resolve_collisions(np.zeros((4, 1), dtype=int), quantizer, x)
    cost = ((x[:, None] - quantizer.codebooks[0].numpy()) ** 2).sum(-1)
    best = min(cost[np.arange(4), list(order)].sum() for order in permutations(range(5), 4))
    assert cost[np.arange(4), resolved[:, 0]].sum() == pytest.approx(best)


def test_surplus_moves_worst_fit_to_next_best_code():
    quantizer = ResidualKMeans(2, 3)
    quantizer.fit_encode(np.array([[0.0], [10.0], [20.0], [20.1], [0.1]]))
    level = quantizer.codebooks[0, :, 0].numpy()
    low, mid, high = np.argsort(level)
    x = np.array([[0.0], [1.0], [6.0], [2.0], [-1.0]])  # five items in the prefix of three: 6.0 and 2.0 fit worst
    resolved = resolve_collisions(np.array([[low, 0]] * 5), quantizer, x)
    assert resolved[:, 0].tolist() == [low, low, mid, mid, low]
    resolved = resolve_collisions(np.array([[low, 0]] * 4), quantizer, x[:4])  # only 6.0 goes, alone where it arrives
    np.testing.assert_array_equal(resolved[2], quantizer.encode(x[2:3], np.array([[mid]]))[0])
    assert resolved[2, 1] != 0
    # With the middle prefix full as well, they go to the far one.
    x = np.concatenate([x, [[10.0], [10.1], [9.9]]])
    resolved = resolve_collisions(np.array([[low, 0]] * 5 + [[mid, 0]] * 3), quantizer, x)
    assert resolved[:, 0].tolist() == [low, low, high, high, low, mid, mid, mid]


def test_as_many_codes_as_items_is_warned_about():
    x = np.random.default_rng(0).normal(size=(6, 3))
    with pytest.warns(UserWarning, match="codebook_size is 6 for 6 items"):
        build_semantic_ids(x, num_sid_levels=2, codebook_size=6)


class SignQuantizer:
    """Written to the `Quantizer` protocol only: code `l` is the sign of column `l`."""

    num_sid_levels, codebook_size = 3, 2

    def fit_encode(self, x):
        return self.encode(x)

    def encode(self, x, prefix=None):
        codes = (x > 0).astype(np.int64)
        if prefix is not None:
            codes[:, : prefix.shape[1]] = prefix
        return codes

    def decode(self, codes):
        return (2 * codes - 1).astype(np.float32)

    def distances(self, x, prefix):
        return (x[:, prefix.shape[1]][:, None] - np.array([-1.0, 1.0])) ** 2

    def first_columns(self, width):
        return self

    def save_pretrained(self, save_directory):
        pass


def test_another_quantizer_needs_only_the_protocol():
    x = np.random.default_rng(0).normal(size=(7, 3))
    quantizer = SignQuantizer()
    codes, returned = build_semantic_ids(x, quantizer=quantizer)
    assert returned is quantizer
    assert distinct(codes) == 7
    assert (codes != quantizer.encode(x)).any()
    assert quality_report(codes, x, quantizer)["collisions"] == 0
    assert distinct(np.concatenate([codes, assign_new_items(codes, quantizer, x[:1])])) == 8


def test_more_items_than_sids_is_an_error():
    quantizer = QUANTIZERS[3, 2]
    with pytest.raises(ValueError, match="9 items .* codebook_size"):
        resolve_collisions(np.zeros((9, 3), dtype=int), quantizer, np.zeros((9, 3)))
    full = resolve_collisions(np.zeros((8, 3), dtype=int), quantizer, np.zeros((8, 3)))
    with pytest.raises(ValueError, match="9 items .* codebook_size"):
        assign_new_items(full, quantizer, np.zeros((1, 3)))


def test_new_item_gets_its_own_code_or_the_nearest_free_one():
    quantizer = QUANTIZERS[2, 3]
    x = np.array([[0.3, -0.2, 0.5]])
    own = quantizer.encode(x)[0]
    np.testing.assert_array_equal(assign_new_items(np.empty((0, 2), dtype=int), quantizer, x)[0], own)
    by_distance = quantizer.distances(x, own[None, :1])[0].argsort()
    existing = np.array([[own[0], by_distance[0]]])
    assert assign_new_items(existing, quantizer, x)[0].tolist() == [own[0], by_distance[1]]
    existing = np.array([[own[0], code] for code in range(3)])
    second = quantizer.distances(x, own[None, :0])[0].argsort()[1]
    expected = quantizer.encode(x, np.array([[second]]))[0]
    np.testing.assert_array_equal(assign_new_items(existing, quantizer, x)[0], expected)


@pytest.mark.parametrize(
    ("codes", "num_vectors", "message"),
    [
        (np.array([[0, 0], [0, 3]]), 2, "codes row 1"),
        (np.zeros((2, 3)), 2, r"codes has shape \(2, 3\)"),
        (np.zeros((2, 2)), 1, "codes has 2 rows"),
    ],
)
def test_wrong_codes_are_refused(codes, num_vectors, message):
    with pytest.raises(ValueError, match=message):
        resolve_collisions(codes, QUANTIZERS[2, 3], np.zeros((num_vectors, 3)))


def test_existing_codes_with_duplicates_are_refused():
    with pytest.raises(ValueError, match="existing_codes"):
        assign_new_items(np.array([[1, 1], [0, 1], [1, 1]]), QUANTIZERS[2, 3], np.zeros((1, 3)))


def test_catalogue_with_identical_items_has_no_collision():
    x = np.random.default_rng(0).normal(size=(60, 4))
    x[:30] = x[0]
    codes, quantizer = build_semantic_ids(x, num_sid_levels=3, codebook_size=4)
    assert codes.shape == (60, 3)
    assert codes.dtype == np.int64
    assert distinct(codes) == 60
    assert quantizer.encode(x).shape == (60, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scientific/Scientific", "beauty/Beauty"])
def test_real_catalogue_has_no_collision(shared_data, name):
    items = json.loads((shared_data / f"{name}.item.json").read_text(encoding="utf-8")).values()
    x = text_embeddings([item_text(item) for item in items], dim=64)
    codes, quantizer = build_semantic_ids(x)
    assert distinct(quantizer.encode(x)) < len(items) == distinct(codes)


def test_report_counts_by_hand():
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 0]])
    x = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    report = quality_report(codes, x)
    assert report["items"] == 4 and report["collisions"] == 1 and "reconstruction_error" not in report
    first, second = report["levels"]
    assert (first["codes_used"], first["prefixes"], first["entropy_bits"]) == (2, 2, 1.0)
    assert (second["codes_used"], second["prefixes"]) == (2, 3)
    assert second["entropy_bits"] == pytest.approx(-0.75 * np.log2(0.75) - 0.25 * np.log2(0.25))
    # Each item has the three others as neighbours, and one of them shares its first code.
    assert first["neighbours_kept"] == pytest.approx(1 / 3) == first["neighbours_by_chance"]
    assert second["neighbours_kept"] == pytest.approx(1 / 6) == second["neighbours_by_chance"]


def test_report_finds_the_neighbours_of_separate_groups():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(4), 11)
    x = 10 * np.eye(4)[group] + 0.1 * rng.normal(size=(44, 4))
    assert quality_report(group[:, None], x)["levels"][0]["neighbours_kept"] == 1.0
    assert quality_report(np.arange(44)[:, None] % 4, x)["levels"][0]["neighbours_kept"] < 0.5


def test_report_with_quantizer_counts_moved_items():
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    x[:3] = x[0]
    codes, quantizer = build_semantic_ids(x, num_sid_levels=3, codebook_size=4)
    report = quality_report(codes, x, quantizer)
    raw = quantizer.encode(x)
    assert report["collisions"] == 0 and report["collisions_before"] == 60 - distinct(raw) > 0
    assert report["items_moved"] == (raw != codes).any(axis=1).sum()
    expected = np.square(x - quantizer.decode(codes)).sum() / np.square(x - x.mean(0)).sum()
    assert report["reconstruction_error"] == pytest.approx(expected, rel=1e-4)
    text = format_report(report)
    assert text.count("\n| ") == 4 and "60 items, 0 collisions" in text


def test_report_refuses_other_numbers_of_items():
    with pytest.raises(ValueError, match=r"\(2, 1\) and embeddings .*\(3, 1\)"):
        quality_report(np.zeros((2, 1)), np.zeros((3, 1)))


def test_no_new_items_have_no_codes():
    quantizer = QUANTIZERS[3, 3]
    codes = assign_new_items(np.array([[0, 1, 2]]), quantizer, np.zeros((0, 3)))
    assert codes.shape == (0, 3)
    assert codes.dtype == np.int64


def test_neighbours_of_identical_vectors_exclude_the_item():
    # More identical vectors than neighbours: the item itself may be missing from its nearest.
    x = np.ones((30, 2))
    report = quality_report(np.arange(30)[:, None], x)
    assert report["levels"][0]["neighbours_kept"] == 0.0


def test_report_of_zero_vectors_has_no_neighbours():
    assert quality_report(np.arange(4)[:, None], np.zeros((4, 2)))["levels"][0]["neighbours_kept"] == 0.0
