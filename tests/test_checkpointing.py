"""Gradient checkpointing is exact, and the backward pass keeps no copy of the prompt for each latent step."""

import gc
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from lasar_hf.model import base_lasar, cache_lasar
from tests.references import SIDES, functional, gradients, mixed_rows
from tests.tiny import batch, row, tiny_model


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still alive, and optionally their peak."""

    def __init__(self, with_peak: bool = False):
        super().__init__()
        self.made, self.with_peak, self.peak = {}, with_peak, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self.with_peak:
            self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        return sum(size for _, size in self.made.values())


def measure(model, prompt_length, depth, with_peak=False):
    """Bytes kept for the backward pass by four sequences, and the most bytes alive at once."""
    inputs = batch([row(model, prompt_length, depth, [15, 19, 23], seed=i) for i in range(4)])
    with LiveBytes(with_peak) as live:
        outputs = model(**inputs)
        loss = functional(outputs.logits[:, -4:], outputs.latent_states)
        del outputs
        kept = live.now()
        if with_peak:
            loss.backward()
    model.zero_grad()
    return kept, live.peak


def relative_error(got, expected):
    """Norm of the difference of all gradients over their norm."""
    difference = sum((got[name] - expected[name]).pow(2).sum() for name in expected)
    return (difference / sum(value.pow(2).sum() for value in expected.values())).sqrt().item()


def loss_and_gradients(model, inputs):
    outputs = model(**inputs)
    loss = functional(outputs.logits[inputs["attention_mask"].bool()], outputs.latent_states)
    return loss.item(), gradients(model, loss)


@pytest.fixture
def trained():
    """A model in training mode, a batch of mixed depths, and its loss and gradients without checkpointing."""
    model = tiny_model()[0].train()
    inputs = batch(mixed_rows(model), SIDES)
    return model, inputs, *loss_and_gradients(model, inputs)


def naive_loop(model, ids):
    """The obvious latent loop, for one sequence, on an ordinary cache."""
    base, config, cache = model.model, model.config, DynamicCache()
    first = ids.index(config.latent_token_id)
    answer = ids.index(config.latent_end_token_id)
    hidden = base.backbone(torch.tensor([ids[:first]]), past_key_values=cache, use_cache=True).last_hidden_state
    states = [hidden[:, -1:]]
    for position in range(first, answer):
        positions = torch.tensor([[position]])
        step = base.backbone(inputs_embeds=states[-1], position_ids=positions, past_key_values=cache, use_cache=True)
        states.append(step.last_hidden_state)
    positions = torch.arange(answer, len(ids))[None]
    read = base.backbone(torch.tensor([ids[answer:]]), position_ids=positions, past_key_values=cache, use_cache=True)
    hidden = torch.cat([hidden, *states[1:], read.last_hidden_state], dim=1)
    return functional(model.lm_head(hidden)[0], torch.cat(states, dim=1)[0])


def test_the_naive_loop_is_wrong_under_checkpointing():
    """The reason for our loop: transformers drops an ordinary cache under checkpointing, with only a warning."""
    model = tiny_model()[0].train()
    ids = row(model, 8, 3, [15, 19, 23])
    loss, expected = loss_and_gradients(model, batch([ids]))
    naive = naive_loop(model, ids)
    assert naive.item() == pytest.approx(loss, rel=1e-5)
    assert relative_error(gradients(model, naive), expected) < 1e-5
    model.activation_checkpointing_enable()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer._can_checkpoint_with_cache = False
    naive = naive_loop(model, ids)
    assert naive.item() != pytest.approx(loss, rel=1e-3)
    assert relative_error(gradients(model, naive), expected) > 0.3


def test_a_dropped_or_ordinary_cache_is_an_error(trained, monkeypatch):
    """Never silently wrong: the explicit masks no longer fit."""
    model, inputs, _, _ = trained

    class OrdinaryCache(DynamicCache):
        keeping_blocks = nullcontext

        def __new__(cls, num_layers, parent=None):
            return super().__new__(cls) if parent is None else parent

        def __init__(self, num_layers, parent=None):
            if parent is None:
                super().__init__()

    model.activation_checkpointing_enable()
    with monkeypatch.context() as patch:
        patch.setattr(base_lasar, "LinkedCache", OrdinaryCache)
        with pytest.raises(RuntimeError):
            loss_and_gradients(model, inputs)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer._can_checkpoint_with_cache = False
    with pytest.raises(RuntimeError):
        loss_and_gradients(model, inputs)


@contextmanager
def keeping_joined(monkeypatch):
    """The latent loop as it would be without `keeping_blocks`."""
    with monkeypatch.context() as patch:
        patch.setattr(cache_lasar.LinkedCache, "keeping_blocks", nullcontext)
        yield


@pytest.mark.parametrize("depth", [0, 4])
def test_checkpointing_lowers_the_memory(depth):
    model = tiny_model()[0].train()
    kept, peak = measure(model, 48, depth, with_peak=True)
    model.activation_checkpointing_enable()
    kept_replaying, peak_replaying = measure(model, 48, depth, with_peak=True)
    assert kept_replaying < 0.3 * kept
    assert peak_replaying < 0.65 * peak  # one of the two layers is replayed at a time


def bytes_of_a_step(model, prompt_length):
    """What the third and fourth latent step add to the bytes kept for the backward pass, per step."""
    return (measure(model, prompt_length, 4)[0] - measure(model, prompt_length, 2)[0]) / 2


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_latent_step_keeps_no_copy_of_the_prompt(kind, autocast, monkeypatch):
    model, rows, prompts = tiny_model(kind)[0].train(), 4, (64, 192)
    config = model.config.backbone_config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    copy = 2 * width * config.num_hidden_layers * rows * (2 if autocast else 4)  # keys and values of a prompt token

    def growth():
        short, long = (bytes_of_a_step(model, length) for length in prompts)
        return (long - short) / (prompts[1] - prompts[0])

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mask = 4 * rows  # additive, float32
        assert growth() <= 1.5 * mask
        with keeping_joined(monkeypatch):
            assert growth() >= copy


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt_neox"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_joining_again_changes_nothing(kind, attention, monkeypatch):
    model = tiny_model(kind)[0].train()
    model.set_attn_implementation(attention)
    inputs = batch(mixed_rows(model), SIDES)
    loss, got = loss_and_gradients(model, inputs)
    with keeping_joined(monkeypatch):
        expected_loss, expected = loss_and_gradients(model, inputs)
    assert loss == expected_loss and got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def test_memory_is_freed_with_the_graph():
    model = tiny_model()[0].train()
    inputs = batch([row(model, 32, 3, [15, 19, 23], seed=i) for i in range(3)])
    model(**inputs)  # transformers caches some tensors in the first call
    with LiveBytes() as live:
        outputs = model(**inputs)
        assert live.now() > 100_000
        del outputs
        gc.collect()
        assert live.now() < 30_000  # the hooks must not hold the graph that holds them


def test_no_hooks_are_set_without_gradients(monkeypatch):
    model = tiny_model()[0].train()
    inputs = batch([row(model, 8, 2, [15])])
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", lambda pack, unpack: pytest.fail("hooks"))
    with torch.no_grad():
        model(**inputs)
    with pytest.raises(pytest.fail.Exception):
        model(**inputs)
