"""Live logs: what commands print goes to an OTLP receiver while they run.

The view for watching, not the log: whatever the receiver does, no command fails
and none waits.
"""

import codecs
import threading
import time
from collections import deque
from contextvars import ContextVar

import anyio
import httpx
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs, ScopeLogs

MAX_WAITING_BYTES = 8 << 20
"""Of text that the receiver has not taken yet. Beyond it text is dropped."""

BATCH_BYTES = 256 << 10
"""Of text in one request; one more record may come on top, of a pipe's size at most."""

BATCH_SECONDS = 0.05
"""Between two requests: half of what people notice as a delay."""

POST_SECONDS = 2
"""For the receiver to answer; it is on this host."""

TRACE: ContextVar[tuple[bytes, bytes]] = ContextVar("TRACE", default=(b"", b""))
"""Trace and span of the query that is being answered."""


def parse_traceparent(header: str) -> tuple[bytes, bytes]:
    """Read a W3C `traceparent`; empty where it is none."""
    parts = header.split("-")
    try:
        trace, span = bytes.fromhex(parts[1]), bytes.fromhex(parts[2])
    except (IndexError, ValueError):
        return b"", b""
    return (trace, span) if (len(trace), len(span)) == (16, 8) else (b"", b"")


class LiveLogs:
    """A bounded queue of log records, and who empties it."""

    def __init__(self, endpoint: str | None) -> None:
        self.endpoint = endpoint
        self._records: deque[LogRecord] = deque()
        self._bytes = 0
        self._counting = threading.Lock()

    def stream(self) -> "LogStream":
        """Begin the records of one command, under the query that asks for it."""
        return LogStream(self, *TRACE.get())

    def put(self, record: LogRecord) -> None:
        """Take a record, or drop it; may be called in any thread."""
        size = len(record.body.string_value)
        with self._counting:
            if self._bytes + size > MAX_WAITING_BYTES:
                return
            self._bytes += size
        self._records.append(record)

    async def post(self) -> None:
        """Send what is there, again and again, until cancelled; then what is left."""
        if self.endpoint is None:
            return
        async with httpx.AsyncClient(timeout=POST_SECONDS, trust_env=False) as client:
            try:
                while True:
                    await anyio.sleep(BATCH_SECONDS)
                    await self._flush(client)
            finally:
                with anyio.move_on_after(POST_SECONDS, shield=True):
                    await self._flush(client)

    async def _flush(self, client: httpx.AsyncClient) -> None:
        while self._records:
            batch: list[LogRecord] = []
            size = 0
            while self._records and size < BATCH_BYTES:
                record = self._records.popleft()
                batch.append(record)
                size += len(record.body.string_value)
            scope = ScopeLogs(log_records=batch)
            body = ExportLogsServiceRequest(resource_logs=[ResourceLogs(scope_logs=[scope])])
            assert self.endpoint is not None
            try:
                await client.post(
                    self.endpoint,
                    content=body.SerializeToString(),
                    headers={"Content-Type": "application/x-protobuf"},
                )
            except httpx.HTTPError:
                pass  # Dropped: the next batch may arrive.
            finally:
                with self._counting:
                    self._bytes -= size


class LogStream:
    """What one command prints, as records."""

    def __init__(self, logs: LiveLogs, trace_id: bytes, span_id: bytes) -> None:
        self._logs = logs
        self._ids = (trace_id, span_id)
        self._decoders = {
            stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in (1, 2)
        }

    def write(self, stream: int, data: bytes, *, last: bool = False) -> None:
        """Pass a piece on; a character split over two pieces stays whole."""
        if self._logs.endpoint is None:
            return
        if text := self._decoders[stream].decode(data, final=last):
            self._put(text, _attribute("stdio.stream", stream))

    def finish(self) -> None:
        """Say that nothing comes any more."""
        for stream in self._decoders:
            self.write(stream, b"", last=True)
        self._put("", KeyValue(key="stdio.eof", value=AnyValue(bool_value=True)))

    def _put(self, text: str, attribute: KeyValue) -> None:
        trace_id, span_id = self._ids
        self._logs.put(
            LogRecord(
                time_unix_nano=time.time_ns(),
                body=AnyValue(string_value=text),
                attributes=[attribute],
                trace_id=trace_id,
                span_id=span_id,
            )
        )


def _attribute(key: str, value: int) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(int_value=value))
