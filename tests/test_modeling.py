"""The model beside its contract: shared prompts, plain text, refusals, new tokens, code that travels."""

import subprocess
import sys

import pytest
import torch

from lasar_hf import LasarConfig, LasarForGenerativeRec, LasarProcessor
from tests.references import SIDES, functional, gradients, mixed_rows
from tests.tiny import batch, row, sid_ids, tiny_backbone, tiny_catalog, tiny_model, tiny_tokenizer


BACKBONES = ["qwen3", "llama", "gpt_neox"]


@pytest.mark.parametrize("depth", [0, 2])
def test_states_at_padding_are_zero(depth):
    model, _ = tiny_model()
    inputs = batch([row(model, length, depth, [3, 4]) for length in (4, 7)])
    states = model.model(**inputs).last_hidden_state
    assert (states == 0).all(dim=-1).tolist() == (inputs["attention_mask"] == 0).tolist()


@pytest.mark.parametrize("kind", BACKBONES)
def test_no_latent_step_equals_backbone(kind):
    model, _ = tiny_model(kind)
    sequences = [row(model, 5, 0, [20]), row(model, 8, 0, [22], seed=1)]
    inputs = batch(sequences, "right")
    expected = model.lm_head(model.model.backbone(**inputs).last_hidden_state)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real], expected[real], atol=1e-6, rtol=1e-6)


def test_sequences_without_latent_region_are_plain_text():
    model, _ = tiny_model()
    text, reasoning = [3, 4, 5, 6, 7], row(model, 6, 2, [20, 25])
    outputs = model(**batch([text, reasoning], "right"))
    expected = model.lm_head(model.model.backbone(torch.tensor([text])).last_hidden_state)
    torch.testing.assert_close(outputs.logits[0, : len(text)], expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "repeats", "sequences_read"),
    [
        ((30, 34, 34), (3, 1, 1), 3),  # each prompt once
        ((12, 12, 11), (8, 2, 2), 6),  # eight branches everywhere would cost more than reading the first four times
        ((4, 4, 4), (1, 1, 4), 6),  # sharing saves nothing
    ],
)
def test_equal_prompts_are_run_once_and_change_nothing(lengths, repeats, sequences_read):
    model, _ = tiny_model()
    seeds = [seed for seed, count in enumerate(repeats) for _ in range(count)]
    order = torch.randperm(len(seeds), generator=torch.Generator().manual_seed(0)).tolist()
    answers = [sid_ids(model, [i % 4, i // 4, (i + 1) % 4]) for i in range(len(seeds))]
    sequences = [row(model, lengths[seeds[i]], 2, answers[i], seed=seeds[i]) for i in order]
    inputs = batch(sequences, [SIDES[i % 2] for i in order])
    real = inputs["attention_mask"].bool()
    batch_sizes = []
    hook = model.model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: batch_sizes.append(len(kwargs.get("input_ids", kwargs.get("inputs_embeds")))),
        with_kwargs=True,
    )
    results = {}
    for share in (True, False):
        model.model.share_prefixes = share
        batch_sizes.clear()
        outputs = model(**inputs)
        results[share] = outputs, gradients(model, functional(outputs.logits[real], outputs.latent_states))
        assert set(batch_sizes) == ({sequences_read} if share else {len(sequences)})
    hook.remove()
    (shared, shared_gradients), (unshared, unshared_gradients) = results[True], results[False]
    torch.testing.assert_close(shared.logits[real], unshared.logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared.latent_states, unshared.latent_states, atol=1e-5, rtol=1e-5)
    for name, expected in unshared_gradients.items():
        scale = expected.abs().max().clamp(min=1)
        torch.testing.assert_close(shared_gradients[name] / scale, expected / scale, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(torch.zeros(0, 3, dtype=torch.long)), "input_ids"),
        (lambda model: model(torch.tensor([5, 6])), "input_ids"),
        (lambda model: model(torch.tensor([[5.0, 6.0]])), "input_ids is torch.float32"),
        (lambda model: model([[5, 6]]), "input_ids is list"),
        (lambda model: model(torch.tensor([[5, 6]]), torch.ones(1, 3)), "attention_mask"),
        (
            lambda model: model.generate(**batch([row(model, 6, 2)]), cache_implementation="static", max_new_tokens=2),
            "attention_mask",
        ),
        (
            lambda model: LasarForGenerativeRec.from_backbone(tiny_backbone(), tiny_tokenizer(), max_latent_steps=0),
            "max_latent_steps",
        ),
        (
            lambda model: LasarForGenerativeRec.from_backbone(tiny_backbone(), tiny_tokenizer(), num_sid_levels=27),
            "num_sid_levels",
        ),
        (lambda model: LasarConfig(codebook_size=0), "codebook_size"),
        (lambda model: model.config.sid_token_id(3, 0), "Level 3"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_model()[0])


def test_evaluating_leaves_each_part_in_its_mode():
    model, _ = tiny_model()
    model.train()
    model.model.policy_head.eval()
    with model.evaluation_mode():
        assert not any(part.training for part in model.modules())
    assert model.training and not model.model.policy_head.training and model.model.backbone.training


def test_reentrant_checkpointing_is_refused():
    model, _ = tiny_model()
    with pytest.raises(ValueError, match="use_reentrant"):
        model.activation_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda c: [3, c.latent_start_token_id, c.latent_token_id, 4, c.latent_token_id],
            "Sequence 1: the <|latent|> slots",
        ),
        (lambda c: [3, c.latent_token_id, 4], "Sequence 1: the <|latent|> slots"),
        (lambda c: [3, c.latent_start_token_id, 4, c.latent_token_id], "Sequence 1: the <|latent|> slots"),
        (lambda c: [3, c.latent_start_token_id] + [c.latent_token_id] * 5, "Sequence 1 has 5 latent slots"),
        (lambda c: [3, 4, c.vocab_size], "Sequence 1 has token ids outside 0 … 26"),
        (lambda c: [3, -100], "Sequence 1 has token ids outside 0 … 26"),
        (lambda c: [3] * 257, "Sequence 1 has 257 tokens, but the backbone has max_position_embeddings=256"),
    ],
)
def test_bad_slots_are_refused(make, message):
    model, _ = tiny_model()
    sequences = [row(model, 4, 1, [20]), make(model.config)]
    with pytest.raises(ValueError) as error:
        model(**batch(sequences))
    assert message in str(error.value)


def test_padding_does_not_count_as_positions():
    model, _ = tiny_model()
    inputs = {name: torch.nn.functional.pad(part, (260, 0)) for name, part in batch([row(model, 6, 2)]).items()}
    expected = model(**batch([row(model, 6, 2)])).logits
    torch.testing.assert_close(model(**inputs).logits[:, 260:], expected, atol=1e-5, rtol=1e-5)


def test_from_backbone_keeps_the_weights_and_adds_special_tokens():
    backbone, tokenizer = tiny_backbone("llama"), tiny_tokenizer()
    old = backbone.get_input_embeddings().weight.detach().clone()
    model = LasarForGenerativeRec.from_backbone(backbone, tokenizer, num_sid_levels=2, codebook_size=3)
    assert torch.equal(model.get_input_embeddings().weight[: len(old)], old)
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == len(tokenizer) == 12 + 3 + 6
    assert tokenizer("<b_2>").input_ids == [model.config.sid_token_id(1, 2)]
    assert {"<a_0>", "<|latent|>"} <= set(tokenizer.all_special_tokens)
    # A title that spells a token stays text.
    assert model.config.sid_token_id(1, 2) not in tokenizer("<b_2>", split_special_tokens=True).input_ids
    again = LasarForGenerativeRec.from_backbone(tiny_backbone("llama"), tokenizer, num_sid_levels=2, codebook_size=3)
    assert again.config.sid_token_offset == model.config.sid_token_offset


REMOTE = """
import sys
sys.modules["lasar_hf"] = None  # any import of the package fails
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor
path, = sys.argv[1:]
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
inputs = torch.load(f"{path}/inputs.pt")
for auto_class in (AutoModel, AutoModelForCausalLM):
    model = auto_class.from_pretrained(path, trust_remote_code=True).eval()
    prompts = processor([["item-3", "item-4"], ["item-7"]])
    recommended = model.recommend(**prompts, catalog=processor.catalog, top_k=5, num_beams=20)
    torch.testing.assert_close(model(**inputs["batch"]).logits, inputs["logits"], atol=1e-5, rtol=1e-5)
    assert torch.equal(recommended.items, inputs["items"]), (recommended.items, inputs["items"])
    assert processor.decode_recommendations(recommended)[0][0]["item_id"] == inputs["first"]
print("same items without the package")
"""


def test_remote_code_in_a_process_without_the_package(tmp_path, monkeypatch):
    model, tokenizer = tiny_model()
    catalog = tiny_catalog()
    processor = LasarProcessor(tokenizer, catalog)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    prompts = processor([["item-3", "item-4"], ["item-7"]])
    inputs = batch(mixed_rows(model), SIDES)
    items = model.recommend(**prompts, catalog=catalog, top_k=5, num_beams=20).items
    torch.save(
        {
            "batch": inputs,
            "logits": model(**inputs).logits.detach(),
            "items": items,
            "first": catalog.item_ids[items[0, 0]],
        },
        tmp_path / "inputs.pt",
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert "same items without the package" in done.stdout, done.stderr


def test_slots_after_a_cached_prefix_are_refused():
    model, _ = tiny_model()
    prefix = model(**batch([row(model, 6, 2)]), use_cache=True)
    with pytest.raises(ValueError, match="input_ids"):
        model(torch.tensor([[model.config.latent_token_id]]), past_key_values=prefix.past_key_values)


@pytest.mark.parametrize("tied", [True, False])
def test_sid_embeddings_keep_the_geometry_of_the_codebooks(tied):
    model, _ = tiny_model(tie_word_embeddings=tied)
    codebooks = torch.randn(3, 4, 40)
    old = model.get_input_embeddings().weight.detach().clone()
    model.set_sid_embeddings(codebooks, std=0.05)
    start, count = model.config.sid_token_offset, 12
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        sequences = weight[start : start + count]
        assert sequences.std().item() == pytest.approx(0.05, rel=1e-3)
        # Twelve centres span at most twelve dimensions, so the hidden size of 16 keeps every angle.
        expected = torch.nn.functional.normalize(codebooks.flatten(0, 1), dim=-1)
        got = torch.nn.functional.normalize(sequences, dim=-1)
        torch.testing.assert_close(got @ got.T, expected @ expected.T, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.get_input_embeddings().weight[:start], old[:start])
    with pytest.raises(ValueError, match="codebooks"):
        model.set_sid_embeddings(codebooks[:2])


def test_the_loss_is_divided_by_the_labels_of_the_step():
    """The Trainer sums the losses of accumulated batches, and says how many labels all of them have."""
    model, _ = tiny_model()
    ids = torch.tensor([row(model, 5, 2, sid_ids(model, [0, 1, 2]))])
    mean, part = (model(ids, labels=ids, **kwargs).loss for kwargs in ({}, {"num_items_in_batch": torch.tensor(50)}))
    torch.testing.assert_close(part * 50, mean * (ids.shape[1] - 1))
