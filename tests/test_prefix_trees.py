"""Prompts that are prefixes of one another are read once, and nothing else changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar_hf.model.decoding_lasar import beam_search
from tests.references import functional, gradients, plain_loop
from tests.tiny import WORDS, batch, sid_ids, tiny_catalog, tiny_model


def user_rows(model, history: list[int], cuts: list[int], depths: list[int], answers: list[list[int]]):
    """One sequence per sample of a user: the first tokens of the history, the latent region, an answer."""
    config = model.config
    return [
        [*history[:cut], config.latent_start_token_id, *[config.latent_token_id] * depth, config.latent_end_token_id,
         *sid_ids(model, answer)]
        for cut, depth, answer in zip(cuts, depths, answers, strict=True)
    ]  # fmt: skip


@st.composite
def forests(draw):
    """Users with nested histories, some samples twice, in any order."""
    users = draw(st.integers(1, 3))
    samples = []
    for _ in range(users):
        length = draw(st.integers(0, 9))
        history = draw(st.lists(st.integers(3, 5), min_size=length, max_size=length))
        for _ in range(draw(st.integers(1, 5))):
            answer = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
            samples.append((history, draw(st.integers(0, length)), draw(st.integers(0, 4)), answer))
    sides = draw(st.lists(st.sampled_from(["left", "right"]), min_size=len(samples), max_size=len(samples)))
    return draw(st.permutations(samples)), sides


def tokens_read(model) -> list[int]:
    """Number of tokens of every call of the backbone from now on."""
    counts = []
    model.model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(
            (kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"][..., 0]).numel()
        ),
        with_kwargs=True,
    )
    return counts


def nested_batch(model, seed: int = 0):
    """Two users of 30 tokens with four samples each, and an unrelated sequence; depths differ."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(2):
        history = torch.randint(3, len(WORDS), (30,), generator=generator).tolist()
        rows += user_rows(model, history, [21, 24, 27, 30], [2, 0, 3, 1], [[0, 1, 2], [3, 3, 0], [1, 0, 0], [2, 1, 1]])
    other = torch.randint(3, len(WORDS), (25,), generator=generator).tolist()
    rows += user_rows(model, other, [25], [2], [[1, 1, 1]])
    order = torch.randperm(len(rows), generator=generator).tolist()
    return [rows[i] for i in order]


@settings(max_examples=40, deadline=None)
@given(forest=forests(), kind=st.sampled_from(["qwen3", "llama", "gpt_neox"]))
def test_random_trees_equal_the_plain_loop(forest, kind):
    samples, sides = forest
    model, _ = tiny_model(kind)
    model = model.double()
    rows = [user_rows(model, history, [cut], [depth], [answer])[0] for history, cut, depth, answer in samples]
    inputs = batch(rows, sides)
    outputs = model(**inputs)
    for i, ids in enumerate(rows):
        logits, states = plain_loop(model, ids)
        torch.testing.assert_close(outputs.logits[i][inputs["attention_mask"][i].bool()], logits, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(outputs.latent_states[i, : len(states)], states, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
def test_gradients_equal_unshared_sequences(kind, checkpointing):
    model, _ = tiny_model(kind)
    model.double().train()  # in float32 the rounding of sums in another order depends on the CPU
    rows = nested_batch(model)
    inputs = batch(rows, ["left", "right"] * 4 + ["left"])
    real = inputs["attention_mask"].bool()
    if checkpointing:
        model.gradient_checkpointing_enable()
    read = tokens_read(model)
    results, totals = {}, {}
    for share in (True, False):
        model.model.share_prefixes = share
        read.clear()
        outputs = model(**inputs)
        totals[share] = sum(read)
        results[share] = gradients(model, functional(outputs.logits[real], outputs.latent_states))
    assert totals[True] < 0.6 * totals[False]
    for name, expected in results[False].items():
        scale = expected.abs().max().clamp(min=1)
        torch.testing.assert_close(results[True][name] / scale, expected / scale, atol=1e-6, rtol=1e-6)


def test_one_chain_serves_all_depths_of_a_prompt():
    model, _ = tiny_model()
    model.double().train()
    rows = user_rows(model, [3, 4, 5, 6], [4] * 5, [4, 0, 2, 3, 1], [[0, 1, 2], [3, 3, 0], [1, 0, 0], [2, 1, 1], [0]])
    inputs = batch(rows)
    real = inputs["attention_mask"].bool()
    read = tokens_read(model)
    outputs = model(**inputs)
    # The prompt, three slots alone, and the last slot with five answers of at most 4 tokens.
    assert read == [5, 1, 1, 1, 1 + 5 * 4]
    shared = gradients(model, functional(outputs.logits[real], outputs.latent_states))
    for i, ids in enumerate(rows):
        logits, states = plain_loop(model, ids)
        torch.testing.assert_close(outputs.logits[i][real[i]], logits, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(outputs.latent_states[i, : len(states)], states, atol=1e-9, rtol=1e-9)
        assert not outputs.latent_states[i, len(states) :].any()
    model.model.share_prefixes = False
    outputs = model(**inputs)
    for name, expected in gradients(model, functional(outputs.logits[real], outputs.latent_states)).items():
        scale = expected.abs().max().clamp(min=1)
        torch.testing.assert_close(shared[name] / scale, expected / scale, atol=1e-6, rtol=1e-6)


def test_histories_that_contradict_do_not_share():
    model, _ = tiny_model()
    rows = [user_rows(model, history, [4], [1], [[0, 1, 2]])[0] for history in ([3, 4, 5, 6], [3, 4, 6, 6])]
    read = tokens_read(model)
    model(**batch(rows))
    assert read[0] == 2 * 5


def test_cache_of_a_tree_continues_each_sequence():
    model, _ = tiny_model()
    model.double()
    rows = nested_batch(model)
    depth_two = [row for row in rows if row.count(model.config.latent_token_id) == 2]
    inputs = batch([row[:-1] for row in depth_two], "left")
    full = [plain_loop(model, row)[0][-1] for row in depth_two]
    outputs = model(**inputs, use_cache=True)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    last = torch.tensor([row[-1:] for row in depth_two])
    logits = model(last, mask, past_key_values=outputs.past_key_values).logits[:, -1]
    torch.testing.assert_close(logits, torch.stack(full), atol=1e-9, rtol=1e-9)


def test_drawing_from_a_tree_equals_drawing_from_each_prompt():
    model, _ = tiny_model(num_sid_levels=3)
    model.double()
    trie = tiny_catalog().trie("cpu")
    rows = [ids[: ids.index(model.config.latent_start_token_id) + 1] for ids in nested_batch(model)]
    rows.append(rows[0])  # an equal prompt of another user
    inputs = batch(rows)
    depths = torch.tensor([1, 0, 3, 2, 1, 4, 2, 0, 1, 3])
    read = tokens_read(model)
    with model.evaluation_mode():
        expected_leaves, expected = beam_search(model, model.encode_prompts(**inputs, latent_steps=depths), trie, 5)
        alone = sum(read)
        read.clear()
        state, trees = model.encode_prompt_trees(**inputs, latent_steps=depths)
        leaves, scores = beam_search(model, state, trie, 5)
    assert sum(read) < alone
    assert torch.equal(state.depths[trees.path], depths)
    assert torch.equal(leaves[trees.path], expected_leaves)
    torch.testing.assert_close(scores[trees.path], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_shares_too(autocast):
    model, _ = tiny_model()
    if not autocast:
        model.bfloat16()
    inputs = batch(nested_batch(model))
    real = inputs["attention_mask"].bool()
    logits = {}
    for share in (True, False):
        model.model.share_prefixes = share
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits[share] = model(**inputs).logits[real].float()
    error = (logits[True] - logits[False]).norm() / logits[False].norm()
    assert error < 0.02


def test_equal_prompts_of_a_tree_have_their_own_depths():
    model, _ = tiny_model()
    rows = [ids[: ids.index(model.config.latent_start_token_id) + 1] for ids in nested_batch(model)]
    depths = torch.tensor([1] * len(rows) + [3] * len(rows))
    with model.evaluation_mode():
        state, trees = model.encode_prompt_trees(**batch(rows * 2), latent_steps=depths)
    assert torch.equal(state.depths[trees.path], depths)
