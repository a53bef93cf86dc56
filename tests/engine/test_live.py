"""The receiver of live output, as an engine sends to it: OTLP over real HTTP."""

import asyncio
import gzip
import tracemalloc
from collections import defaultdict
from collections.abc import AsyncIterator

import anyio
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import propagate, trace
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs, ScopeLogs

from moonmind_ext.engine import live as module
from moonmind_ext.engine.live import LiveLogs, receive_live_logs, traced

TRACE = "0af7651916cd43dd8448eb211c80319c"
OTHER = "4bf92f3577b34da6a3ce929d0e0e4736"
PROTOBUF = {"content-type": "application/x-protobuf"}


def record(
    text: str, trace_id: str = TRACE, stream: int | None = 1, **attributes: AnyValue
) -> LogRecord:
    if stream is not None:
        attributes["stdio.stream"] = AnyValue(int_value=stream)
    return LogRecord(
        body=AnyValue(string_value=text),
        trace_id=bytes.fromhex(trace_id),
        attributes=[KeyValue(key=key, value=value) for key, value in attributes.items()],
    )


def eof(trace_id: str = TRACE) -> LogRecord:
    """The end of a command's output, as the engine says it."""
    return record("", trace_id, **{"stdio.eof": AnyValue(bool_value=True)})


def body_of(*records: LogRecord) -> bytes:
    logs = ResourceLogs(scope_logs=[ScopeLogs(log_records=records)])
    request: bytes = ExportLogsServiceRequest(resource_logs=[logs]).SerializeToString()
    return request


async def send(
    live: LiveLogs, body: "bytes | AsyncIterator[bytes]", **headers: str
) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        return await client.post(live.endpoint, content=body, headers={**PROTOBUF, **named})


async def still_works(live: LiveLogs) -> bool:
    got: list[str] = []
    with live.follow(OTHER, got.append):
        await send(live, body_of(record("still here", OTHER)))
    return got == ["still here"]


async def test_output_goes_to_the_follower_of_its_trace_and_to_nobody_else() -> None:
    ours: list[str] = []
    theirs: list[str] = []
    async with receive_live_logs() as live:
        with live.follow(TRACE, ours.append), live.follow(OTHER, theirs.append):
            stranger = "f" * 32
            response = await send(
                live,
                body_of(record("1"), record("2", OTHER), record("3"), record("4", stranger)),
            )

    assert ours == ["1", "3"]
    assert theirs == ["2"]
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-protobuf"
    assert ExportLogsServiceResponse.FromString(response.content) == ExportLogsServiceResponse()


async def test_records_of_several_resources_and_scopes_are_all_output() -> None:
    got: list[str] = []
    request = ExportLogsServiceRequest(
        resource_logs=[
            ResourceLogs(
                scope_logs=[ScopeLogs(log_records=[record(f"{resource}{scope}")]) for scope in "xy"]
            )
            for resource in "ab"
        ]
    )
    async with receive_live_logs() as live:
        with live.follow(TRACE, got.append):
            await send(live, request.SerializeToString())

    assert got == ["ax", "ay", "bx", "by"]


@settings(max_examples=25, deadline=None)
@given(
    batches=st.lists(
        st.lists(
            st.tuples(
                st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from([TRACE, OTHER])
            ),
            max_size=8,
        ),
        max_size=5,
    ),
    zipped=st.booleans(),
)
def test_every_text_arrives_unchanged_in_its_order(
    batches: list[list[tuple[str, str]]], zipped: bool
) -> None:
    got: dict[str, list[str]] = defaultdict(list)

    async def case() -> None:
        async with receive_live_logs() as live:
            with live.follow(TRACE, got[TRACE].append), live.follow(OTHER, got[OTHER].append):
                for batch in batches:
                    body = body_of(*(record(text, trace_id) for text, trace_id in batch))
                    if zipped:
                        await send(live, gzip.compress(body), content_encoding="gzip")
                    else:
                        await send(live, body)

    anyio.run(case)
    for trace_id in (TRACE, OTHER):
        # Without the empty ones, which tell of an end.
        sent = [text for batch in batches for text, where in batch if where == trace_id and text]
        assert got[trace_id] == sent


async def test_compressed_bodies_are_read() -> None:
    got: list[str] = []
    async with receive_live_logs() as live:
        with live.follow(TRACE, got.append):
            body = gzip.compress(body_of(record("zipped")))
            response = await send(live, body, content_encoding="gzip")

    assert (got, response.status_code) == (["zipped"], 200)


async def test_only_standard_output_is_output() -> None:
    got: list[str] = []
    verbose = {"dagger.io/logs.verbose": AnyValue(bool_value=True)}
    async with receive_live_logs() as live:
        with live.follow(TRACE, got.append):
            await send(
                live,
                body_of(
                    record("the shell's own", stream=2),
                    record("an answer of the API", **verbose),
                    record("the engine's log", stream=None),
                    record("output"),
                ),
            )

    assert got == ["output"]


async def test_the_end_of_a_commands_output_is_no_text() -> None:
    got: list[str] = []
    async with receive_live_logs() as live:
        with live.follow(TRACE, got.append):
            await send(live, body_of(record("last words"), eof(), eof(OTHER)))

    assert got == ["last words"]


async def test_after_it_was_left_a_trace_is_nobodys() -> None:
    got: list[str] = []
    async with receive_live_logs() as live:
        with pytest.raises(LookupError), live.follow(TRACE, got.append):
            raise LookupError
        response = await send(live, body_of(record("late")))
        with live.follow(TRACE, got.append):
            await send(live, body_of(record("again")))

    assert response.status_code == 200, "late records are nobody's mistake"
    assert got == ["again"]


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (b"this is no protobuf", None),
        (b"\xff" * 1000, None),
        (b"this is not zipped", "gzip"),
        (gzip.compress(b"this is no protobuf"), "gzip"),
        (gzip.compress(body_of(record("cut off")))[:-12], "gzip"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xff\xff\xff\xff", "gzip"),
        (body_of(record("cut off"))[:-1], None),
    ],
    # Not by the bodies, which hold times.
    ids=["text", "bytes", "not-zipped", "zipped-text", "zipped-cut", "broken-zip", "cut"],
)
async def test_rubbish_is_refused_and_does_no_harm(body: bytes, encoding: str | None) -> None:
    got: list[str] = []
    async with receive_live_logs() as live:
        with live.follow(TRACE, got.append):
            headers = {"content_encoding": encoding} if encoding else {}
            response = await send(live, body, **headers)

        assert response.status_code == 400
        assert got == []
        assert await still_works(live)


@settings(max_examples=30, deadline=None)
@given(bodies=st.lists(st.binary(max_size=300), max_size=5), encoding=st.sampled_from(["", "gzip"]))
def test_no_rubbish_stops_it(bodies: list[bytes], encoding: str) -> None:
    async def case() -> None:
        async with receive_live_logs() as live:
            for body in bodies:
                response = await send(live, body, content_encoding=encoding or "identity")
                assert response.status_code in {200, 400}
            assert await still_works(live)

    anyio.run(case)


async def test_a_body_that_never_ends_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BODY_BYTES", 1 << 20)
    got: list[str] = []

    async def flood() -> AsyncIterator[bytes]:
        yield body_of(record("at the beginning"))
        chunk = bytes(1 << 16)
        for _ in range(1024):
            yield chunk

    async with receive_live_logs() as live:
        with live.follow(TRACE, got.append):
            tracemalloc.start()
            try:
                response = await send(live, flood())
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()

        assert peak < 16 << 20, "64 MB were sent"
        assert response.status_code < 500
        assert got == []
        assert await still_works(live)


async def test_a_body_that_is_large_only_when_unzipped_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_BODY_BYTES", 1 << 20)
    # A valid message: 64 MB of text in 64 kB.
    bomb = gzip.compress(body_of(record("x" * (64 << 20))))
    assert len(bomb) < 1 << 20
    got: list[str] = []
    async with receive_live_logs() as live:
        with live.follow(TRACE, got.append):
            tracemalloc.start()
            try:
                await send(live, bomb, content_encoding="gzip")
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()

        assert peak < 16 << 20
        assert got == []
        assert await still_works(live)


@pytest.mark.parametrize("zipped", [False, True])
async def test_a_body_of_just_the_limit_is_read(
    monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    body = body_of(record("x" * 100_000))
    monkeypatch.setattr(module, "MAX_BODY_BYTES", len(body))
    got: list[str] = []
    async with receive_live_logs() as live:
        with live.follow(TRACE, got.append):
            if zipped:
                await send(live, gzip.compress(body), content_encoding="gzip")
            else:
                await send(live, body)

    assert got == ["x" * 100_000]


async def test_a_sender_that_dies_half_way_is_not_taken_for_one_that_is_done() -> None:
    got: list[str] = []
    async with receive_live_logs() as live:
        with live.follow(TRACE, got.append):
            # Cut between two messages, what has arrived is valid; it will be sent again.
            body = body_of(record("once"))
            port = httpx.URL(live.endpoint).port
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                b"POST /v1/logs HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
                % (2 * len(body), body)
            )
            await writer.drain()
            await anyio.sleep(0.2)
            writer.close()
            await writer.wait_closed()
            await anyio.sleep(0.2)
            await send(live, body + body)

        assert got == ["once", "once"]
        assert await still_works(live)


async def test_many_senders_at_once_do_not_mix() -> None:
    got: dict[str, list[str]] = {f"{number:032x}": [] for number in range(1, 21)}
    async with receive_live_logs() as live:

        async def one(trace_id: str) -> None:
            with live.follow(trace_id, got[trace_id].append):
                for part in range(10):
                    await send(live, body_of(record(f"{trace_id}-{part}", trace_id)))

        async with anyio.create_task_group() as tasks:
            for trace_id in got:
                tasks.start_soon(one, trace_id)

    for trace_id, texts in got.items():
        assert texts == [f"{trace_id}-{part}" for part in range(10)]


async def test_it_listens_on_the_loopback_interface_and_ends_with_its_context() -> None:
    async with receive_live_logs() as live:
        assert live.endpoint.startswith("http://127.0.0.1:")
        assert live.endpoint.endswith("/v1/logs")
        assert await still_works(live)

    with pytest.raises(httpx.ConnectError):
        await send(live, b"")


async def test_two_receivers_are_separate() -> None:
    first: list[str] = []
    second: list[str] = []
    async with receive_live_logs() as one, receive_live_logs() as two:
        assert one.endpoint != two.endpoint
        with one.follow(TRACE, first.append), two.follow(TRACE, second.append):
            await send(two, body_of(record("for the second")))

    assert (first, second) == ([], ["for the second"])


async def test_an_error_of_the_body_stays_itself() -> None:
    reason = LookupError("the body's own")
    with pytest.raises(LookupError) as caught:
        async with receive_live_logs():
            raise reason

    assert caught.value is reason


async def test_a_sender_that_stays_connected_does_not_hold_the_end_up() -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        async with receive_live_logs() as live:
            await client.post(live.endpoint, content=body_of(record("x")))
            began = anyio.current_time()
        assert anyio.current_time() - began < 8


# --- traced ---


def sent_trace_id() -> str | None:
    """The trace id that a query sent now would carry."""
    headers: dict[str, str] = {}
    propagate.inject(headers)
    parent = headers.get("traceparent")
    return parent.split("-")[1] if parent else None


def test_a_trace_is_fresh_and_is_what_queries_are_sent_with() -> None:
    seen = set()
    for _ in range(50):
        with traced() as trace_id:
            assert len(trace_id) == 32
            assert int(trace_id, 16)
            assert trace_id == trace_id.lower()
            assert sent_trace_id() == trace_id
            seen.add(trace_id)

    assert len(seen) == 50


def test_it_is_sampled_or_the_engine_would_send_nothing() -> None:
    headers: dict[str, str] = {}
    with traced():
        propagate.inject(headers)

    version, _, span_id, flags = headers["traceparent"].split("-")
    assert (version, flags) == ("00", "01")
    assert int(span_id, 16)


def test_traces_nest_and_the_outer_one_comes_back() -> None:
    before = trace.get_current_span()
    with traced() as outer:
        with pytest.raises(LookupError), traced() as inner:
            assert sent_trace_id() == inner != outer
            raise LookupError
        assert sent_trace_id() == outer

    assert trace.get_current_span() is before
    assert sent_trace_id() is None


async def test_tasks_at_once_each_have_their_own() -> None:
    async def one(everybody: anyio.Event) -> None:
        with traced() as trace_id:
            mine.append(trace_id)
            await everybody.wait()
            seen.append((trace_id, sent_trace_id()))

    mine: list[str] = []
    seen: list[tuple[str, str | None]] = []
    everybody = anyio.Event()
    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(one, everybody)
        while len(mine) < 10:
            await anyio.sleep(0)
        everybody.set()

    assert sorted(seen) == sorted((trace_id, trace_id) for trace_id in mine)
    assert len(set(mine)) == 10


async def test_tasks_that_are_started_under_a_trace_send_it_too() -> None:
    async def one(into: list[str | None]) -> None:
        await anyio.sleep(0)
        into.append(sent_trace_id())

    seen: list[str | None] = []
    with traced() as trace_id:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one, seen)
            tasks.start_soon(one, seen)

    assert seen == [trace_id, trace_id]
