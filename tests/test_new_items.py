"""Items that are added after the preparation: the saved text embedder, their vectors, and their Semantic IDs."""

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline

from lasar_hf.data import leave_one_out, toy_shop
from lasar_hf.files import folder_hashes
from lasar_hf.semantic_ids import (
    ItemEncoder,
    TfidfEmbedder,
    assign_new_items,
    build_semantic_ids,
    collaborative_embeddings,
    combine_views,
    item_text,
    text_embeddings,
)


SHOP = toy_shop(120, 96, 0)
TEXTS = [item_text(item) for item in SHOP.items]
TEXTS_OF = {
    "shop": TEXTS,
    "rank below dim": ["a b", "a c", "d"],
    "one text": ["saw blade"],
    "one word": ["saw", "saw saw", "--"],
    "no words": ["", "--"],
}


@pytest.mark.parametrize("name", TEXTS_OF)
def test_transform_gives_the_vectors_of_the_fit(name):
    texts = TEXTS_OF[name]
    embedder = TfidfEmbedder(dim=16, seed=3)
    vectors = embedder.fit_transform(texts)
    assert vectors.shape == (len(texts), 16)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, text_embeddings(texts, dim=16, seed=3))
    np.testing.assert_allclose(embedder.transform(texts[::-1]), vectors[::-1], atol=1e-6)


@pytest.mark.parametrize("name", TEXTS_OF)
def test_embedder_is_exactly_the_same_after_reload(tmp_path, name):
    embedder = TfidfEmbedder(dim=16, seed=3).fit(TEXTS_OF[name])
    embedder.save_pretrained(tmp_path / "one")
    loaded = TfidfEmbedder.from_pretrained(tmp_path / "one")
    np.testing.assert_array_equal(loaded.transform(TEXTS), embedder.transform(TEXTS))
    loaded.save_pretrained(tmp_path / "two")
    assert folder_hashes(tmp_path / "one", "*") == folder_hashes(tmp_path / "two", "*")


@pytest.mark.parametrize("name", TEXTS_OF)
def test_unknown_words_give_zero_rows(name):
    embedder = TfidfEmbedder(dim=16).fit(TEXTS_OF[name])
    assert not embedder.transform(["unheard"]).any()
    assert embedder.transform([]).shape == (0, 16)


def test_vectors_equal_plain_scikit_learn():
    pipeline = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"(?u)\w+"),
        TruncatedSVD(16, random_state=3),
    )
    np.testing.assert_allclose(TfidfEmbedder(16, 3).fit_transform(TEXTS), pipeline.fit_transform(TEXTS), atol=1e-6)


def test_embedder_must_be_fitted():
    with pytest.raises(ValueError, match="fit"):
        TfidfEmbedder().transform(["saw"])


@pytest.mark.parametrize(("texts", "dim", "argument"), [([], 4, "texts"), ("saw", 4, "texts"), (["saw"], 0, "dim")])
def test_embedder_refuses_wrong_arguments(texts, dim, argument):
    with pytest.raises(ValueError, match=argument):
        TfidfEmbedder(dim).fit(texts)


def test_missing_embedder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tfidf_embedder\.safetensors"):
        TfidfEmbedder.from_pretrained(tmp_path)


def test_item_encoder_gives_the_text_columns_of_prepared_vectors(tmp_path):
    ItemEncoder(TfidfEmbedder(16).fit(TEXTS)).save_pretrained(tmp_path)
    vectors = ItemEncoder.from_pretrained(tmp_path).encode(SHOP.items)
    expected = combine_views([text_embeddings(TEXTS, 16), np.ones((len(TEXTS), 3))])[:, :16]
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_item_without_text_is_embedded_by_its_id():
    encoder = ItemEncoder(TfidfEmbedder(2).fit(["saw 007", "saw 008"]))
    known, unknown = encoder.encode([{"item_id": "007"}, {"item_id": "009"}])
    assert known.any()
    assert not unknown.any()


def test_item_encoder_remembers_the_model(tmp_path, monkeypatch):
    ItemEncoder("some/model").save_pretrained(tmp_path)
    calls = []

    def stub(texts, model):
        calls.append((texts, model))
        return np.array([[3.0, 4.0]], dtype=np.float32)

    monkeypatch.setattr("lasar_hf.semantic_ids.new_items.text_embeddings", stub)
    np.testing.assert_allclose(ItemEncoder.from_pretrained(tmp_path).encode([{"title": "Saw"}]), [[0.6, 0.8]])
    assert calls == [(["Saw"], "some/model")]


def test_missing_item_encoder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"item_encoder\.json"):
        ItemEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(("collaborative_dim", "least"), [(0, 1.0), (16, 0.9)])
def test_near_duplicate_gets_the_first_code_of_its_original(collaborative_dim, least):
    embedder = TfidfEmbedder(32)
    text = embedder.fit_transform(TEXTS)
    collaborative = collaborative_embeddings(leave_one_out(SHOP).train, len(TEXTS), collaborative_dim or 1)
    vectors = combine_views([text, collaborative] if collaborative_dim else [text])
    codes, quantizer = build_semantic_ids(vectors, 3, 32)
    new = ItemEncoder(embedder).encode([item | {"title": f"{item['title']}, reprint"} for item in SHOP.items])
    new_codes = assign_new_items(codes, quantizer.first_columns(new.shape[1]), new)
    assert len(np.unique(np.concatenate([codes, new_codes]), axis=0)) == 2 * len(codes)
    same = (new_codes[:, 0] == codes[:, 0]).mean()
    assert same >= least
    if collaborative_dim:  # zero columns in place of the unknown ones find fewer
        zero_padded = quantizer.encode(np.pad(new, ((0, 0), (0, collaborative_dim))))
        assert same > (zero_padded[:, 0] == codes[:, 0]).mean() + 0.1
