"""What the server counts, in Prometheus' text format."""

from collections.abc import Callable
from time import perf_counter

from fastapi import Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
USERS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """
    Counters of one server.

    Args:
        queue_length (`Callable`):
            Returns the number of users that wait.
    """

    def __init__(self, queue_length: Callable[[], int]):
        self.registry = CollectorRegistry()
        self.requests = Counter("lasar_requests", "Answers by status.", ("path", "status"), registry=self.registry)
        self.seconds = Histogram(
            "lasar_request_seconds", "Time to answer.", ("path",), buckets=SECONDS, registry=self.registry
        )
        self.batch_size = Histogram("lasar_batch_size", "Users per batch.", buckets=USERS, registry=self.registry)
        queue = Gauge("lasar_queue_length", "Users that wait.", registry=self.registry)
        queue.set_function(queue_length)

    async def measure(self, request: Request, call_next) -> Response:
        """Middleware that counts and times an answer."""
        start, status = perf_counter(), 500
        try:
            response = await call_next(request)
            status = response.status_code
            return response
        finally:
            route = request.scope.get("route")
            path = "other" if route is None else route.path  # any other path would be a label of its own
            self.requests.labels(path, status).inc()
            self.seconds.labels(path).observe(perf_counter() - start)

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self.registry)
