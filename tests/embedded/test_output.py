"""What a command prints: masked, redirected, live."""

import re
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import dagger
import pytest
from dagger import ReturnType
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import context, trace
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from moonmind_ext import asgi
from moonmind_ext.embedded.output import Masker
from tests.embedded.support import Connect, host, shell


@given(st.lists(st.text("abc", max_size=4), max_size=3), st.lists(st.text("abc", max_size=5)))
def test_no_value_gets_through_however_the_output_is_cut(
    values: list[str], chunks: list[str]
) -> None:
    masker = Masker(values)
    masked = b"".join(
        [*(masker.feed(chunk.encode()) for chunk in chunks), masker.finish()]
    ).decode()
    for value in filter(None, values):
        assert value not in masked.split("***")
    longest_first = sorted(filter(None, values), key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    whole = "".join(chunks)
    assert masked == (re.sub(pattern, "***", whole) if pattern else whole)


def test_what_cannot_become_a_value_is_not_held_back() -> None:
    masker = Masker(["secret"])
    assert masker.feed(b"a line\nsec") == b"a line\n"
    assert masker.feed(b"ond\n") == b"second\n"


async def test_secrets_are_masked_in_everything_that_is_printed(connect: Connect) -> None:
    async with connect() as dag:
        container = (
            host(dag)
            .with_secret_variable("A", dag.set_secret("a", "first-value"))
            .with_mounted_secret("/run/b", dag.set_secret("b", "second-value"))
            .with_mounted_directory("/out", dag.directory())
        )
        script = (
            "printf 'x first-'; sleep 0.2; echo value y; cat /run/b; cat /run/b >&2; "
            "printf %s $A >/out/own; stat -c %a /run/b"
        )
        ran = shell(container, script, redirect_stderr="/out/err")
        assert await ran.stdout() == "x *** y\n***400\n"
        assert await ran.stderr() == "***"
        assert await ran.file("/out/err").contents() == "***"
        assert await ran.file("/out/own").contents() == "first-value"
        with pytest.raises(dagger.ExecError) as raised:
            await shell(container, "echo $A; echo $A >&2; exit 1").sync()
    assert (raised.value.stdout, raised.value.stderr) == ("***", "***")


async def test_a_secret_is_on_no_command_line_and_on_no_disk(
    connect: Connect, tmp_path: Path
) -> None:
    async with connect() as dag:
        container = (
            host(dag)
            .with_secret_variable("A", dag.set_secret("a", "value-of-a-variable"))
            .with_mounted_secret("/run/b", dag.set_secret("b", "value-of-a-mount"))
        )
        await shell(
            container, "cat /proc/1/cmdline | tr '\\0' '\\n' | grep -c value-of; true"
        ).sync()
        ran = shell(container, "tr '\\0' ' ' </proc/1/cmdline")
        assert "***" not in await ran.stdout()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(shell(container, "sleep 1").sync)
            await anyio.sleep(0.4)
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                assert b"value-of-a" not in read_bytes(path)
            for path in (tmp_path / "state").rglob("*"):
                assert not path.is_file() or b"value-of-a" not in read_bytes(path)


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


async def test_secrets_come_from_names_environment_and_files(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "from-env")
    (tmp_path / "secret").write_text("from-file")
    async with connect() as dag:
        assert await dag.set_secret("n", "v").plaintext() == "v"
        assert await dag.set_secret("n", "v").name() == "n"
        assert "v" not in await dag.set_secret("n", "vvvvvv").id()
        assert await dag.secret("env://A_SECRET").plaintext() == "from-env"
        assert await dag.secret(f"file://{tmp_path}/secret").plaintext() == "from-file"
        with pytest.raises(dagger.QueryError, match="secret env var not found"):
            await dag.secret("env://NO_SUCH_SECRET").plaintext()
        with pytest.raises(
            dagger.QueryError, match="the embedded engine has no secrets from op://"
        ):
            await dag.secret("op://vault").plaintext()


async def test_redirected_output_is_byte_exact_in_a_private_file(connect: Connect) -> None:
    async with connect() as dag:
        container = host(dag).with_mounted_directory("/out", dag.directory())
        script = r"printf 'a\377b'; echo err >&2"
        ran = shell(container, script, redirect_stdout="/out/log", redirect_stderr="/out/err")
        assert await ran.directory("/out").entries() == ["err", "log"]
        assert await ran.file("/out/log").size() == 3
        assert (
            await shell(ran, "stat -c %a /out/log; od -An -tx1 /out/log").stdout()
            == "600\n 61 ff 62\n"
        )
        assert await ran.stdout() == "a\ufffdb"
        assert await ran.file("/out/err").contents() == "err\n"


async def test_output_can_be_redirected_into_the_root(connect: Connect) -> None:
    async with connect() as dag:
        ran = shell(host(dag).with_workdir("/srv"), "echo hi", redirect_stdout="log")
        assert await ran.file("/srv/log").contents() == "hi\n"
        assert await shell(ran, "cat log").stdout() == "hi\n"


async def test_a_redirection_to_nowhere_is_an_error_before_anything_runs(connect: Connect) -> None:
    async with connect() as dag:
        with pytest.raises(dagger.ExecError, match="no such file or directory") as raised:
            await shell(host(dag), "true", redirect_stdout="/no/where/log").sync()
    assert raised.value.exit_code == -1


async def test_a_command_cannot_lead_redirected_output_out_of_its_mount(
    connect: Connect, tmp_path: Path
) -> None:
    (tmp_path / "victim").mkdir()
    async with connect() as dag:
        container = host(dag).with_mounted_directory(
            "/out", dag.directory().with_new_directory("d", permissions=0o755)
        )
        script = f"rmdir /out/d; ln -s {tmp_path}/victim /out/d; echo hi"
        await shell(container, script, redirect_stdout="/out/d/log").sync()
    assert not list((tmp_path / "victim").iterdir())


async def test_a_gigabyte_of_output_stays_out_of_memory(connect: Connect) -> None:
    async with connect() as dag:
        await shell(host(dag), "true").sync()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        container = host(dag).with_mounted_directory("/out", dag.directory())
        ran = shell(
            container, "head -c 1000000000 /dev/zero | tr '\\0' x", redirect_stdout="/out/log"
        )
        assert await ran.file("/out/log").size() == 1_000_000_000
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert (after - before) * 1024 < 100_000_000
        with pytest.raises(dagger.QueryError, match="too many for one string"):
            await ran.stdout()


# Live logs.


class Receiver:
    """Takes what the engine sends, with the time at which it came."""

    def __init__(self, delay: float = 0) -> None:
        self.records: list[tuple[float, str, str, dict[str, Any]]] = []
        self.largest = 0
        self._delay = delay

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await anyio.sleep(self._delay)
        assert scope["path"] == "/v1/logs"
        self.largest = max(self.largest, len(body))
        for resource_logs in ExportLogsServiceRequest.FromString(body).resource_logs:
            for record in resource_logs.scope_logs[0].log_records:
                kind = "bool_value" if record.attributes[0].key == "stdio.eof" else "int_value"
                attributes = {a.key: getattr(a.value, kind) for a in record.attributes}
                text = record.body.string_value
                self.records.append((time.monotonic(), record.trace_id.hex(), text, attributes))
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]}
        )
        await send({"type": "http.response.body"})

    def text(self, stream: int = 1) -> str:
        return "".join(
            text for _, _, text, found in self.records if found.get("stdio.stream") == stream
        )


@asynccontextmanager
async def receiving(
    connect: Connect, delay: float = 0
) -> AsyncIterator[tuple[dagger.Client, Receiver]]:
    receiver = Receiver(delay)
    async with (
        asgi.serve(receiver) as port,
        connect(logs_endpoint=f"http://127.0.0.1:{port}/v1/logs") as dag,
    ):
        yield dag, receiver


async def test_output_arrives_while_the_command_runs_under_the_trace_of_its_query(
    connect: Connect,
) -> None:
    span = trace.SpanContext(
        trace_id=0xABC, span_id=0xDEF, is_remote=False, trace_flags=trace.TraceFlags(1)
    )
    async with receiving(connect) as (dag, receiver):
        token = context.attach(trace.set_span_in_context(trace.NonRecordingSpan(span)))
        try:
            await shell(host(dag), "echo 1; sleep 1; echo 2; echo e >&2").sync()
        finally:
            context.detach(token)
        ended = time.monotonic()
        await anyio.sleep(0.3)
        first = receiver.records[0]
        assert first[1] == f"{0xABC:032x}"
        assert first[2:] == ("1\n", {"stdio.stream": 1})
        assert ended - first[0] > 0.7
        assert receiver.text() == "1\n2\n"
        assert receiver.text(2) == "e\n"
        assert receiver.records[-1][3] == {"stdio.eof": True}


async def test_live_text_is_whole_characters_and_masked(connect: Connect) -> None:
    async with receiving(connect) as (dag, receiver):
        container = host(dag).with_secret_variable("A", dag.set_secret("a", "hidden-value"))
        await shell(container, r"printf '\303'; sleep 0.3; printf '\244\377'; echo $A").sync()
        await anyio.sleep(0.3)
        assert receiver.text() == "ä\ufffd***\n"


async def test_batches_are_bounded(connect: Connect) -> None:
    async with receiving(connect) as (dag, receiver):
        await shell(host(dag), "head -c 3000000 /dev/zero | tr '\\0' x").sync()
        await anyio.sleep(0.5)
        assert receiver.text() == "x" * 3_000_000
        assert receiver.largest < 400_000


async def test_a_slow_receiver_holds_nothing_up(connect: Connect) -> None:
    async with receiving(connect, delay=1) as (dag, _):
        began = time.monotonic()
        ran = shell(
            host(dag), "head -c 50000000 /dev/zero | tr '\\0' x; exit 3", expect=ReturnType.ANY
        )
        assert await ran.exit_code() == 3
        assert time.monotonic() - began < 5
        assert len(await ran.stdout()) == 50_000_000


async def test_a_receiver_that_is_down_holds_nothing_up(connect: Connect) -> None:
    async with connect(logs_endpoint="http://127.0.0.1:9/v1/logs") as dag:
        assert await shell(host(dag), "echo fine").stdout() == "fine\n"
