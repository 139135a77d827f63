"""Dynamic batching: what shares a batch, what is refused, dropped or fails, and a clean end."""

import asyncio
import threading

import pytest

from lasar_hf.serving.batcher import Batcher, QueueFullError


class Upper:
    """Turns texts to upper case, and keeps the batches. It waits for `gate` and fails at the text "bad"."""

    def __init__(self):
        self.batches, self.gate, self.started = [], threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, texts: list[str], settings) -> list[str]:
        self.started.set()
        assert self.gate.wait(10)
        self.batches.append((texts, settings))
        if "bad" in texts:
            raise ValueError("bad text")
        return [text.upper() for text in texts]


@pytest.fixture
def compute() -> Upper:
    return Upper()


async def until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition did not become true")


def test_requests_with_equal_settings_share_a_batch(compute):
    async def scenario():
        async with Batcher(compute, max_wait_ms=50) as batcher:
            return await asyncio.gather(*(batcher.submit([text], text in "ac") for text in "abcd"))

    assert asyncio.run(scenario()) == [["A"], ["B"], ["C"], ["D"]]
    assert compute.batches == [(["a", "c"], True), (["b", "d"], False)]


def test_a_full_batch_does_not_wait_and_no_batch_is_larger(compute):
    async def scenario():
        async with Batcher(compute, max_batch=2, max_wait_ms=60_000) as batcher:
            return await batcher.submit(list("abcdef"), None)

    assert asyncio.run(asyncio.wait_for(scenario(), 10)) == list("ABCDEF")
    assert [len(texts) for texts, _ in compute.batches] == [2, 2, 2]


def test_the_next_batch_collects_while_one_is_computed(compute):
    async def scenario():
        async with Batcher(compute, max_wait_ms=0) as batcher:
            compute.gate.clear()
            tasks = [asyncio.create_task(batcher.submit(["a"], None))]
            await until(compute.started.is_set)
            tasks += [asyncio.create_task(batcher.submit([text], None)) for text in "bcd"]
            await until(lambda: len(batcher) == 3)
            compute.gate.set()
            await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert [texts for texts, _ in compute.batches] == [["a"], ["b", "c", "d"]]


def test_a_full_queue_takes_all_requests_or_none(compute):
    async def scenario():
        async with Batcher(compute, max_wait_ms=50, max_queue=3) as batcher:
            first = asyncio.create_task(batcher.submit(["a", "b"], None))
            await until(lambda: len(batcher) == 2)
            with pytest.raises(QueueFullError):
                await batcher.submit(["c", "d"], None)
            return await batcher.submit(["e"], None), await first

    assert asyncio.run(scenario()) == (["E"], ["A", "B"])


def test_a_request_that_times_out_in_the_queue_is_not_computed(compute):
    async def scenario():
        async with Batcher(compute, max_wait_ms=0, timeout=0.5) as batcher:
            compute.gate.clear()
            first = asyncio.create_task(batcher.submit(["a"], None))
            await until(compute.started.is_set)
            with pytest.raises(TimeoutError):
                await batcher.submit(["b"], None)
            with pytest.raises(TimeoutError):
                await first
            assert len(batcher) == 0
            compute.gate.set()
            return await batcher.submit(["c"], None)

    assert asyncio.run(scenario()) == ["C"]
    assert [texts for texts, _ in compute.batches] == [["a"], ["c"]]


def test_only_the_request_that_fails_gets_the_error(compute):
    async def scenario():
        async with Batcher(compute, max_wait_ms=50) as batcher:
            requests = (batcher.submit([text], None) for text in ("a", "bad", "c"))
            return await asyncio.gather(*requests, return_exceptions=True)

    first, error, last = asyncio.run(scenario())
    assert (first, last) == (["A"], ["C"])
    assert str(error) == "bad text"


def test_closing_computes_what_is_queued_at_once(compute):
    async def scenario():
        async with Batcher(compute, max_wait_ms=60_000) as batcher:
            task = asyncio.create_task(batcher.submit(["a", "b"], None))
            await until(lambda: len(batcher) == 2)
        assert not batcher.is_running
        return await task

    assert asyncio.run(asyncio.wait_for(scenario(), 10)) == ["A", "B"]


@pytest.mark.parametrize("option", [{"max_batch": 0}, {"max_queue": 0}, {"max_wait_ms": -1}, {"timeout": 0}])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match="expected"):
        Batcher(lambda requests, settings: requests, **option)
