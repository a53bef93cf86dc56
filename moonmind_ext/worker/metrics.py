"""What a worker counts, for Prometheus."""

from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from time import monotonic
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_asgi_app

_PHASE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
"""Seconds: from a warm empty task to the longest that is common."""

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class Metrics:
    """The figures of one worker, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._jobs = Counter(
            "moonmind_worker_jobs", "Jobs that ended here.", ["outcome"], registry=registry
        )
        self._running = Gauge("moonmind_worker_jobs_running", "Jobs under way.", registry=registry)
        self._phases = Histogram(
            "moonmind_worker_phase_seconds",
            "How long the parts of a job took.",
            ["phase"],
            buckets=_PHASE_BUCKETS,
            registry=registry,
        )
        self._sessions = Counter(
            "moonmind_worker_engine_sessions",
            "Sessions opened with an engine; `reason` is first, replaced or renewed.",
            ["reason"],
            registry=registry,
        )
        self._log_bytes = Counter(
            "moonmind_worker_log_bytes", "Bytes that commands printed.", registry=registry
        )
        self._queue_errors = Counter(
            "moonmind_worker_queue_errors",
            "Calls that the queue did not answer, or refused.",
            ["call"],
            registry=registry,
        )

    def job_ended(self, outcome: str) -> None:
        """Count a job by its outcome."""
        self._jobs.labels(outcome).inc()

    @contextmanager
    def job_running(self) -> Iterator[None]:
        """Count a job as under way."""
        with self._running.track_inprogress():
            yield

    def phase(self, name: str, seconds: float) -> None:
        """Note how long a part of a job took."""
        self._phases.labels(name).observe(seconds)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note how long the context takes."""
        began = monotonic()
        try:
            yield
        finally:
            self.phase(name, monotonic() - began)

    def session_opened(self, reason: str) -> None:
        """Count a session with an engine."""
        self._sessions.labels(reason).inc()

    def log_bytes(self, count: int) -> None:
        """Count what a command printed."""
        self._log_bytes.inc(count)

    def queue_error(self, call: str) -> None:
        """Count a call to the queue that failed."""
        self._queue_errors.labels(call).inc()


def metrics_app(metrics: Metrics, is_healthy: Callable[[], bool]) -> object:
    """Make the ASGI application that answers `/metrics` and `/healthz`.

    Parameters
    ----------
    is_healthy
        Whether the worker can take or is running jobs: 200, or else 503.
    """
    figures = make_asgi_app(metrics.registry)

    async def app(scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["path"] == "/metrics":
            await figures(scope, receive, send)
            return
        status = 404
        if scope["path"] == "/healthz":
            status = 200 if is_healthy() else 503
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return app
