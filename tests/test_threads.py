"""Threads that share a model get the results of one thread, and a process that recommends for ever does not grow.

`pytest -m nightly` makes 10,000 calls of each kind.
"""

import copy
import gc
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lasar_hf import LasarProcessor, Recommender, onednn
from lasar_hf.onednn import onednn_linear
from tests.tiny import batch, ring_memory, row, tiny_catalog, tiny_model


NUM_THREADS = 8


@pytest.fixture(autouse=True)
def frequent_switches():
    """Threads take turns about every ten bytecodes instead of every 5 ms."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(function, arguments: list) -> list:
    """Results of calls from eight threads that start together."""
    start = threading.Barrier(NUM_THREADS)
    with ThreadPoolExecutor(NUM_THREADS, initializer=start.wait) as pool:
        return list(pool.map(function, arguments))


def in_another_thread(function):
    """Result or exception of a call from another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def prompts(model, lengths) -> dict:
    """One request; its depths are mixed."""
    depths = torch.tensor([length % 5 for length in lengths])
    return batch([row(model, length, 0, seed=length) for length in lengths]) | {"latent_steps": depths}


def requests(model) -> list[dict]:
    """Requests of several sizes and depths, large enough for fast products if the hidden size is 128."""
    return [prompts(model, lengths) for lengths in ([5, 9, 17, 4], [12, 23], [40], [6, 13, 20])]


def same(output, expected) -> bool:
    """Whether two outputs are equal bit for bit."""
    names = "items", "scores", "latent_steps"
    return all(torch.equal(getattr(output, name), getattr(expected, name)) for name in names)


def each_in_its_own_context(model, **request):
    with onednn_linear(model):
        return model.recommend(**request)


def count_products(monkeypatch) -> list[int]:
    """Rows of each product that oneDNN gets."""
    rows, product = [], torch.ops.mkldnn._linear_pointwise

    def counted(states, *rest):
        rows.append(states.shape[:-1].numel())
        return product(states, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return rows


def wrong_answers(model, num_calls: int, own_contexts: bool) -> int:
    """How many of the calls from eight threads, with oneDNN's products, differ from one thread's."""
    catalog = tiny_catalog()
    inputs = [request | {"catalog": catalog, "top_k": 5, "num_beams": 8} for request in requests(model)]
    with onednn_linear(model):
        expected = [model.recommend(**request) for request in inputs]
    order = random.Random(0).choices(range(len(inputs)), k=num_calls)

    def is_wrong(index: int) -> bool:
        recommend = each_in_its_own_context if own_contexts else type(model).recommend
        return not same(recommend(model, **inputs[index]), expected[index])

    if own_contexts:
        return sum(in_threads(is_wrong, order))
    with onednn_linear(model):
        return sum(in_threads(is_wrong, order))


@pytest.mark.skipif(not onednn.HAS_ONEDNN, reason="PyTorch without oneDNN, or not on x86")
@pytest.mark.parametrize(
    ("num_calls", "own_contexts"), [(64, True), (64, False), pytest.param(10_000, True, marks=pytest.mark.nightly)]
)
def test_threads_get_the_fast_products_of_one_thread(num_calls, own_contexts, monkeypatch):
    model, _ = tiny_model(hidden_size=128)
    rows = count_products(monkeypatch)
    assert wrong_answers(model, num_calls, own_contexts) == 0
    assert len(rows) > 4 * num_calls
    assert not any("forward" in vars(part) for part in model.modules())


def test_threads_share_a_recommender():
    """Prompt format, catalogue, memory, exclusion of the history and an explanation."""
    model, tokenizer = tiny_model()
    histories = [[f"item-{(3 * i + j) % 20}" for j in range(1 + i % 5)] for i in range(12)]
    catalog = tiny_catalog()
    recommender = Recommender(model, LasarProcessor(tokenizer, catalog), ring_memory(catalog))

    def answer(history):
        items = recommender.recommend([history], top_k=5, exclude_history=True)
        return items, recommender.explain(history, top_k=3)

    assert in_threads(answer, histories) == [answer(history) for history in histories]


def test_threads_wait_for_a_compiled_model():
    model, _ = tiny_model(layers=1)
    model.compile_for_serving((48,), (4,), 8, mode=None, backend=lambda graph, inputs: graph.forward)
    inputs = [request | {"catalog": tiny_catalog(), "top_k": 5, "num_beams": 8} for request in requests(model)] * 4
    outputs = in_threads(lambda request: model.recommend(**request), inputs)
    assert all(same(output, model.recommend(**request)) for output, request in zip(outputs, inputs, strict=True))
    # A copy has the same sizes, and makes tensors of its own.
    passes, copied = model.static_passes, copy.deepcopy(model).static_passes
    for name in ("prompt_buckets", "batch_buckets", "num_beams", "compile_options"):
        assert getattr(copied, name) == getattr(passes, name)
    assert passes.caches and not copied.caches


def test_a_model_in_training_mode_belongs_to_one_thread():
    model, _ = tiny_model()
    request = prompts(model, [5, 7]) | {"catalog": tiny_catalog(), "top_k": 5}
    expected = model.recommend(**request)
    model.train()
    with pytest.raises(RuntimeError, match="training mode.*model.eval()"):
        in_another_thread(lambda: model.recommend(**request))
    assert same(model.recommend(**request), expected)
    with model.evaluation_mode(), pytest.raises(RuntimeError, match="training mode"):
        in_another_thread(lambda: model.recommend(**request))
    assert all(part.training for part in model.modules())
    model.eval()
    assert same(in_another_thread(lambda: model.recommend(**request)), expected)


def test_the_first_thread_owns_a_model_that_was_made_in_training_mode():
    model = type(tiny_model()[0])(tiny_model()[0].config)
    request = prompts(model, [5, 7]) | {"catalog": tiny_catalog()}
    in_another_thread(lambda: model.recommend(**request))
    with pytest.raises(RuntimeError, match="training mode"):
        model.recommend(**request)


def test_training_that_starts_during_a_call_is_noticed():
    model, _ = tiny_model()
    request = prompts(model, [5, 7]) | {"catalog": tiny_catalog()}
    read_tokens = model.model.read_tokens

    def after_training_started(*args, **kwargs):
        in_another_thread(model.train)
        return read_tokens(*args, **kwargs)

    model.model.read_tokens = after_training_started
    with pytest.raises(RuntimeError, match="middle of this call"):
        model.recommend(**request)


def resident_bytes() -> int:
    """Memory of this process, without the files that it maps, which come and go."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].removesuffix("kB")) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's size from /proc")
@pytest.mark.parametrize("num_calls", [50, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_memory_does_not_grow(num_calls):
    model, catalog, draw = tiny_model()[0], tiny_catalog(), random.Random(0)
    for index in range(50 + num_calls):  # the first 50 calls warm up
        if index == 50:
            before = resident_bytes()
        lengths = [draw.randint(2, 30) for _ in range(draw.randint(1, 4))]
        model.recommend(**prompts(model, lengths), catalog=catalog, top_k=5, num_beams=8)
    assert resident_bytes() - before < 2**20
