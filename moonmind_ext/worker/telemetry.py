"""What a worker tells its operators: log lines, and spans where somebody collects them."""

import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import structlog
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from moonmind_ext.engine.live import joined
from pipelines.masking import Masker

FLUSH_MILLISECONDS = 5000
"""For the last spans, when the worker ends."""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

_tracer = trace.get_tracer("moonmind_ext.worker")


class LogFormat(StrEnum):
    """How log lines look."""

    TEXT = "text"
    JSON = "json"


def configure_logging(form: LogFormat, masker: Masker) -> None:
    """Send log lines to standard error, masked, with the job and trace that they speak of."""

    def mask(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        return {name: masker.mask_json(value) for name, value in event.items()}

    as_json = form is LogFormat.JSON
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            mask,
            structlog.processors.JSONRenderer()
            if as_json
            else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), sort_keys=False),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


@contextmanager
def tracing(environment: Mapping[str, str]) -> Iterator[None]:
    """Export spans while the context lasts, where OpenTelemetry's variables say to.

    The engine gets the same variables, and the trace that each query belongs to: so
    its own spans are found below the job's.
    """
    if not any(environment.get(name) for name in _ENDPOINTS):
        yield
        return
    name = environment.get("OTEL_SERVICE_NAME") or "moonmind-worker"
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.force_flush(FLUSH_MILLISECONDS)
        provider.shutdown()


@contextmanager
def job_trace(job_id: str, attempt: int) -> Iterator[str]:
    """Do a job in a trace of its own, and name both in every log line.

    Yields
    ------
    str
        The trace id, 32 hexadecimal digits.
    """
    attributes: dict[str, str | int] = {"moonmind.job.id": job_id, "moonmind.job.attempt": attempt}
    with (
        _tracer.start_as_current_span(
            "moonmind.job",
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ),
        joined() as trace_id,
        structlog.contextvars.bound_contextvars(job_id=job_id, trace_id=trace_id),
    ):
        yield trace_id


@contextmanager
def span(name: str) -> Iterator[None]:
    """Do a part of a job in a span.

    Without the text of an exception, here and above: that is masked where it is reported.
    """
    with _tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False):
        yield


def begin_span(name: str) -> trace.Span:
    """Begin a span that whoever has it ends; it does not become the current one."""
    return _tracer.start_span(name)
