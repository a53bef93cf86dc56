"""The queue's API as a worker uses it, on servers good and bad."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import anyio
import pytest

from moonmind_ext.queue.rules import QueueRules
from moonmind_ext.run.events import Event, Level
from moonmind_ext.worker import queue as queue_module
from moonmind_ext.worker.metrics import Metrics
from moonmind_ext.worker.queue import Job, QueueClient, QueueError, open_queue
from tests.worker.servers import (
    Request,
    answer,
    claimed,
    client_of,
    http_server,
    json_answer,
    refusal,
    settings_for,
)
from tests.worker.support import AT_ONCE, Desk, open_desk, payload

TASK = payload("busybox", "true")
TOKEN = "wtok-0123456789abcdef"
FIELDS = {"name": "a.txt", "contentType": "text/plain", "digest": "sha256:0"}
JOB = {"id": "1", "type": "task"}


@asynccontextmanager
async def desk_and_client(
    folder: Path, rules: QueueRules = AT_ONCE, **changes: Any
) -> AsyncIterator[tuple[Desk, QueueClient]]:
    async with (
        open_desk(folder / "queue.db", rules) as desk,
        client_of(desk.url, **changes) as queue,
    ):
        yield desk, queue


@asynccontextmanager
async def client_answered(data: bytes | None) -> AsyncIterator[QueueClient]:
    """A client of a server that has one answer to everything."""

    async def respond(_: Request) -> bytes | None:
        return data

    async with http_server(respond) as url, client_of(url) as queue:
        yield queue


async def test_a_job_is_claimed_and_brought_to_each_of_its_ends(tmp_path: Path) -> None:
    async with desk_and_client(tmp_path) as (desk, queue):
        assert await queue.claim() is None
        ids = [await desk.submit(TASK) for _ in range(4)]
        jobs = [await claimed(queue) for _ in ids]
        assert [job.id for job in jobs] == ids
        assert (jobs[0].attempt, jobs[0].max_attempts, jobs[0].is_last_attempt) == (1, 3, False)
        assert jobs[0].payload["task"]["container"]["image"] == "busybox"

        await queue.complete(ids[0], "done")
        await queue.fail(ids[1], "broken", retryable=False)
        await queue.fail(ids[2], "away", retryable=True)
        await desk.cancel(ids[3])
        assert (await queue.heartbeat(ids[3])).cancel_requested_at is not None
        await queue.acknowledge(ids[3], "stopped")
        found = [await desk.job(job_id) for job_id in ids]
        assert [job["status"] for job in found] == ["succeeded", "failed", "queued", "cancelled"]
        assert [job["resultSummary"] or job["errorMessage"] for job in found[:3]] == [
            "done",
            "broken",
            "away",
        ]


async def test_only_tasks_are_claimed_and_only_what_the_worker_is_able_to_do(
    tmp_path: Path,
) -> None:
    async with desk_and_client(tmp_path) as (desk, queue):
        await desk.submit({"anything": "goes"}, kind="codex_exec")
        await desk.submit({**TASK, "requiredCapabilities": ["gpu"]})
        assert await queue.claim() is None


async def test_an_event_and_a_file_are_stored_as_they_are(tmp_path: Path) -> None:
    async with desk_and_client(tmp_path) as (desk, queue):
        job_id = await desk.submit(TASK)
        await claimed(queue)
        event = Event("said", {"text": "ü\n", "n": [1, None, 2.5]}, Level.WARN)
        await queue.event(job_id, event)
        # Bytes that a form could stumble over.
        content = bytes(range(256)) + b"\r\n--boundary--\r\n"
        name = 'sub dir/a "quoted" ü;.bin'
        await queue.upload(job_id, content, {**FIELDS, "name": name})
        said = [found for found in await desk.events(job_id) if found["message"] == "said"]
        assert [(found["level"], found["payload"]) for found in said] == [("warn", event.payload)]
        assert await desk.artifacts(job_id) == {name: content}


async def test_nul_and_half_surrogate_pairs_are_taken_out_of_everything(tmp_path: Path) -> None:
    # The stand-in refuses them with a 500, as MoonMind's database makes its server do.
    async with desk_and_client(tmp_path) as (desk, queue):
        ids = [await desk.submit(TASK) for _ in range(2)]
        for _ in ids:
            await claimed(queue)
        bad = "a\0b\ud800c"
        await queue.event(ids[0], Event(bad, {bad: [bad, {"deep": (bad,)}], "n": 1}))
        await queue.upload(ids[0], b"1", {**FIELDS, "name": bad})
        await queue.complete(ids[0], bad)
        await queue.fail(ids[1], bad, retryable=False)
        good = "ab?c"
        assert (await desk.job(ids[0]))["resultSummary"] == good
        assert (await desk.job(ids[1]))["errorMessage"] == good
        assert set(await desk.artifacts(ids[0])) == {good}
        events = [event for event in await desk.events(ids[0]) if event["message"] == good]
        assert [event["payload"] for event in events] == [{good: [good, {"deep": [good]}], "n": 1}]


async def test_the_token_is_sent_and_a_wrong_one_is_named_as_what_it_may_be(tmp_path: Path) -> None:
    rules = QueueRules(token=TOKEN)
    async with open_desk(tmp_path / "queue.db", rules) as desk:
        async with client_of(desk.url, token=TOKEN) as queue:
            assert await queue.claim() is None
        for token in ("wrong", None):
            async with client_of(desk.url, token=token) as queue:
                with pytest.raises(QueueError) as error:
                    await queue.claim()
            assert error.value.may_be_token
            assert str(error.value) == (
                f"queue {desk.url}, claim: 500 Internal Server Error: Internal Server Error; "
                "it may be the token, MOONMIND_WORKER_TOKEN"
            )


@pytest.mark.parametrize(
    ("data", "true"),
    [
        (refusal(400), set()),
        (refusal(401), {"may_be_token", "may_pass"}),
        (refusal(403), {"may_be_token", "may_pass"}),
        (refusal(404), {"is_gone"}),
        (refusal(409), {"is_gone"}),
        (refusal(408), {"may_pass"}),
        (refusal(413), {"is_too_large"}),
        (answer(413, "<html>too large</html>"), {"is_too_large"}),
        (refusal(422), set()),
        (refusal(425), {"may_pass"}),
        (refusal(429), {"may_pass"}),
        (refusal(500), {"may_pass"}),
        (answer(500, "Internal Server Error"), {"may_be_token", "may_pass"}),
        (answer(502, "bad gateway"), {"may_pass"}),
        (refusal(503), {"may_pass"}),
        (answer(301, Location="http://127.0.0.1:9/"), set()),
        (None, {"may_pass"}),
    ],
)
async def test_what_an_answer_means_for_the_next_call(data: bytes | None, true: set[str]) -> None:
    async with client_answered(data) as queue:
        with pytest.raises(QueueError) as error:
            await queue.heartbeat("1")
    names = ("is_gone", "is_too_large", "may_be_token", "may_pass")
    assert {name for name in names if getattr(error.value, name)} == true
    assert (error.value.status is None) == (data is None)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            refusal(409, "job_state_conflict", "it is over"),
            "409 Conflict: job_state_conflict: it is over",
        ),
        (json_answer({"detail": "Not Found"}, 404), '404 Not Found: {"detail": "Not Found"}'),
        (json_answer({"detail": [{"loc": []}]}, 422), "422 Unprocessable Entity: "),
        (json_answer(["odd"], 400), '400 Bad Request: ["odd"]'),
        (json_answer(None, 400), "400 Bad Request: null"),
        (answer(502, "<html>" + "x" * 9999), "502 Bad Gateway: <html>xxx"),
        (answer(500, b"\xff\xfe"), "500 Internal Server Error: "),
    ],
)
async def test_a_refusal_is_told_in_the_servers_words(data: bytes, said: str) -> None:
    async with client_answered(data) as queue:
        with pytest.raises(QueueError) as error:
            await queue.heartbeat("1")
    assert f", heartbeat: {said}" in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b"<html>", b"\xff\xfe\xfd", b"[" * 100_000, b"[]", b"null", b'"text"']
)
async def test_an_answer_that_makes_no_sense_is_one_that_may_come_later(body: bytes) -> None:
    async with client_answered(answer(200, body, "application/json")) as queue:
        with pytest.raises(QueueError) as error:
            await queue.read("1")
    assert error.value.status is None
    assert error.value.may_pass
    assert ", read: " in str(error.value)


@pytest.mark.parametrize(
    ("job", "fields"),
    [
        ({}, "id, type"),
        ({**JOB, "attempt": None}, "attempt"),
        (
            {**JOB, "payload": {"password": "wordpass"}, "cancelRequestedAt": "wordpass"},
            "cancelRequestedAt",
        ),
        ({**JOB, "id": "../../etc"}, "id"),
        ({**JOB, "id": ""}, "id"),
    ],
)
async def test_a_job_that_is_none_is_refused_by_its_fields_and_not_shown(
    job: Any, fields: str
) -> None:
    async with client_answered(json_answer({"job": job})) as queue:
        with pytest.raises(QueueError, match=f"claim: its job has no valid {fields}$"):
            await queue.claim()


async def test_a_server_that_is_not_there_or_hangs_up_is_said() -> None:
    async with client_of("http://127.0.0.1:9") as queue:
        with pytest.raises(QueueError, match="queue http://127.0.0.1:9, claim: .+") as error:
            await queue.claim()
        assert error.value.status is None
    async with client_answered(None) as queue:
        with pytest.raises(QueueError, match="claim: .+"):
            await queue.claim()


async def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "UPLOAD_SECONDS", 0.3)

    async def respond(_: Request) -> bytes | None:
        await anyio.sleep_forever()
        return None

    async with http_server(respond) as url, client_of(url) as queue:
        with pytest.raises(QueueError, match="upload: no answer within 0.3s") as error:
            await queue.upload("1", b"1", FIELDS)
        assert error.value.may_pass
        with anyio.move_on_after(0.2) as scope:
            await queue.claim()
        # Cancelled is cancelled: no error of the queue's comes out of it.
        assert scope.cancelled_caught


async def test_a_server_that_trickles_is_given_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # A limit for each step would let this one go on for ever.
    monkeypatch.setattr(queue_module, "UPLOAD_SECONDS", 0.5)

    async def trickle(_: Any, writer: Any) -> None:
        with closing(writer):
            while not writer.is_closing():
                writer.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
                await anyio.sleep(0.05)

    server = await asyncio.start_server(trickle, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with client_of(f"http://127.0.0.1:{port}") as queue:
            with anyio.fail_after(20), pytest.raises(QueueError, match="upload: "):
                await queue.upload("1", b"1", FIELDS)
        # The server sees that nobody listens, and its last connection ends.
        await anyio.sleep(0.2)


async def test_every_failed_call_is_counted_under_its_name() -> None:
    async def respond(request: Request) -> bytes | None:
        return json_answer({}) if request.method == "GET" else refusal(500)

    metrics = Metrics()
    async with http_server(respond) as url, open_queue(settings_for(url), metrics) as queue:
        for call in (queue.claim, lambda: queue.heartbeat("1"), lambda: queue.read("1")):
            with pytest.raises(QueueError):
                await call()
    counted = {
        name: metrics.registry.get_sample_value(
            "moonmind_worker_queue_errors_total", {"call": name}
        )
        for name in ("claim", "heartbeat", "read", "event")
    }
    assert counted == {"claim": 1, "heartbeat": 1, "read": 1, "event": None}


async def test_the_worker_says_who_it_is_and_for_how_long(tmp_path: Path) -> None:
    asked: list[tuple[str, Any]] = []

    async def respond(request: Request) -> bytes | None:
        asked.append((request.path, json.loads(request.body)))
        return json_answer({"job": None, **JOB})

    async with http_server(respond) as url, client_of(url, capabilities=("git", "gpu")) as queue:
        await queue.claim()
        await queue.heartbeat("1")
    lease = {"workerId": "worker-1", "leaseSeconds": 30}
    able = {"allowedTypes": ["task"], "workerCapabilities": ["git", "gpu"]}
    assert asked == [
        ("/api/queue/jobs/claim", {**lease, **able}),
        ("/api/queue/jobs/1/heartbeat", lease),
    ]


def test_an_older_servers_job_is_a_job_too() -> None:
    assert Job.model_validate({**JOB, "unknown": 1}).cancel_requested_at is None
