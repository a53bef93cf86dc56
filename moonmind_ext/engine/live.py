"""What commands print, while they run.

The engine sends its logs as OpenTelemetry records to whoever asks for them; each
carries the trace id that the query was sent with. So one receiver serves all the
tasks of a session and tells their output apart.
"""

import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from google.protobuf.message import DecodeError
from opentelemetry import context, trace
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from moonmind_ext.asgi import serve

MAX_BODY_BYTES = 64 << 20
"""Of one request. The engine's batches stay far below; what is larger is not ours."""

STDOUT = 1

_Message = MutableMapping[str, Any]


class LiveLogs:
    """Receives log records and hands each task its own."""

    def __init__(self) -> None:
        self._sinks: dict[str, Callable[[str], None]] = {}
        self.endpoint = ""

    @contextmanager
    def follow(self, trace_id: str, sink: Callable[[str], None]) -> Iterator[None]:
        """Give `sink` the standard output of all that is queried under a trace.

        Parameters
        ----------
        trace_id
            32 hexadecimal digits, as `traced` gives.
        sink
            Takes a piece of text; called in the event loop, so it must be quick.
        """
        self._sinks[trace_id] = sink
        try:
            yield
        finally:
            del self._sinks[trace_id]

    async def __call__(
        self,
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        """Serve as an ASGI application."""
        body = await _read_body(receive)
        status = 200
        try:
            headers = dict(scope["headers"])
            if headers.get(b"content-encoding") == b"gzip":
                body = _unzip(body)
            self._dispatch(ExportLogsServiceRequest.FromString(body))
        except (DecodeError, EOFError, zlib.error):
            status = 400
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", b"application/x-protobuf")],
            }
        )
        answer = ExportLogsServiceResponse().SerializeToString()
        await send({"type": "http.response.body", "body": answer})

    def _dispatch(self, request: ExportLogsServiceRequest) -> None:
        for resource in request.resource_logs:
            for scope in resource.scope_logs:
                for record in scope.log_records:
                    sink = self._sinks.get(record.trace_id.hex())
                    if sink is not None and record.body.string_value and _is_output(record):
                        sink(record.body.string_value)


def _is_output(record: LogRecord) -> bool:
    """Whether a record is what a command printed on its standard output.

    The supervisor merges the command's streams into that one; on the other its shell
    may speak of itself. And what the API answers to queries is logged too, as
    verbose: measured on engine 0.21.8.
    """
    attributes = {attribute.key: attribute.value for attribute in record.attributes}
    if "stdio.stream" not in attributes or "dagger.io/logs.verbose" in attributes:
        return False
    return bool(attributes["stdio.stream"].int_value == STDOUT)


async def _read_body(receive: Callable[[], Awaitable[_Message]]) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            # What has arrived may look complete; it will be sent again.
            return b""
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            chunks.append(chunk)
        if not message.get("more_body"):
            return b"".join(chunks) if size <= MAX_BODY_BYTES else b""


def _unzip(body: bytes) -> bytes:
    """Unzip a body; one that is too large then is as good as empty."""
    unzip = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    plain = unzip.decompress(body, MAX_BODY_BYTES + 1)
    if len(plain) > MAX_BODY_BYTES:
        return b""
    if not unzip.eof:
        raise EOFError
    return plain


@asynccontextmanager
async def receive_live_logs() -> AsyncIterator[LiveLogs]:
    """Receive log records on a free port of the loopback interface."""
    live = LiveLogs()
    async with serve(live) as port:
        live.endpoint = f"http://127.0.0.1:{port}/v1/logs"
        yield live


@contextmanager
def traced() -> Iterator[str]:
    """Send all queries of this context under a fresh trace.

    Yields
    ------
    str
        The trace id, 32 hexadecimal digits.
    """
    ids = RandomIdGenerator()
    span_context = trace.SpanContext(
        trace_id=ids.generate_trace_id(),
        span_id=ids.generate_span_id(),
        is_remote=False,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
    )
    token = context.attach(trace.set_span_in_context(trace.NonRecordingSpan(span_context)))
    try:
        yield trace.format_trace_id(span_context.trace_id)
    finally:
        context.detach(token)


@contextmanager
def joined() -> Iterator[str]:
    """Stay in the trace that is under way, or begin one.

    Yields
    ------
    str
        The trace id, 32 hexadecimal digits.
    """
    current = trace.get_current_span().get_span_context()
    if current.is_valid:
        yield trace.format_trace_id(current.trace_id)
    else:
        with traced() as trace_id:
            yield trace_id
