"""What a latent slot reads: the state before it, a normalised state, or a pause token."""

import pytest
import torch

from lasar_hf import LasarConfig
from lasar_hf.trainers import lasar_lora_config
from lasar_hf.trainers.catalog_head import add_catalog_head
from tests.references import functional, gradients
from tests.tiny import batch, row, sid_ids, tiny_catalog, tiny_model


def model_with(latent_input: str):
    model, _ = tiny_model("llama")
    model.set_latent_input(latent_input)
    return model


def test_pause_tokens_are_ordinary_tokens():
    model = model_with("pause")
    ids = torch.tensor([row(model, 5, 3, [model.config.sid_token_id(0, 1)])])
    expected = model.model.backbone(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.model(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_normalized_inputs_are_on_the_scale_of_the_embeddings(kind):
    model, _ = tiny_model(kind)  # Gemma scales its embeddings
    model.set_latent_input("normalized")
    states = torch.randn(50, 16) * 40
    inputs = model.model.latent_input(states, torch.randn(50, 16), torch.arange(50) % 4)
    scale = model.get_input_embeddings()(torch.arange(model.config.vocab_size)).square().mean().sqrt()
    assert 0.9 < inputs.square().mean().sqrt() / scale < 1.1


def test_recommending_equals_scoring_in_training():
    model, catalog = model_with("normalized"), tiny_catalog()
    prompts = batch([row(model, length, 0, seed=length) for length in (4, 7)])
    output = model.recommend(**prompts, catalog=catalog, num_beams=20, latent_steps=torch.tensor([3, 1]))
    codes = catalog.codes[output.items[:, 0]]  # (2, M)
    rows = [
        row(model, length, depth, sid_ids(model, item), length)
        for length, depth, item in zip((4, 7), (3, 1), codes, strict=True)
    ]
    add_catalog_head(model, catalog)
    inputs = batch(rows)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    scores = model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(dim=1)
    torch.testing.assert_close(output.scores[:, 0], scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depths", [[0, 0], [0, 2]])
def test_every_weight_gets_a_gradient(depths):
    model = model_with("normalized").train()
    outputs = model(**batch([row(model, 4 + depth, depth, seed=depth) for depth in depths]))
    found = gradients(model, functional(outputs.logits, outputs.latent_states) + outputs.depth_logits.sum())
    assert {"model.latent_input.norm.weight", "model.latent_input.step.weight"} <= set(found)


def test_the_input_can_be_set_back():
    model = model_with("normalized")
    model.set_latent_input("raw")
    assert not any("latent_input" in name for name in model.state_dict())


def test_lora_trains_the_new_weights():
    model = model_with("normalized")
    assert "latent_input" in lasar_lora_config(model).modules_to_save


@pytest.mark.parametrize("make", [lambda: LasarConfig(latent_input="cooked"), lambda: model_with("cooked")])
def test_unknown_inputs_are_refused(make):
    with pytest.raises(ValueError, match="latent_input is 'cooked'"):
        make()
