"""Compiled passes of fixed shape: equal results, and a fixed number of graphs per bucket."""

import copy

import pytest
import torch

from tests.tiny import batch, row, tiny_catalog, tiny_model


class CountingBackend:
    """A backend of `torch.compile` that runs the graph as it is and counts the graphs."""

    def __init__(self):
        self.shapes = []

    def __call__(self, graph, inputs):
        self.shapes.append([tuple(part.shape) for part in inputs if isinstance(part, torch.Tensor)])
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model, backend=None, prompt_buckets=(8, 16), batch_buckets=(1, 4), num_beams=6):
    """A copy of the model with fixed shapes."""
    model = copy.deepcopy(model)
    backend = backend or CountingBackend()
    model.compile_for_serving(prompt_buckets, batch_buckets, num_beams, mode=None, backend=backend)
    return model


def prompts(model, lengths, side="left", seed=0):
    return batch([row(model, length, 0, seed=seed + i) for i, length in enumerate(lengths)], side)


def assert_same_recommendations(model, static, request, **options):
    options = {"catalog": tiny_catalog(), "top_k": 5, "num_beams": 6, **options}
    expected, output = model.recommend(**request, **options), static.recommend(**request, **options)
    assert output.items.tolist() == expected.items.tolist()
    torch.testing.assert_close(output.scores, expected.scores, atol=1e-5, rtol=1e-5)
    assert output.latent_steps.tolist() == expected.latent_steps.tolist()


@pytest.mark.parametrize(("kind", "side"), [("qwen3", "left"), ("gpt_neox", "right")])
def test_padding_to_a_bucket_changes_no_result(kind, side):
    model, _ = tiny_model(kind)
    static = compiled(model)
    for lengths in ([5], [8], [16], [3, 7], [11, 2, 9], [4, 4, 16, 1]):
        assert_same_recommendations(model, static, prompts(model, lengths, side))


@pytest.mark.parametrize("steps", [0, 1, 3, torch.tensor([0, 4, 2])])
def test_results_are_equal_at_every_depth(steps):
    model, _ = tiny_model()
    assert_same_recommendations(model, compiled(model), prompts(model, [9, 4, 6]), latent_steps=steps)


@pytest.mark.parametrize("num_beams", [1, 2, 20])
def test_results_are_equal_at_every_width(num_beams):
    model, _ = tiny_model()
    static = compiled(model, num_beams=num_beams)
    assert_same_recommendations(model, static, prompts(model, [9, 4]), num_beams=num_beams, top_k=1)


def test_allow_and_deny_lists_work():
    model, _ = tiny_model()
    lists = {"allow": [torch.arange(9), None], "deny": [None, torch.arange(15)]}
    assert_same_recommendations(model, compiled(model), prompts(model, [9, 4]), **lists)


def test_eager_attention_gives_equal_results():
    model, _ = tiny_model()
    model.set_attn_implementation("eager")
    assert_same_recommendations(model, compiled(model), prompts(model, [9, 4]))


def test_bfloat16_gives_similar_scores():
    model, _ = tiny_model()
    model.bfloat16()
    options = {"catalog": tiny_catalog(), "top_k": 20, "num_beams": 20, "latent_steps": 2}
    request = prompts(model, [9, 4])
    expected = model.recommend(**request, **options)
    output = compiled(model, num_beams=20).recommend(**request, **options)
    scores = output.scores.gather(1, output.items.argsort(dim=1))
    torch.testing.assert_close(scores, expected.scores.gather(1, expected.items.argsort(dim=1)), atol=0.2, rtol=0.05)


def test_a_bucket_compiles_three_graphs():
    model, _ = tiny_model()
    backend = CountingBackend()
    static = compiled(model, backend)
    for steps in (0, 1, 2, 4, None):
        assert_same_recommendations(model, static, prompts(model, [12, 9, 10]), latent_steps=steps)
    assert len(backend.shapes) == 3


def test_other_requests_of_a_bucket_compile_nothing():
    model, _ = tiny_model()
    backend = CountingBackend()
    static = compiled(model, backend)
    assert_same_recommendations(model, static, prompts(model, [12, 9, 10]), latent_steps=2)
    num_graphs = len(backend.shapes)
    for lengths, width, seed in (([9, 2], 6, 5), ([16, 16, 16, 16], 3, 6), ([10, 3, 4], 4, 7)):
        assert_same_recommendations(model, static, prompts(model, lengths, seed=seed), num_beams=width, top_k=1)
    assert len(backend.shapes) == num_graphs


def test_the_number_of_buckets_bounds_the_number_of_graphs():
    """More graphs than torch.compile permits for one function."""
    model, _ = tiny_model()
    backend = CountingBackend()
    static = compiled(model, backend, prompt_buckets=(10, 14), batch_buckets=(1, 3))
    for size in (1, 2, 3):
        for length in (7, 10, 11, 14):
            assert_same_recommendations(model, static, prompts(model, [length] * size, seed=length))
    assert len(backend.shapes) <= 3 * 4
    assert len(backend.shapes) > torch._dynamo.config.recompile_limit


def test_an_earlier_request_leaves_no_trace():
    model, _ = tiny_model()
    static = compiled(model)
    weight = static.model.get_input_embeddings().weight
    saved = weight[5].detach().clone()
    with torch.no_grad():
        weight[5] = torch.nan
    request = prompts(model, [16, 15])
    request["input_ids"][:, 3] = 5
    with pytest.raises(ValueError, match="NaN"):
        static.recommend(**request, catalog=tiny_catalog(), num_beams=6, top_k=5, latent_steps=2)
    with torch.no_grad():
        weight[5] = saved
    assert_same_recommendations(model, static, prompts(model, [9, 4]))


def test_inductor_gives_equal_items():
    model, _ = tiny_model(layers=1)
    static = compiled(model, "inductor", prompt_buckets=(6,), batch_buckets=(2,))
    assert_same_recommendations(model, static, prompts(model, [6, 4]), latent_steps=2)


@pytest.mark.parametrize(
    ("lengths", "width", "message"),
    [([17], 6, "17, .* 16"), ([3] * 5, 6, "5, .* 4"), ([3], 7, "num_beams is 7, .* 6")],
)
def test_a_request_beyond_the_buckets_is_refused(lengths, width, message):
    model, _ = tiny_model()
    with pytest.raises(ValueError, match=message):
        compiled(model).recommend(**prompts(model, lengths), catalog=tiny_catalog(), num_beams=width, top_k=1)


@pytest.mark.parametrize("sizes", [{"prompt_buckets": []}, {"batch_buckets": [0, 8]}, {"num_beams": 0}])
def test_invalid_buckets_are_refused(sizes):
    model, _ = tiny_model()
    with pytest.raises(ValueError, match=next(iter(sizes))):
        model.compile_for_serving(**sizes)


def test_flex_attention_is_refused_by_name():
    model, _ = tiny_model()
    static = compiled(model)
    static.model.backbone.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention"):
        static.recommend(**prompts(model, [5]), catalog=tiny_catalog(), num_beams=6, top_k=5)
