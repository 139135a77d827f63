"""Items that come after the preparation: the text view on disk, their vectors, and their codes beside the old ones."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from lasar_hf.data import leave_one_out, toy_shop
from lasar_hf.semantic_ids import (
    ItemEncoder,
    ResidualKMeans,
    TfidfView,
    assign_new_items,
    collaborative_embeddings,
    combine_views,
    item_text,
    resolve_collisions,
    text_embeddings,
)
from tests.preparing import files


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
def test_a_text_keeps_the_vector_that_it_had_at_the_fit(tmp_path, name):
    texts = TEXTS_OF[name]
    fitted = text_embeddings(texts, dim=16, seed=3)
    view = TfidfView(dim=16, seed=3)
    np.testing.assert_array_equal(view.fit_transform(texts), fitted)
    new = view.transform([*reversed(texts), "unheard"])
    assert new.dtype == np.float32 and new.shape == (len(texts) + 1, 16)
    np.testing.assert_allclose(new[:-1], fitted[::-1], atol=1e-6)
    assert not new[-1].any() and view.transform([]).shape == (0, 16)
    view.save_pretrained(tmp_path / "one")
    loaded = TfidfView.from_pretrained(tmp_path / "one")
    np.testing.assert_array_equal(loaded.transform([*reversed(texts), "unheard"]), new)
    loaded.save_pretrained(tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert set(files(tmp_path / "one")) == {"text_view.json", "text_view.safetensors"}


def test_a_view_is_on_disk_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no words yet: call fit"):
        TfidfView().transform(["saw"])
    with pytest.raises(FileNotFoundError, match="holds no text_view.json"):
        TfidfView.from_pretrained(tmp_path)
    TfidfView(4).fit(TEXTS).save_pretrained(tmp_path)
    monkeypatch.setattr("lasar_hf.semantic_ids.text_view.os.replace", lambda *_: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        TfidfView(8).fit(TEXTS).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):  # not the settings of the new one with the weights of the old
        TfidfView.from_pretrained(tmp_path)


def test_files_of_two_views_are_refused(tmp_path):
    TfidfView(4).fit(TEXTS).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "text_view.json").read_text())
    settings["vocabulary"].pop()
    (tmp_path / "text_view.json").write_text(json.dumps(settings))
    columns = load_file(tmp_path / "text_view.safetensors")["components"].shape[1]
    with pytest.raises(ValueError, match=f"{columns - 1} words .* of {columns}: save the view again"):
        TfidfView.from_pretrained(tmp_path)


def test_an_item_encoder_gives_the_text_columns_of_the_prepared_vectors(tmp_path):
    view = TfidfView(16).fit(TEXTS)
    ItemEncoder(view).save_pretrained(tmp_path)
    vectors = ItemEncoder.from_pretrained(tmp_path).encode(SHOP.items)
    expected = combine_views([text_embeddings(TEXTS, 16), np.ones((len(TEXTS), 3))])[:, :16]
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    by_id = ItemEncoder(TfidfView(2).fit(["saw 007", "saw 008"])).encode([{"item_id": "007"}, {"item_id": "009"}])
    assert by_id[0].any() and not by_id[1].any()


def test_an_item_encoder_remembers_the_name_of_a_model(tmp_path, monkeypatch):
    ItemEncoder("some/model").save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(
        "lasar_hf.semantic_ids.item_encoder.text_embeddings",
        lambda texts, model: asked.append((texts, model)) or np.array([[3.0, 4.0]], dtype=np.float32),
    )
    np.testing.assert_allclose(ItemEncoder.from_pretrained(tmp_path).encode([{"title": "Saw"}]), [[0.6, 0.8]])
    assert asked == [(["Saw"], "some/model")]
    with pytest.raises(FileNotFoundError, match="holds no item_encoder.json: run recipes/prepare.py"):
        ItemEncoder.from_pretrained(tmp_path / "other")


@pytest.mark.parametrize("balanced", [False, True])
def test_a_narrowed_quantizer_knows_the_first_columns_only(balanced):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5)).astype(np.float32)
    quantizer = ResidualKMeans(3, 6, balanced=balanced, device="cpu").fit(x)
    narrow = quantizer.first_columns(2)
    prices = quantizer.codebooks.square().sum(dim=2) / 2 - quantizer.bias
    left = x[:, :2].copy()
    for level, codes in enumerate(narrow.encode(x[:, :2]).T):
        centres = quantizer.codebooks[level, :, :2].numpy()
        cost = ((left[:, None] - centres) ** 2).sum(axis=2) / 2 - prices[level].numpy()
        np.testing.assert_allclose(cost[np.arange(60), codes], cost.min(axis=1), atol=1e-5)
        left -= centres[codes]
    np.testing.assert_array_equal(quantizer.first_columns(5).encode(x), quantizer.encode(x))
    assert quantizer.codebooks.shape == (3, 6, 5)
    for width in (0, 6):
        with pytest.raises(ValueError, match=f"width is {width}, expected 1 to 5"):
            quantizer.first_columns(width)


@pytest.mark.parametrize(("collaborative_dim", "least"), [(0, 1.0), (16, 0.9)])
def test_a_near_duplicate_gets_the_first_code_of_its_model(collaborative_dim, least):
    """Also, nearly always, where the old items' codes come from co-occurrence too, of which the new ones have none."""
    view = TfidfView(32)
    text = view.fit_transform(TEXTS)
    taken = collaborative_embeddings(leave_one_out(SHOP).train, len(TEXTS), collaborative_dim or 1)
    vectors = combine_views([text, taken][: 1 + bool(collaborative_dim)])
    quantizer = ResidualKMeans(3, 16, device="cpu").fit(vectors)
    codes = resolve_collisions(quantizer.encode(vectors), quantizer, vectors)
    new = ItemEncoder(view).encode([item | {"title": f"{item['title']}, reprint"} for item in SHOP.items])
    new_codes = assign_new_items(codes, quantizer.first_columns(new.shape[1]), new)
    assert len(np.unique(np.concatenate([codes, new_codes]), axis=0)) == 2 * len(codes)
    same = (new_codes[:, 0] == codes[:, 0]).mean()
    assert same >= least
    if collaborative_dim:  # a zero row is not the same as an unknown one
        as_zero = quantizer.encode(np.pad(new, ((0, 0), (0, collaborative_dim))))
        assert same > (as_zero[:, 0] == codes[:, 0]).mean() + 0.1
