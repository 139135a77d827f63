"""Products on oneDNN: equal to PyTorch's own, used inside the context only."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lasar_hf import LasarForGenerativeRec, onednn
from lasar_hf.onednn import Int8Linear, int8_linear, linear, onednn_linear
from tests.tiny import batch, row, tiny_catalog, tiny_model


needs_onednn = pytest.mark.skipif(not onednn.HAS_ONEDNN, reason="PyTorch without oneDNN, or not on x86")
needs_int8 = pytest.mark.skipif(
    not (onednn.HAS_ONEDNN and torch.cpu._is_vnni_supported()), reason="CPU without AVX512-VNNI"
)


@pytest.fixture
def products(monkeypatch) -> list[torch.Size]:
    """oneDNN for small products too; the shapes of the weights it got."""
    shapes = []
    product = torch.ops.mkldnn._linear_pointwise

    def counted(states, weight, *rest):
        shapes.append(tuple(weight.shape))
        return product(states, weight, *rest)

    monkeypatch.setattr(onednn, "MIN_PRODUCT", 0)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return shapes


@needs_onednn
@pytest.mark.parametrize("rows", [(1,), (3, 1), (2, 50), (0, 4)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_are_those_of_pytorch(products, rows, with_bias):
    torch.manual_seed(0)
    states, weight = torch.randn(*rows, 24), torch.randn(40, 24)
    bias = torch.randn(40) if with_bias else None
    with torch.no_grad():
        got = linear(states, weight, bias)
    torch.testing.assert_close(got, nn.functional.linear(states, weight, bias), atol=1e-5, rtol=1e-5)
    assert len(products) == 1


@needs_onednn
def test_gradients_autocast_and_other_types_take_the_ordinary_way(products):
    layer = nn.Linear(8, 8)
    assert linear(torch.randn(2, 8), layer.weight, layer.bias).requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(2, 8), layer.weight, layer.bias).dtype == torch.bfloat16
    with torch.no_grad():
        linear(torch.randn(2, 8).double(), layer.weight.double(), layer.bias.double())
        linear(torch.randn(2, 8), torch.randn(8, 8).t())
        linear(torch.randn(2, 8), torch.randn(8, 8), torch.randn(1))
    assert products == []


@needs_onednn
def test_every_layer_is_as_before_afterwards():
    class Half(nn.Linear):
        """A layer of another kind."""

    model = nn.ModuleDict({"plain": nn.Linear(2, 2), "replaced": nn.Linear(2, 2), "other": Half(2, 2)})
    replacement = model["replaced"].forward = lambda states: states
    with pytest.raises(RuntimeError, match="stop"), onednn_linear(model):
        assert "forward" in vars(model["plain"]) and "forward" not in vars(model["other"])
        assert model["replaced"].forward is replacement
        with onednn_linear(model):  # as another thread may
            pass
        assert "forward" in vars(model["plain"])
        raise RuntimeError("stop")
    assert "forward" not in vars(model["plain"]) and model["replaced"].forward is replacement


@needs_onednn
def test_only_inference_in_the_context_uses_onednn(products):
    model, _ = tiny_model()
    inputs, catalog = batch([row(model, 5, 0), row(model, 9, 0, seed=1)]), tiny_catalog()
    expected = model.recommend(**inputs, catalog=catalog, latent_steps=torch.tensor([1, 3]))
    assert products == []
    with onednn_linear(model):
        got = model.recommend(**inputs, catalog=catalog, latent_steps=torch.tensor([1, 3]))
    layers = [part for part in model.model.backbone.modules() if isinstance(part, nn.Linear)]
    assert {tuple(layer.weight.shape) for layer in layers} <= set(products)
    assert torch.equal(got.items, expected.items)
    torch.testing.assert_close(got.scores, expected.scores, atol=2e-5, rtol=0)
    products.clear()
    with onednn_linear(model):
        model.train()(**inputs).logits.sum().backward()
    assert products == []


class Tagged(torch.Tensor):
    """A tensor of another class, as quantised and distributed ones are."""


@needs_onednn
def test_other_kinds_of_tensors_take_the_ordinary_way(products):
    with torch.no_grad():
        linear(torch.randn(2, 8), torch.randn(8, 8).as_subclass(Tagged))
        linear(torch.randn(2, 8).as_subclass(Tagged), torch.randn(8, 8))
    assert products == []


@needs_onednn
def test_a_compiled_layer_compiles_as_before(products):
    layer, seen = nn.Linear(8, 8), []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    states = torch.randn(2, 8)
    with torch.no_grad(), onednn_linear(layer):
        compiled = torch.compile(lambda rows: layer(rows), backend=backend)
        torch.testing.assert_close(compiled(states), nn.functional.linear(states, layer.weight, layer.bias))
    assert seen == [nn.functional.linear] and products == []


@needs_onednn
def test_few_sizes_reach_onednn(products, monkeypatch):
    """oneDNN caches a kernel per number of rows, so rows are padded to few numbers and the result is cut."""
    sizes, weight = set(), torch.randn(8, 8)
    product = torch.ops.mkldnn._linear_pointwise

    def counted(states, *rest):
        sizes.add(states.numel() // 8)
        return product(states, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    with torch.no_grad():
        for rows in range(1, 513):
            states = torch.randn(rows, 8)
            torch.testing.assert_close(linear(states, weight), states @ weight.t())
        assert linear(torch.randn(3, 37, 8), weight).shape == (3, 37, 8)
    assert len(sizes) <= 16 + 5 * 8 and max(sizes) == 512


@needs_onednn
def test_a_copy_made_meanwhile_multiplies_by_its_own_weights():
    model = nn.Sequential(nn.Linear(4, 4))
    with onednn_linear(model), torch.no_grad():
        copied, stored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in (copied, stored):
            other[0].weight.zero_()
            other[0].bias.zero_()
            assert not other(torch.ones(1, 4)).any()
    assert model(torch.ones(1, 4)).any()


@needs_int8
@pytest.mark.parametrize("rows", [(1,), (3, 1), (2, 50), (0, 4)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_int8_outputs_are_near_those_of_float32(rows, with_bias):
    torch.manual_seed(0)
    layer, states = nn.Linear(64, 40, bias=with_bias), torch.randn(*rows, 64)
    with torch.no_grad():
        expected, got = layer(states), Int8Linear(layer)(states)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert (got - expected).norm() <= 0.02 * expected.norm()


@needs_int8
def test_an_int8_output_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    layer, states = Int8Linear(nn.Linear(64, 40)), torch.randn(21, 64)
    states[3] *= 1000
    with torch.no_grad():
        together, alone = layer(states), torch.cat([layer(state[None]) for state in states])
    assert torch.equal(together, alone)


@needs_int8
def test_zeros_and_nan_pass_an_int8_layer():
    layer = Int8Linear(nn.Linear(64, 40))
    states = torch.zeros(2, 64)
    states[1, 5] = torch.nan
    with torch.no_grad():
        output = layer(states)
    assert torch.equal(output[0], layer.bias)
    assert output[1].isnan().all()


@needs_int8
@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_recommends_items_with_near_scores(tmp_path, kind, dtype):
    tiny_model(kind)[0].save_pretrained(tmp_path)
    model, catalog = LasarForGenerativeRec.from_pretrained(tmp_path, dtype=dtype).eval(), tiny_catalog()
    inputs = batch([row(model, 5, 0), row(model, 9, 0, seed=1)])
    expected = model.recommend(**inputs, catalog=catalog, top_k=20, latent_steps=2)
    int8_linear(model)
    assert not any(type(part) is nn.Linear for part in model.model.backbone.modules())
    assert model.lm_head.weight.dtype == model.dtype == dtype
    got = model.recommend(**inputs, catalog=catalog, top_k=20, latent_steps=2)
    # All 20 items, so that the scores can be compared item by item.
    assert torch.equal(got.items.sort().values, torch.arange(20).expand(2, -1))
    scores = [output.scores.gather(1, output.items.argsort()) for output in (got, expected)]
    torch.testing.assert_close(*scores, atol=0.2, rtol=0)


@needs_int8
def test_training_with_int8_is_refused():
    model, _ = tiny_model()
    int8_linear(model)
    with pytest.raises(ValueError, match="int8"):
        model.train()(**batch([row(model, 5, 1)]))


@needs_int8
def test_saving_with_int8_is_refused(tmp_path):
    model, _ = tiny_model()
    int8_linear(model)
    with pytest.raises(ValueError, match="int8"):
        model.save_pretrained(tmp_path)


@needs_int8
def test_a_backbone_without_linear_layers_is_refused():
    model, _ = tiny_model()
    int8_linear(model)
    with pytest.raises(ValueError, match="linear"):
        int8_linear(model)


def test_a_cpu_without_vnni_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match="VNNI"):
        int8_linear(tiny_model()[0])
