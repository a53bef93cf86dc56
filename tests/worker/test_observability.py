"""What operators see of a worker: figures, log lines, and spans in one trace."""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from moonmind_ext.asgi import serve
from moonmind_ext.worker.metrics import Metrics, metrics_app
from tests.conformance.support import sh
from tests.worker.support import WAIT_SECONDS, Desk, Site, running


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def scrape(port: int) -> dict[str, float]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        text = (await http.get("/metrics")).raise_for_status().text
        assert (await http.get("/healthz")).is_success
        assert (await http.get("/other")).status_code == 404
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


async def test_metrics_count_jobs_phases_sessions_and_output(site: Site) -> None:
    port = free_port()
    async with site.desk() as desk:
        good = await desk.submit(site.payload("echo", "hello"))
        bad = await desk.submit(site.payload("false"))
        async with running(site.settings(desk.url), metrics_port=port):
            await desk.until(good, "succeeded")
            await desk.until(bad, "failed")
            with anyio.fail_after(WAIT_SECONDS):
                while (found := await scrape(port))["moonmind_worker_jobs_running"]:
                    await anyio.sleep(0.05)
    assert found['moonmind_worker_jobs_total{outcome="succeeded"}'] == 1
    assert found['moonmind_worker_jobs_total{outcome="command-failed"}'] == 1
    assert found['moonmind_worker_engine_sessions_total{reason="first"}'] == 1
    assert found["moonmind_worker_log_bytes_total"] == len("hello\n")
    for phase in ("prepare", "execute", "run.workspace", "run.image", "run.export", "upload"):
        assert found[f'moonmind_worker_phase_seconds_count{{phase="{phase}"}}'] == 2


async def test_metrics_count_calls_that_the_queue_did_not_answer(site: Site) -> None:
    port, nowhere = free_port(), f"http://127.0.0.1:{free_port()}"
    async with running(site.settings(nowhere), metrics_port=port):
        with anyio.fail_after(WAIT_SECONDS):
            name = 'moonmind_worker_queue_errors_total{call="claim"}'
            while True:
                try:
                    if (await scrape(port)).get(name):
                        break
                except httpx.ConnectError:
                    pass
                await anyio.sleep(0.05)


async def test_a_worker_without_an_engine_is_not_healthy() -> None:
    async with serve(metrics_app(Metrics(), lambda: False)) as port, httpx.AsyncClient() as http:
        assert (await http.get(f"http://127.0.0.1:{port}/healthz")).status_code == 503


async def trace_of(desk: Desk, job_id: str) -> str:
    report = json.loads((await desk.artifacts(job_id))["container/metadata/run.json"])
    return str(report["traceId"])


async def test_each_log_line_of_a_job_names_it_and_its_trace(site: Site) -> None:
    async with site.desk() as desk:
        job_id = await desk.submit(site.payload("true"))
        with site.process(desk.url, "--max-jobs", "1", MOONMIND_LOG_FORMAT="json") as process:
            out, _ = await anyio.to_thread.run_sync(process.communicate, None, WAIT_SECONDS)
        assert process.returncode == 0
        trace_id = await trace_of(desk, job_id)
    lines = [json.loads(line) for line in out.splitlines()]
    ours = {line["event"]: line for line in lines if line.get("job_id") == job_id}
    assert {"claimed a job", "done with the job"} <= ours.keys()
    assert {line["trace_id"] for line in ours.values()} == {trace_id}
    assert all("timestamp" in line and "level" in line for line in lines)


@asynccontextmanager
async def collector(spans: list[Span]) -> AsyncIterator[str]:
    """An OpenTelemetry collector that only keeps spans."""

    async def app(_: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                spans.extend(scope.spans)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with serve(app) as port:
        yield f"http://127.0.0.1:{port}/v1/traces"


async def test_spans_of_a_job_and_of_its_engine_are_one_trace(site: Site) -> None:
    spans: list[Span] = []
    async with site.desk() as desk, collector(spans) as endpoint:
        job_id = await desk.submit(site.payload(*sh("echo hello"), publish="branch"))
        with site.process(
            desk.url,
            *("--max-jobs", "1"),
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=endpoint,
            OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="http/protobuf",
        ) as process:
            out, _ = await anyio.to_thread.run_sync(process.communicate, None, WAIT_SECONDS)
        assert process.returncode == 0, out
        trace_id = await trace_of(desk, job_id)
    by_id = {span.span_id: span for span in spans if span.trace_id.hex() == trace_id}
    names = {span.name for span in by_id.values()}
    assert {"moonmind.job", "prepare", "workspace", "image", "execute", "export"} <= names
    assert {"publish", "upload"} <= names
    root = next(span for span in by_id.values() if span.name == "moonmind.job")
    assert not root.parent_span_id
    for span in by_id.values():
        above = span
        while above.parent_span_id:
            above = by_id[above.parent_span_id]
        assert above is root
    if site.engine.choice != "embedded":
        # The engine's own, below ours.
        assert any("withExec" in name or "exec" in name.split() for name in names), names


async def test_a_failure_is_in_the_spans_without_its_text(site: Site) -> None:
    """Exceptions hold what programs printed, masked only where it is reported."""
    spans: list[Span] = []
    site.origin.path.rename(site.folder / "moved")
    async with site.desk() as desk, collector(spans) as endpoint:
        await desk.submit(site.payload("true"), max_attempts=1)
        with site.process(
            desk.url, "--max-jobs", "1", OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=endpoint
        ) as process:
            await anyio.to_thread.run_sync(process.communicate, None, WAIT_SECONDS)
    ours = [span for span in spans if span.name in {"moonmind.job", "prepare"}]
    assert len(ours) == 2
    assert not any(span.events or span.status.message for span in ours)
