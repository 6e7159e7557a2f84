"""What Prometheus reads from GET /metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    GC_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The server's counters, in a registry of their own, so that several apps can live in one process."""

    def __init__(self, waiting: Callable[[], int], healthy: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(PROCESS_COLLECTOR)
        self.registry.register(GC_COLLECTOR)
        self.requests = Counter(
            "flashrt_requests",
            "Requests for actions by transport and outcome (ok, disconnected, or a refusal's code)",
            ["transport", "outcome"],
            registry=self.registry,
        )
        self.inference = self._histogram("flashrt_inference_seconds", "Time in the model")
        self.queued = self._histogram("flashrt_queue_seconds", "Wait for the model")
        self.total = self._histogram("flashrt_request_seconds", "First byte of a request to its answer")
        self.websockets = Gauge(
            "flashrt_websocket_connections", "Open openpi connections", registry=self.registry
        )
        queue = Gauge("flashrt_queue_length", "Observations that wait", registry=self.registry)
        queue.set_function(waiting)
        health = Gauge("flashrt_healthy", "1 while /health answers 200", registry=self.registry)
        health.set_function(healthy)
        self.policy = Gauge(
            "flashrt_policy_info",
            "The policy that is served",
            ["policy", "precision", "checkpoint", "version"],
            registry=self.registry,
        )

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=BUCKETS, registry=self.registry)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
