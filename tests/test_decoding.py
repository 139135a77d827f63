"""Catalogue, constraint and shared-prefix beam search against brute force."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar_hf import RecommendOutput, SidCatalog
from lasar_hf.model.decoding_lasar import sample_items
from tests.references import draw_model_and_catalog, draw_prompts, score_every_item
from tests.tiny import batch, row, sid_ids, tiny_catalog, tiny_model


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_recommend_orders_like_scoring_every_item(data):
    model, catalog = draw_model_and_catalog(data)
    prompts, depths, inputs = draw_prompts(data, model)
    recommended = model.recommend(**inputs, catalog=catalog, top_k=len(catalog), num_beams=64, latent_steps=depths)
    assert torch.equal(recommended.latent_steps, depths)
    for i, prompt in enumerate(prompts):
        expected = score_every_item(model, prompt, depths[i], catalog)
        order = expected.argsort(descending=True)
        assert recommended.items[i].tolist() == order.tolist()
        torch.testing.assert_close(recommended.scores[i].double(), expected[order], atol=2e-5, rtol=2e-5)
        assert recommended.scores[i].exp().sum().item() == pytest.approx(1, abs=1e-4)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_narrow_beams_are_beam_search(data):
    """A textbook beam search over prefixes, one forward pass per beam, finds the same items."""
    model, catalog = draw_model_and_catalog(data)
    width, depth = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 3))
    prompt, config = row(model, 6, depth, seed=5), model.config
    codes = [tuple(c) for c in catalog.codes.tolist()]
    beams = [((), 0.0)]
    for level in range(catalog.num_levels):
        grown = []
        for prefix, score in beams:
            ids = prompt + [config.latent_end_token_id, *sid_ids(model, prefix)]
            logits = model(torch.tensor([ids])).logits[0, -1].double()
            follow = sorted({c[level] for c in codes if c[:level] == prefix})
            log_probs = logits[[config.sid_token_id(level, c) for c in follow]].log_softmax(0)
            grown += [((*prefix, c), score + p.item()) for c, p in zip(follow, log_probs, strict=True)]
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
    recommended = model.recommend(
        **batch([prompt[: len(prompt) - depth]]), catalog=catalog, top_k=1, num_beams=width, latent_steps=depth
    )
    assert codes[recommended.items[0, 0]] == beams[0][0]
    wide = model.recommend(
        **batch([prompt[: len(prompt) - depth]]), catalog=catalog, top_k=width, num_beams=width, latent_steps=depth
    )
    assert [codes[i] for i in wide.items[0].tolist() if i >= 0] == [beam[0] for beam in beams]


def test_only_beams_with_a_choice_left_are_read(monkeypatch):
    """First `<|latent_end|>`, then only prefixes that at least two items continue."""
    model, _ = tiny_model()
    codes = [[0, 0, 0], [0, 0, 1], [1, 2, 0], [1, 2, 3], [2, 1, 1], [3, 3, 3], [0, 1, 0]]
    catalog, read = SidCatalog(codes, list("abcdefg")), []
    read_tokens = model.model.read_tokens

    def counted(state, token_ids, visible, *depths):
        read.append(token_ids.shape[1])
        return read_tokens(state, token_ids, visible, *depths)

    monkeypatch.setattr(model.model, "read_tokens", counted)
    prompt = row(model, 5, 0)
    recommended = model.recommend(**batch([prompt]), catalog=catalog, top_k=7, latent_steps=1)
    assert read == [1, 2, 2]  # a_2 and a_3 lead to one item each
    expected = score_every_item(model, prompt, 1, catalog)
    assert recommended.items[0].tolist() == expected.argsort(descending=True).tolist()
    read.clear()
    model.recommend(**batch([prompt]), catalog=SidCatalog(codes[3:6], list("abc")), top_k=3)
    assert read == [1]


def test_policy_head_chooses_the_depth():
    model, _ = tiny_model()
    inputs = batch([row(model, 5, 0), row(model, 8, 0, seed=1), row(model, 3, 0, seed=2)])
    chosen = model(**inputs).depth_logits.argmax(-1) + 1
    recommended = model.recommend(**inputs, catalog=tiny_catalog(), top_k=4)
    assert recommended.latent_steps.tolist() == chosen.tolist()
    same = model.recommend(**inputs, catalog=tiny_catalog(), top_k=4, latent_steps=chosen)
    assert torch.equal(same.items, recommended.items)


def test_more_items_asked_than_there_are():
    model, _ = tiny_model()
    recommended = model.recommend(**batch([row(model, 5, 0)]), catalog=tiny_catalog(num_items=3), top_k=5)
    assert sorted(recommended.items[0, :3].tolist()) == [0, 1, 2]
    assert recommended.items[0, 3:].tolist() == [-1, -1]
    assert recommended.scores[0, 3:].tolist() == [-torch.inf, -torch.inf]
    narrow = model.recommend(**batch([row(model, 5, 0)]), catalog=tiny_catalog(), top_k=5, num_beams=1)
    assert narrow.scores.isfinite().all()  # the search is as wide as the list


def test_items_that_share_a_semantic_id():
    codes, ids = [[0, 1, 2], [3, 0, 0], [0, 1, 2]], ["a", "b", "c"]
    with pytest.raises(ValueError, match="Items 'a' and 'c' share the Semantic ID"):
        SidCatalog(codes, ids)
    model, _ = tiny_model()
    recommended = model.recommend(
        **batch([row(model, 5, 0)]), catalog=SidCatalog(codes, ids, allow_collisions=True), top_k=3
    )
    rank = recommended.items[0].tolist()
    assert rank.index(2) == rank.index(0) + 1
    assert recommended.scores[0, rank.index(0)] == recommended.scores[0, rank.index(2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(codes=[[0, 1], [-1, 2]], item_ids=["a", "b"]), "'b'"),
        (dict(codes=[[0, 1], [1, 2]], item_ids=["a", "a"]), "item_ids has 'a'"),
        (dict(codes=[[0, 1]], item_ids=["a", "b"]), "codes has shape"),
    ],
)
def test_bad_catalogues_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SidCatalog(**arguments)


def test_catalogue_must_match_the_model():
    model, _ = tiny_model()
    inputs = batch([row(model, 5, 0)])
    with pytest.raises(ValueError, match="catalogue has 2 levels"):
        model.recommend(**inputs, catalog=tiny_catalog(num_items=5, num_sid_levels=2))
    with pytest.raises(ValueError, match="codebook_size"):
        model.recommend(**inputs, catalog=SidCatalog([[0, 0, 4]], ["a"]))
    with pytest.raises(ValueError, match="has no catalog"):
        model.recommend(**inputs)


def test_bad_requests_are_refused():
    model, _ = tiny_model()
    catalog, good = tiny_catalog(), row(model, 5, 0)
    with pytest.raises(ValueError, match="Prompt 1"):
        model.recommend(**batch([good, good[:-1] + [3]]), catalog=catalog)
    with pytest.raises(ValueError, match="latent_steps is 5 for prompt 0"):
        model.recommend(**batch([good]), catalog=catalog, latent_steps=5)
    with pytest.raises(ValueError, match="latent_steps is -1 for prompt 1"):
        model.recommend(**batch([good, good]), catalog=catalog, latent_steps=torch.tensor([1, -1]))
    for wrong in (2.0, True, torch.tensor([1, 2, 3]), torch.tensor([[1, 2]])):
        with pytest.raises(ValueError, match="latent_steps has type"):
            model.recommend(**batch([good, good]), catalog=catalog, latent_steps=wrong)


def test_nan_logits_are_an_error():
    model, _ = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[model.config.sid_token_id(1, 0) :] = torch.nan
    inputs, catalog = batch([row(model, 5, 0)]), tiny_catalog()
    with pytest.raises(ValueError, match="NaN"):
        model.recommend(**inputs, catalog=catalog)
    with pytest.raises(ValueError, match="NaN"):
        model.recommend(**inputs, catalog=catalog, deny=[[0, 1]])
    for replacement in (True, False):
        with pytest.raises(ValueError, match="NaN"), model.evaluation_mode():
            sample_items(model, model.encode_prompts(**inputs), catalog.trie("cpu"), 4, replacement=replacement)


def test_the_weights_that_are_not_finite_are_named():
    model, _ = tiny_model()
    inputs, catalog = batch([row(model, 5, 0)]), tiny_catalog()
    model.lm_head.weight.data[model.config.sid_token_id(2, 1), 3] = torch.inf
    with pytest.raises(ValueError, match="NaN. lm_head.weight has values that are not finite"):
        model.recommend(**inputs, catalog=catalog)


def test_a_depth_is_never_chosen_by_nan():
    model, _ = tiny_model()
    with torch.no_grad():
        model.model.policy_head.out_proj.bias[2] = torch.nan
    inputs, catalog = batch([row(model, 5, 0)]), tiny_catalog()
    with pytest.raises(ValueError, match="policy head's logits"):
        model.recommend(**inputs, catalog=catalog)
    assert (model.recommend(**inputs, catalog=catalog, latent_steps=2).items >= 0).all()


def test_prompts_beyond_the_position_range_are_refused():
    """The tiny backbones have 256 positions; prompt, latent steps, `<|latent_end|>` and 3 codes must fit."""
    model, _ = tiny_model()
    catalog, short = tiny_catalog(), row(model, 5, 0)
    fits, too_long = row(model, 250, 0), row(model, 251, 0)
    model.recommend(**batch([short, fits]), catalog=catalog, latent_steps=2)
    message = "Prompt 1 needs 257 positions .* max_position_embeddings=256"
    with pytest.raises(ValueError, match=message):
        model.recommend(**batch([short, too_long]), catalog=catalog, latent_steps=torch.tensor([4, 2]))
    model.recommend(**batch([short, row(model, 248, 0)]), catalog=catalog)
    with pytest.raises(ValueError, match=message):  # the policy head may choose up to 4 steps
        model.recommend(**batch([short, row(model, 249, 0)]), catalog=catalog)


def test_an_empty_prompt_is_refused():
    model, _ = tiny_model()
    inputs = batch([row(model, 5, 0), row(model, 5, 0)])
    inputs["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="Prompt 1"):
        model.recommend(**inputs, catalog=tiny_catalog())


def test_recommend_leaves_the_training_mode_alone():
    model, _ = tiny_model()
    model.train()
    model.recommend(**batch([row(model, 5, 0)]), catalog=tiny_catalog())
    assert model.training and model.model.backbone.training


def test_catalogue_round_trip(tmp_path):
    catalog = tiny_catalog()
    catalog.save_pretrained(tmp_path)
    loaded = SidCatalog.from_pretrained(tmp_path)
    assert torch.equal(loaded.codes, catalog.codes) and loaded.item_ids == catalog.item_ids
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sid_catalog.json", "sid_catalog.safetensors"]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_trie_holds_exactly_the_catalogue(data):
    num_items = data.draw(st.integers(1, 60))
    catalog = tiny_catalog(num_items, seed=data.draw(st.integers(0, 999)))
    trie, prefixes = catalog.trie("cpu"), [((), 0)]
    for level in range(3):
        grown = []
        for prefix, node in prefixes:
            codes, child = trie.children(level, torch.tensor(node))
            number = {c: n for c, n in zip(codes.tolist(), child.tolist(), strict=True) if n >= 0}
            grown += [((*prefix, c), n) for c, n in number.items()]
            found = trie.descend(level, torch.full((5,), node), torch.arange(5))  # the last code is in no catalogue
            assert found.tolist() == [number.get(c, -1) for c in range(5)]
        prefixes = grown
    found = {prefix: trie.items(torch.tensor(node)).tolist() for prefix, node in prefixes}
    assert found == {tuple(c): [i] for i, c in enumerate(catalog.codes.tolist())}


@pytest.mark.parametrize("replacement", [True, False])
def test_samples_follow_the_policy(replacement):
    """First draws, with or without replacement, are distributed as the brute-force probabilities."""
    model, _ = tiny_model()
    catalog, prompt, depth = tiny_catalog(num_items=12), row(model, 5, 0), 2
    expected = score_every_item(model, prompt, depth, catalog)
    repeats, samples = 400, 6
    torch.manual_seed(0)
    with model.evaluation_mode():
        state = model.encode_prompts(torch.tensor([prompt] * repeats), latent_steps=depth)
        leaves, scores = sample_items(model, state, catalog.trie("cpu"), samples, replacement=replacement)
    items = catalog.trie("cpu").items(leaves)[..., 0]
    torch.testing.assert_close(scores.double(), expected[items], atol=1e-4, rtol=1e-4)
    assert (scores.diff(dim=1) <= 0).all()
    if replacement:
        counts = torch.bincount(items.flatten(), minlength=12).double() / items.numel()
        assert (counts - expected.exp()).abs().max() < 0.03
    else:
        assert all(len(set(drawn)) == samples for drawn in items.tolist())
        # Inclusion probabilities of sampling without replacement, by simulation from the brute-force distribution.
        simulated = torch.multinomial(expected.exp().float().expand(20_000, -1), samples)
        inclusion = torch.bincount(simulated.flatten(), minlength=12).double() / 20_000
        counts = torch.bincount(items.flatten(), minlength=12).double() / repeats
        assert (counts - inclusion).abs().max() < 0.08


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_samples_carry_the_log_probability_of_the_policy(data):
    """Whatever the depths, paddings and numbers; without replacement none repeats and none is missing."""
    model, catalog = draw_model_and_catalog(data)
    prompts, depths, inputs = draw_prompts(data, model)
    count, trie = data.draw(st.integers(1, 12)), catalog.trie("cpu")
    expected = [score_every_item(model, prompt, depth, catalog) for prompt, depth in zip(prompts, depths, strict=True)]
    for replacement in (True, False):
        with model.evaluation_mode():
            leaves, scores = sample_items(
                model, model.encode_prompts(**inputs, latent_steps=depths), trie, count, replacement=replacement
            )
        items = trie.items(leaves)[..., 0]
        for drawn, got, of_item in zip(items, scores, expected, strict=True):
            drawn, got = drawn[got > -torch.inf], got[got > -torch.inf]
            torch.testing.assert_close(got.double(), of_item[drawn], atol=2e-5, rtol=2e-5)
            assert len(drawn) == (count if replacement else min(count, len(catalog)))
            assert replacement or len(set(drawn.tolist())) == len(drawn)


def test_more_samples_without_replacement_than_items():
    model, _ = tiny_model()
    catalog = tiny_catalog(num_items=3)
    with model.evaluation_mode():
        state = model.encode_prompts(torch.tensor([row(model, 5, 0)]))
        leaves, scores = sample_items(model, state, catalog.trie("cpu"), 5, replacement=False)
    assert sorted(leaves[0].tolist()) == [0, 1, 2] and scores.isfinite().all()


@pytest.fixture(scope="module")
def prompts():
    """A model and two left-padded prompts."""
    model, _ = tiny_model()
    return model, batch([row(model, 5, 0), row(model, 8, 0, seed=1)])


def changed(tensor, *place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("Prompt 1 .*attention_mask", lambda c, ids, mask: dict(attention_mask=changed(mask, 1, 3, value=0))),
        (
            "Prompt 1 .*latent_start",
            lambda c, ids, mask: dict(input_ids=changed(ids, 1, 3, value=c.latent_start_token_id)),
        ),
        (
            "Prompt 1 .*latent_end",
            lambda c, ids, mask: dict(input_ids=changed(ids, 1, 3, value=c.latent_end_token_id)),
        ),
        ("Prompt 1 .*26", lambda c, ids, mask: dict(input_ids=changed(ids, 1, 3, value=27))),
        ("Prompt 1 .*26", lambda c, ids, mask: dict(input_ids=changed(ids, 1, 3, value=-1))),
        ("input_ids", lambda c, ids, mask: dict(input_ids=ids.float())),
        ("input_ids", lambda c, ids, mask: dict(input_ids=ids.numpy())),
        ("input_ids", lambda c, ids, mask: dict(input_ids=ids.tolist())),
        ("input_ids", lambda c, ids, mask: dict(input_ids=ids.numpy(), deny=[[1], [2]])),
        ("input_ids", lambda c, ids, mask: dict(input_ids=ids.numpy(), exclude_history=True)),
        ("input_ids", lambda c, ids, mask: dict(input_ids=ids[:1, :0], attention_mask=None)),
        ("top_k", lambda c, ids, mask: dict(top_k=2.5)),
        ("num_beams", lambda c, ids, mask: dict(num_beams=20.0)),
    ],
    ids=[
        "hole",
        "two starts",
        "stray end",
        "beyond",
        "negative",
        "floats",
        "numpy",
        "lists",
        "numpy and a list",
        "numpy and a history",
        "no tokens",
        "top_k",
        "num_beams",
    ],
)
def test_prompts_that_would_be_misread_are_refused(prompts, message, change):
    model, inputs = prompts
    inputs = inputs | change(model.config, inputs["input_ids"], inputs["attention_mask"])
    with pytest.raises(ValueError, match=message):
        model.recommend(**inputs, catalog=tiny_catalog())


def test_padding_on_both_sides_is_read_as_none(prompts):
    model, _ = prompts
    prompt = batch([row(model, 5, 0)])
    padded = {name: torch.nn.functional.pad(tensor, (2, 3)) for name, tensor in prompt.items()}
    padded["input_ids"][0, :2] = -100  # padding may have any id
    expected = model.recommend(**prompt, catalog=tiny_catalog())
    torch.testing.assert_close(model.recommend(**padded, catalog=tiny_catalog()).scores, expected.scores)


def test_an_output_is_used_like_those_of_transformers():
    """`items` is a field, not the method of a dictionary."""
    items, scores = torch.tensor([[2, 1]]), torch.tensor([[-0.5, -1.0]])
    output = RecommendOutput(items=items, scores=scores)
    assert output["items"] is output[0] is output.items is items
    assert output["scores"] is output[1] is scores
    assert len(output.to_tuple()) == 2
    for other in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output), RecommendOutput(**output)):
        assert torch.equal(other.items, items) and torch.equal(other.scores, scores) and other.latent_steps is None
