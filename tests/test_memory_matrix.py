"""The matrix of the item memory: steps of other users, and items with similar text."""

import numpy as np
import pytest

from lasar_hf.evaluation import memory_matrix, similar_items


def test_similar_items_are_the_largest_cosines():
    vectors = np.random.default_rng(0).normal(size=(2500, 5)).astype(np.float32)  # more than a block
    vectors[7] = 0
    found = similar_items(vectors, 4).toarray()
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    cosines = units @ units.T
    np.fill_diagonal(cosines, 0)
    for item in (0, 1023, 1024, 2499):
        expected = np.sort(cosines[item])[::-1][:4]
        np.testing.assert_allclose(np.sort(found[item])[::-1][:4], expected, atol=1e-6)
        assert (found[item] > 0).sum() == 4
    assert not found[7].any()
    assert not found[:, 7].any()


def test_few_items_are_all_similar():
    found = similar_items(np.array([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]))
    np.testing.assert_allclose(found.toarray(), [[0, 0.5**0.5, 0], [0.5**0.5, 0, 0], [0, 0, 0]], atol=1e-6)


def test_text_counts_as_further_steps():
    train = [[0, 1], [0, 1], [2, 0]]
    similar = similar_items(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    matrix = memory_matrix(train, 3, similar, mirror=0.0, shrinkage=10.0, text_weight=3.0, temperature=0.5).toarray()
    text = 3 * np.exp((0.5**0.5 - 1) / 0.5)
    expected = [[0, 2 / 13, text / 13], [0, 0, text / 12], [(1 + text) / 11, text / 11, 0]]
    np.testing.assert_allclose(matrix, expected, atol=1e-6)


def test_without_text_there_are_only_steps():
    assert similar_items(None) is None
    assert memory_matrix([[0, 1]], 3, mirror=0.0, shrinkage=1.0).toarray().tolist() == [[0, 0.5, 0], [0] * 3, [0] * 3]


@pytest.mark.parametrize("wrong", [{"shrinkage": 0.0}, {"temperature": 0.0}, {"text_weight": -1.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        memory_matrix([[0, 1]], 2, similar_items(np.eye(2)), **wrong)
