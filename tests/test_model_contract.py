"""The contract of a model: every check holds for every backbone of one list, without a network."""

import copy
import json
import socket

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

from lasar_hf import LasarConfig, LasarForGenerativeRec
from tests.references import DEPTHS, SIDES, functional, gradients, mixed_rows, plain_loop
from tests.tiny import FAMILIES, batch, row, sid_ids, tiny_backbone, tiny_catalog, tiny_model, tiny_tokenizer


LATENT_INPUTS = ["raw", "normalized", "pause"]
REFUSED = {"gemma2": "Gemma2Model has sliding-window", "gemma3_text": "Gemma3TextModel has sliding-window"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No check may open a connection, although the Hub would be reachable."""

    def refuse(*args, **kwargs):
        pytest.fail("a connection was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(params=FAMILIES)
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(kind):
    return tiny_model(kind)[0]


def read(model, rows, sides=SIDES) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Logits, latent states and the policy's logits of each sequence, without padding."""
    inputs = batch(rows, sides)
    outputs = model(**inputs)
    parts = zip(outputs.logits, outputs.latent_states, outputs.depth_logits, strict=True)
    valid, depths = inputs["attention_mask"].bool(), outputs.latent_steps.tolist()
    return [(a[valid[i]], b[: 1 + depths[i]], c) for i, (a, b, c) in enumerate(parts)]


def by_the_plain_loop(model, rows) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """As [`read`], by the specification."""
    parts = [plain_loop(model, ids) for ids in rows]
    return [(logits, states, model.model.policy_head(states[0])) for logits, states in parts]


def gradients_of(model, parts) -> dict[str, torch.Tensor]:
    """Gradients of a functional of everything that [`read`] returns."""
    return gradients(model, sum(functional(a, b) + c.double().square().sum() for a, b, c in parts))


def assert_near(got, expected, tolerance: float = 1e-9) -> None:
    """Whether tensors are equal up to rounding, in units of the largest entry; also lists and dictionaries of them."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        got, expected = list(got.values()), list(expected.values())
    if isinstance(expected, torch.Tensor):
        scale = max(1, float(expected.detach().abs().max()))
        torch.testing.assert_close(got, expected, atol=tolerance * scale, rtol=0)
        return
    for one, other in zip(got, expected, strict=True):
        assert_near(one, other, tolerance)


def prompts(model, sides="left", lengths=(6, 4, 9, 5)) -> dict[str, torch.Tensor]:
    return batch([row(model, length, 0, seed=length) for length in lengths], sides)


def recommended(model, inputs, **options) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Items, scores and depth of each prompt, for any depth of the policy."""
    output = model.recommend(**inputs, catalog=tiny_catalog(), top_k=5, num_beams=8, **options)
    return list(zip(output.items, output.scores, output.latent_steps, strict=True))


def assert_same_recommendations(got, expected) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[2], other[2])
        torch.testing.assert_close(one[1], other[1], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration, weights and files


def test_a_configuration_is_read_as_it_was_written(model, tmp_path):
    config = model.config
    config.latent_input, config.exclude_history, config.min_latent_steps = "normalized", True, 0
    config.save_pretrained(tmp_path)
    for loaded in (LasarConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LasarConfig and type(loaded.backbone_config) is type(config.backbone_config)
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert loaded.sid_token_id(2, 3) == config.sid_token_offset + 11


@pytest.mark.parametrize(("shard_size", "auto_class"), [("1GB", AutoModel), ("4KB", AutoModelForCausalLM)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_the_model(kind, tied, shard_size, auto_class, tmp_path):
    model, _ = tiny_model(kind, tie_word_embeddings=tied)
    model.set_latent_input("normalized")
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shard_size == "4KB")
    loaded, rows, expected = auto_class.from_pretrained(tmp_path), mixed_rows(model), model.state_dict()
    assert type(loaded) is LasarForGenerativeRec and not loaded.training
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.state_dict().keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in loaded.state_dict().items())
    assert_near(read(loaded, rows), read(model, rows), tolerance=0)


def test_a_lost_weight_is_not_replaced(model, tmp_path):
    model.set_latent_input("normalized")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.latent_input.step.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack model.latent_input.step.weight"):
        LasarForGenerativeRec.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_more_tokens_change_no_recommendation(kind, tied, tmp_path):
    model, tokenizer = tiny_model(kind, tie_word_embeddings=tied)
    size, offset = model.config.vocab_size, model.config.sid_token_offset
    before, expected = read(model, mixed_rows(model)), recommended(model, prompts(model))
    tokenizer.add_tokens(["lamp", "desk"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    for resized in (model, LasarForGenerativeRec.from_pretrained(tmp_path)):
        assert len(resized.lm_head.weight) == resized.config.vocab_size == size + 2
        assert (resized.lm_head.weight is resized.get_input_embeddings().weight) == tied
        assert tokenizer.convert_tokens_to_ids("<a_0>") == resized.config.sid_token_offset == offset
        after = [(logits[:, :size], *others) for logits, *others in read(resized, mixed_rows(model))]
        assert_near(after, before, tolerance=1e-6)
        assert_same_recommendations(recommended(resized, prompts(model)), expected)


def test_fewer_tokens_than_semantic_ids_are_refused(model):
    size = model.config.vocab_size
    for part in (model, model.model):
        with pytest.raises(ValueError, match=f"new_num_tokens is {size - 1}, .* at least {size}"):
            part.resize_token_embeddings(size - 1)
    assert len(model.resize_token_embeddings(size).weight) == size


def new_parameters(model) -> dict[str, torch.Tensor]:
    """The weights that a backbone gets, and the rows of the tokens that it gets."""
    own = {name: p for name, p in model.named_parameters() if "policy_head" in name or "latent_input" in name}
    first = tiny_backbone().config.vocab_size
    return own | {"embeddings": model.get_input_embeddings().weight[first:], "head": model.lm_head.weight[first:]}


def assert_initialised(parameters: dict[str, torch.Tensor]) -> None:
    """Finite, and random rows, but for biases of zero and the scale of the norm."""
    assert len(parameters) == 4 + 3 + 2
    for name, value in parameters.items():
        assert value.isfinite().all(), name
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" not in name:
            assert value.std() > 0.01 and len(value.unique(dim=0)) == len(value), name


def test_new_parameters_follow_the_seed(kind):
    made = []
    for seed in (0, 0, 1):
        model, _ = tiny_model(kind, seed=seed)
        model.set_latent_input("normalized")
        made.append({name: value.detach().clone() for name, value in model.named_parameters()})
        assert_initialised(new_parameters(model))
    assert all(made[0][name].equal(made[1][name]) for name in made[0])
    assert not made[0]["model.policy_head.dense.weight"].equal(made[2]["model.policy_head.dense.weight"])


def test_parameters_without_memory_are_initialised(model):
    """As transformers loads: the model is made on the meta device, and gets its memory later."""
    config = copy.deepcopy(model.config)
    config.latent_input = "normalized"
    with torch.device("meta"):
        empty = LasarForGenerativeRec(config)
    empty.to_empty(device="cpu")
    tensors = dict(empty.named_parameters()) | dict(empty.named_buffers())
    for value in tensors.values():
        if value.is_floating_point():
            value.data.fill_(torch.nan)
    empty.init_weights()
    assert all(value.isfinite().all() for value in tensors.values())
    assert_initialised(new_parameters(empty))
    assert all(part[0].isfinite().all() for part in read(empty.eval(), mixed_rows(empty)))


@pytest.mark.parametrize("family", REFUSED)
def test_gemmas_with_windows_are_refused(family):
    with torch.device("meta"), pytest.raises(ValueError, match=REFUSED[family]):
        LasarForGenerativeRec(LasarConfig(backbone_config=CONFIG_MAPPING[family](num_hidden_layers=2)))


# ---------------------------------------------------------------------------------------------------------------------
# The forward and the backward pass


@pytest.mark.parametrize("latent_input", LATENT_INPUTS)
def test_a_batch_equals_the_plain_loop(model, latent_input):
    model.set_latent_input(latent_input)
    model.double()
    rows = mixed_rows(model)
    got, expected = read(model, rows), by_the_plain_loop(model, rows)
    assert_near(got, expected)
    assert [len(states) - 1 for _, states, _ in got] == DEPTHS
    # Norms compute in float32 even here.
    assert_near(gradients_of(model, got), gradients_of(model, expected), tolerance=1e-5)


def test_nothing_follows_the_last_latent_state(model):
    outputs = model(**batch(mixed_rows(model), SIDES))
    for states, depth in zip(outputs.latent_states, DEPTHS, strict=True):
        assert states[: depth + 1].any(dim=1).all() and not states[depth + 1 :].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_changes_nothing_and_can_be_continued(model, side):
    """Positions follow the mask: padding takes none."""
    model.double()
    answers = [sid_ids(model, codes) for codes in ((1, 2, 3), (0, 1, 2), (3, 0, 0))]
    heads = [row(model, length, depth, [], seed=depth) for length, depth in ((5, 0), (9, 3), (4, 4))]
    expected = by_the_plain_loop(model, [head + answer for head, answer in zip(heads, answers, strict=True)])
    first = batch(heads, side)
    outputs = model(**first, use_cache=True)
    assert_near(outputs.logits, model(**first, use_cache=False).logits)
    mask = torch.cat([first["attention_mask"], torch.ones(3, 3, dtype=torch.long)], dim=1)
    logits = model(torch.tensor(answers), mask, past_key_values=outputs.past_key_values).logits
    assert_near(list(logits), [logits[-3:] for logits, _, _ in expected])


def test_padding_changes_nothing(model):
    model.double()
    rows = mixed_rows(model)
    expected = read(model, rows, "left")
    assert_near(read(model, rows, "right"), expected)
    assert_near(read(model, rows), expected)
    longer = [*rows, row(model, 30, 2, [15])]  # pads the others
    assert_near(read(model, longer, "left")[:-1], expected)
    expected = recommended(model, prompts(model))
    assert_same_recommendations(recommended(model, prompts(model, "right")), expected)
    assert_same_recommendations(recommended(model, prompts(model, ["left", "right"] * 2)), expected)


def test_the_rest_of_the_batch_changes_nothing(model):
    model.double()
    rows, order = mixed_rows(model), [3, 0, 4, 2, 1]
    expected = read(model, rows)
    assert_near(read(model, [rows[i] for i in order]), [expected[i] for i in order])
    assert_near([read(model, [ids], "left")[0] for ids in rows], expected)
    longer = [row(model, 30, 2, sid_ids(model, (i, 3 - i)), seed=9) for i in range(4)]  # one prompt, read once
    together = read(model, [*longer, *rows], "left")
    assert_near(together, [*(read(model, [ids], "left")[0] for ids in longer), *expected])
    inputs, order = prompts(model) | {"latent_steps": torch.tensor([2, 0, 4, 1])}, [2, 0, 3, 1]
    expected = recommended(model, inputs)
    permuted = {name: value[order] for name, value in inputs.items()}
    assert_same_recommendations(recommended(model, permuted), [expected[i] for i in order])
    alone = [recommended(model, {name: value[i : i + 1] for name, value in inputs.items()})[0] for i in range(4)]
    assert_same_recommendations(alone, expected)


def test_two_passes_are_equal_bit_for_bit(model):
    rows = mixed_rows(model)
    first, second = read(model, rows), read(model, rows)
    assert_near(first, second, tolerance=0)
    assert_near(gradients_of(model, first), gradients_of(model, second), tolerance=0)
    once, twice = recommended(model, prompts(model)), recommended(model, prompts(model))
    assert all(one.equal(other) for pair in zip(once, twice, strict=True) for one, other in zip(*pair, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_nothing(kind, dropout):
    model = tiny_model(kind, attention_dropout=dropout)[0].train()
    rows, results = mixed_rows(model), []
    for enable in (model.activation_checkpointing_disable, model.activation_checkpointing_enable):
        enable()
        torch.manual_seed(0)
        parts = read(model, rows)
        results.append((parts, gradients_of(model, parts)))
    assert_near(results[1][0], results[0][0], tolerance=0)
    assert_near(results[1][1], results[0][1], tolerance=1e-6)
    assert bool(dropout) == (not torch.equal(read(model, rows)[1][0], results[0][0][1][0]))


def test_eager_attention_equals_sdpa(model):
    rows, results = mixed_rows(model), []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        parts = read(model, rows)
        results.append((parts, gradients_of(model, parts), recommended(model, prompts(model))))
    assert_near(results[0][:2], results[1][:2], tolerance=1e-5)
    assert_same_recommendations(results[0][2], results[1][2])


def distance(got, expected) -> float:
    """Norm of the difference over the norm."""
    got, expected = (torch.cat([part.detach().float().flatten() for part in parts]) for parts in (got, expected))
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize(("attention", "checkpointing"), [("sdpa", False), ("eager", True)])
@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_bfloat16_is_close_to_float32(kind, mode, attention, checkpointing):
    """As close as eight bits of mantissa allow. Worst of all cases over three seeds: 0.035, 0.051 and 0.9966."""
    model = tiny_model(kind, hidden_size=32)[0].train()
    model.set_attn_implementation(attention)
    rows = mixed_rows(model)
    expected = read(model, rows)
    expected_gradients = gradients_of(model, expected)
    if checkpointing:
        model.activation_checkpointing_enable()
    if mode == "weights":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        got = read(model, rows)
    got_gradients = gradients_of(model, got)
    assert all(value.isfinite().all() for parts in (*got, got_gradients.values()) for value in parts)
    for index, limit in ((0, 0.06), (1, 0.09)):
        assert 0 < distance([part[index] for part in got], [part[index] for part in expected]) < limit
    flat = [torch.cat([g[name].float().flatten() for name in sorted(g)]) for g in (got_gradients, expected_gradients)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.99


# ---------------------------------------------------------------------------------------------------------------------
# generate


def generated(model, **options) -> torch.Tensor:
    """What `generate` writes after prompts of several depths, under a seed."""
    torch.manual_seed(0)
    inputs = batch([row(model, 6, 2), row(model, 4, 4, seed=1), row(model, 8, 0, [], seed=2)])
    return model.generate(**inputs, max_new_tokens=4, **options)


@pytest.mark.parametrize(
    "mode", [{}, {"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "num_beams": 2}], ids=str
)
def test_generate_needs_no_cache(model, mode):
    cached = generated(model, **mode)
    assert torch.equal(cached, generated(model, **mode, use_cache=False))
    assert torch.equal(cached, generated(model, **mode))
    assert not mode.get("do_sample") or not torch.equal(cached, generated(model))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"cache_implementation": "static"}, "attention_mask"), ({"cache_implementation": "paged"}, "paged"),
        ({"prefill_chunk_size": 3}, "after a cached prefix"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ],
)  # fmt: skip
def test_modes_that_generate_does_not_have_are_refused(model, option, message):
    with pytest.raises(ValueError, match=message):
        generated(model, **option)


# ---------------------------------------------------------------------------------------------------------------------
# The network


def test_a_backbone_of_a_folder_needs_no_network(kind, tmp_path):
    tiny_backbone(kind).save_pretrained(tmp_path / "backbone")
    tokenizer = tiny_tokenizer()
    model = LasarForGenerativeRec.from_backbone(str(tmp_path / "backbone"), tokenizer, 3, 4).eval()
    model.catalog = tiny_catalog()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = LasarForGenerativeRec.from_pretrained(tmp_path / "model")
    assert loaded.catalog.item_ids == model.catalog.item_ids
    assert_same_recommendations(recommended(loaded, prompts(model)), recommended(model, prompts(model)))
    assert str(tmp_path) not in json.dumps(model.config.to_dict())


def test_a_connection_would_be_noticed():
    with pytest.raises(pytest.fail.Exception, match="a connection was opened"):
        AutoConfig.from_pretrained("lasar-hf/no-such-model")
