"""Dynamic batching: requests that arrive at about the same time are computed together."""

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass


class QueueFullError(Exception):
    """The queue has no place for a request."""


@dataclass(eq=False)
class _Entry:
    request: object
    settings: Hashable
    arrived: float  # seconds of the event loop's clock
    answer: asyncio.Future


class Batcher:
    """
    Collects requests in a queue and computes them in batches, one batch at a time, in one thread.

    A batch has the oldest request of the queue and the next ones with the same settings. It starts when it is full,
    or when its oldest request has waited for `max_wait_ms`. While a batch is computed, the next one collects.

    Args:
        compute (`Callable`):
            Computes a batch, `compute(requests, settings)`, and returns one answer per request. If it fails, each of
            the requests is computed alone, so that only those fail that cause it.
        max_batch (`int`, *optional*, defaults to `64`):
            Requests of a batch.
        max_wait_ms (`float`, *optional*, defaults to `5.0`):
            Time that a request waits for others, in milliseconds.
        max_queue (`int`, *optional*, defaults to `1024`):
            Requests that may wait.
        timeout (`float`, *optional*, defaults to `30.0`):
            Seconds after which a request gets no answer any more.

    Raises:
        `ValueError`: if a number is out of range.

    Example:

    ```python
    >>> async with Batcher(lambda requests, settings: [text.upper() for text in requests]) as batcher:
    ...     await batcher.submit(["a", "b"], settings=None)
    ['A', 'B']
    ```
    """

    def __init__(
        self,
        compute: Callable[[list, Hashable], list],
        max_batch: int = 64,
        max_wait_ms: float = 5.0,
        max_queue: int = 1024,
        timeout: float = 30.0,
    ):
        if max_batch < 1 or max_queue < 1 or max_wait_ms < 0 or timeout <= 0:
            raise ValueError(
                f"max_batch is {max_batch}, max_queue {max_queue}, max_wait_ms {max_wait_ms} and timeout {timeout}; "
                "expected at least 1, 1, 0 and more than 0."
            )
        self.compute, self.max_batch, self.max_wait = compute, max_batch, max_wait_ms / 1000
        self.max_queue, self.timeout = max_queue, timeout
        self._queue: deque[_Entry] = deque()
        self._is_closing = False

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def is_running(self) -> bool:
        """Whether requests are computed."""
        return not self._loop.done()

    async def __aenter__(self) -> "Batcher":
        self._changed = asyncio.Event()  # set when a request arrives, and to close
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recommend")
        self._loop = asyncio.create_task(self._compute_batches())
        return self

    async def __aexit__(self, *_) -> None:
        """Compute what is queued, then stop."""
        self._is_closing = True
        self._changed.set()
        await self._loop
        self._thread.shutdown()

    async def submit(self, requests: list, settings: Hashable) -> list:
        """
        Queue requests, and wait for their answers.

        Args:
            requests (`list`):
                Requests that belong together: all of them are queued, or none.
            settings (`Hashable`):
                Only requests with equal settings share a batch.

        Returns:
            `list`: an answer per request.

        Raises:
            [`QueueFullError`]: if the queue has no place for them.
            `TimeoutError`: if they took too long. Those that still waited are not computed.
            `Exception`: the first exception of `compute`.
        """
        if len(self._queue) + len(requests) > self.max_queue:
            raise QueueFullError
        loop = asyncio.get_running_loop()
        entries = [_Entry(request, settings, loop.time(), loop.create_future()) for request in requests]
        self._queue.extend(entries)
        self._changed.set()
        try:
            async with asyncio.timeout(self.timeout):
                return await asyncio.gather(*(entry.answer for entry in entries))
        finally:
            # Without an answer after a time-out, or because another one has failed: nobody waits for these.
            for entry in entries:
                entry.answer.cancel()
            if any(entry.answer.cancelled() for entry in entries):
                self._queue = deque(entry for entry in self._queue if not entry.answer.cancelled())

    async def _compute_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := await self._next_batch():
            requests = [entry.request for entry in batch]
            answers = await loop.run_in_executor(self._thread, self._answers, requests, batch[0].settings)
            for entry, answer in zip(batch, answers, strict=True):
                if entry.answer.done():  # cancelled meanwhile
                    continue
                if isinstance(answer, Exception):
                    entry.answer.set_exception(answer)
                else:
                    entry.answer.set_result(answer)

    async def _next_batch(self) -> list[_Entry]:
        """Wait for a batch and take it from the queue; empty to stop."""
        loop = asyncio.get_running_loop()
        while True:
            batch = []
            if self._queue:
                oldest = self._queue[0]
                batch = [entry for entry in self._queue if entry.settings == oldest.settings][: self.max_batch]
                left = oldest.arrived + self.max_wait - loop.time()
                if len(batch) == self.max_batch or left <= 0 or self._is_closing:
                    taken = set(batch)
                    self._queue = deque(entry for entry in self._queue if entry not in taken)
                    return batch
            elif self._is_closing:
                return []
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left if batch else None)

    def _answers(self, requests: list, settings: Hashable) -> list:
        """The answer of each request, or the exception that it causes."""
        try:
            answers = self.compute(requests, settings)
            if len(answers) != len(requests):
                raise RuntimeError(f"compute returned {len(answers)} answers for {len(requests)} requests.")
            return answers
        except Exception as error:
            if len(requests) == 1:
                return [error]
            return [self._answers([request], settings)[0] for request in requests]
