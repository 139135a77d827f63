"""Item text and its vectors: fields, fallbacks, cache, co-occurrence, combination of views."""

import sys
import types

import numpy as np
import pytest

from lasar_hf.files import folder_hashes
from lasar_hf.semantic_ids import (
    collaborative_embeddings,
    combine_views,
    item_text,
    text_embeddings,
)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"description": "Cuts.", "title": "Saw", "brand": "Acme", "categories": "Tools"}, "Saw. Acme. Tools. Cuts."),
        ({"title": "  Saw\n", "brand": None, "categories": [["Tools", "Saws"], []]}, "Saw. Tools, Saws"),
        ({"title": "", "description": [], "asin": "B0047"}, "B0047"),
        ({"title": "", "asin": "B0047", "description": "red"}, "red"),
        ({}, ""),
    ],
)
def test_item_text(item, text):
    assert item_text(item) == text


def test_text_embeddings_are_deterministic_and_near_for_similar_texts():
    texts = ["red nail polish", "blue nail polish", "hard start relay", "capacitor relay start kit", "nail file"]
    vectors = text_embeddings(texts, dim=4, seed=1)
    assert vectors.shape == (5, 4)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, text_embeddings(texts, dim=4, seed=1))
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2]) + 0.2


def test_text_embeddings_keep_their_width_when_there_is_little_text():
    assert text_embeddings(["a b", "a c", "d"], dim=64).shape == (3, 64)
    assert text_embeddings(["saw"], dim=8).shape == (1, 8)
    np.testing.assert_array_equal(text_embeddings(["", "--"], dim=8), np.zeros((2, 8)))


def test_item_without_text_gets_a_zero_row_beside_items_with_text():
    vectors = text_embeddings(["saw blade", "", "saw handle"], dim=2)
    assert not vectors[1].any()
    assert vectors[0].any()


def test_text_embeddings_refuse_other_types():
    with pytest.raises(ValueError, match="row 1 is dict"):
        text_embeddings(["saw", {"title": "saw"}])
    with pytest.raises(ValueError, match="empty"):
        text_embeddings([])


@pytest.fixture
def encoder(monkeypatch):
    """Replaces sentence-transformers: records the texts it embeds and returns their lengths as vectors."""

    class Encoder:
        asked, loaded, dies_at = [], 0, None

        def __init__(self, name):
            assert name in ("some/model", "other/model")
            Encoder.loaded += 1

        def encode(self, texts, batch_size):
            if len(self.asked) == self.dies_at:
                raise KeyboardInterrupt
            self.asked.append(texts)
            return np.array([[len(text), 1.0] for text in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Encoder))
    return Encoder


def embed(texts, cache_dir=None, model="some/model"):
    return text_embeddings(texts, model=model, cache_dir=cache_dir)


def test_sentence_transformers_model_is_used_or_its_extra_named(encoder, monkeypatch):
    vectors = embed(["ab", "abc"])
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, [[2, 1], [3, 1]])
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"lasar_hf\[embed\]"):
        embed(["ab"])


def test_cached_texts_are_not_embedded_again(encoder, tmp_path):
    expected = [[2, 1], [3, 1], [2, 1]]
    for _ in range(2):
        vectors = embed(["ab", "abc", "ab"], tmp_path)
        np.testing.assert_array_equal(vectors, expected)
        assert vectors.dtype == np.float32
    assert encoder.asked == [["ab", "abc"]]
    assert encoder.loaded == 1
    np.testing.assert_array_equal(embed(["new one", "abc", "\ud800"], tmp_path), [[7, 1], [3, 1], [1, 1]])
    assert encoder.asked[1:] == [["new one", "\ud800"]]
    embed(["abc"], tmp_path, "other/model")  # another model has other vectors
    assert encoder.asked[2:] == [["abc"]]


def test_killed_embedding_resumes_with_same_bytes(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("lasar_hf.semantic_ids.embeddings.CACHE_BATCH", 2)
    texts = ["a", "bb", "ccc", "dddd", "eeeee"]
    calm = embed(texts, tmp_path / "calm")
    for dies_at in range(3):
        encoder.asked, encoder.dies_at = [], dies_at
        with pytest.raises(KeyboardInterrupt):
            embed(texts, tmp_path / str(dies_at))
        encoder.dies_at = None
        np.testing.assert_array_equal(embed(texts, tmp_path / str(dies_at)), calm)
        assert encoder.asked == [["a", "bb"], ["ccc", "dddd"], ["eeeee"]]  # each once
        assert folder_hashes(tmp_path / str(dies_at), "*") == folder_hashes(tmp_path / "calm", "*")


def test_unfinished_cache_files_are_ignored(encoder, tmp_path):
    embed(["a"], tmp_path)
    (tmp_path / ".half.123.tmp.npy").write_bytes(b"x")
    np.testing.assert_array_equal(embed(["a"], tmp_path), [[1, 1]])
    assert encoder.asked == [["a"]]


def test_collaborative_embeddings_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 6, size=length).tolist() for length in (0, 1, 3, 9)]
    counts = np.zeros((6, 6))
    for sequence in sequences:
        for i, first in enumerate(sequence):
            for j in range(i + 1, min(i + 6, len(sequence))):  # up to 5 positions ahead
                if first != sequence[j]:
                    counts[first, sequence[j]] += 1 / (j - i)
                    counts[sequence[j], first] += 1 / (j - i)
    total = counts.sum(axis=1)
    context = total**0.75 / (total**0.75).sum()
    ppmi = np.zeros((6, 6))
    for i, j in zip(*counts.nonzero(), strict=True):
        ppmi[i, j] = max(0, np.log(counts[i, j] / total[i]) - np.log(context[j]))
    # At full width the SVD keeps all inner products.
    vectors = collaborative_embeddings(sequences, 6, dim=6)
    np.testing.assert_allclose(vectors @ vectors.T, ppmi @ ppmi.T, atol=1e-4)


def test_collaborative_embeddings_separate_groups_and_leave_unseen_items_zero():
    rng = np.random.default_rng(0)
    sequences = [rng.permutation(5 + group * 5 - np.arange(5) - 1).tolist() for group in (0, 1) for _ in range(20)]
    vectors = collaborative_embeddings(sequences, num_items=12, dim=6, seed=3)
    assert vectors.shape == (12, 6)
    assert vectors.dtype == np.float32
    assert not vectors[10:].any()
    assert cosine(vectors[0], vectors[1]) > 0.5 > 0.1 > abs(cosine(vectors[0], vectors[7]))
    np.testing.assert_array_equal(vectors, collaborative_embeddings(sequences, num_items=12, dim=6, seed=3))


def test_collaborative_embeddings_of_nothing_are_zero():
    for sequences in ([], [[]], [[1], [2, 2]]):
        np.testing.assert_array_equal(collaborative_embeddings(sequences, 3, dim=4), np.zeros((3, 4)))


def test_collaborative_embeddings_name_the_sequence_with_an_unknown_item():
    with pytest.raises(ValueError, match="sequences row 1 contains item 3"):
        collaborative_embeddings([[0, 1], [2, 3]], num_items=3)


def test_combine_views_gives_each_view_the_length_of_its_weight():
    views = [np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[0.0, 0.0, 2.0], [1.0, 0.0, 0.0]], dtype=np.float32)]
    combined = combine_views(views, [1.0, 0.5])
    assert combined.dtype == np.float32
    np.testing.assert_allclose(combined, [[0.6, 0.8, 0, 0, 0.5], [0, 0, 0.5, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(combine_views(views)[1], [0, 0, 1, 0, 0])


def test_combine_views_refuses_views_that_do_not_match():
    with pytest.raises(ValueError, match=r"views number 1"):
        combine_views([np.ones((2, 2)), np.ones((3, 2))])
    with pytest.raises(ValueError, match="weights has 2"):
        combine_views([np.ones((2, 2))], [1, 2])
    with pytest.raises(ValueError, match="empty"):
        combine_views([])


@pytest.mark.parametrize("name", ["some/model@abc123", "some/model", "folder@2"])
def test_a_model_can_be_pinned(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder@2").mkdir()
    loaded = []

    def encoder(model, **options):
        loaded.append((model, options))
        return types.SimpleNamespace(encode=lambda texts, batch_size: np.zeros((len(texts), 2)))

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=encoder))
    text_embeddings(["a cup"], model=name)
    assert loaded == [("some/model", {"revision": "abc123"}) if "abc" in name else (name, {})]
