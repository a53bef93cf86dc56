"""The hold on a job: beats, what loses it, and the last call that counts once."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import anyio
import pytest

from moonmind_ext.worker.claim import MAX_BEAT_SECONDS, RETRY_SECONDS, Claim, pause_after
from moonmind_ext.worker.queue import Job, QueueClient
from tests.worker.servers import (
    Request,
    Way,
    answer,
    claimed,
    client_of,
    http_server,
    json_answer,
    open_way,
    refusal,
    until,
)
from tests.worker.support import AT_ONCE, Desk, open_desk, payload

TASK = payload("busybox", "true")
JOB = {"id": "1", "type": "task", "status": "running", "claimedBy": "worker-1"}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait; how long the pauses are is a test of its own."""
    monkeypatch.setattr("moonmind_ext.worker.claim.RETRY_SECONDS", (0.05, 0.1))


@asynccontextmanager
async def keeping(
    queue: QueueClient, job: Job, lease_seconds: int, *, age: float = 0
) -> AsyncIterator[Claim]:
    """Hold a claim, with beats."""
    claimed_at = anyio.current_time() - age
    claim = Claim(job, queue, lease_seconds=lease_seconds, claimed=claimed_at)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(claim.keep)
        yield claim
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def answered(
    *answers: bytes | None, lease_seconds: int = 1, age: float = 0
) -> AsyncIterator[tuple[Claim, list[float]]]:
    """A claim whose server gives these answers, the last again and again; the beats' times."""
    times: list[float] = []

    async def respond(_: Request) -> bytes | None:
        times.append(anyio.current_time())
        return answers[min(len(times), len(answers)) - 1]

    async with http_server(respond) as url, client_of(url) as queue:
        job = Job.model_validate(JOB)
        async with keeping(queue, job, lease_seconds, age=age) as claim:
            yield claim, times


@asynccontextmanager
async def at_the_end(
    folder: Path,
) -> AsyncIterator[tuple[Desk, Way, QueueClient, Claim]]:
    """A claimed job of the real queue, and a way to it on which answers get lost."""
    async with (
        open_desk(folder / "queue.db", AT_ONCE) as desk,
        open_way(desk.url) as (way, url),
        client_of(url) as queue,
    ):
        await desk.submit(TASK)
        job = await claimed(queue)
        claim = Claim(job, queue, lease_seconds=30, claimed=anyio.current_time())
        yield desk, way, queue, claim


async def test_a_third_of_the_lease_is_from_one_beat_to_the_next() -> None:
    async with answered(json_answer(JOB), lease_seconds=3) as (claim, times):
        begin = anyio.current_time()
        await until(lambda: len(times) >= 2)
        assert not claim.lost.is_set()
    # From below only: a busy machine is late, never early.
    assert times[0] - begin >= 0.95
    assert all(later - earlier >= 0.95 for earlier, later in pairwise(times))


async def test_however_long_the_lease_beats_come_often(monkeypatch: pytest.MonkeyPatch) -> None:
    # A request to cancel is seen by then, as by MoonMind's own worker.
    assert MAX_BEAT_SECONDS == 5
    monkeypatch.setattr("moonmind_ext.worker.claim.MAX_BEAT_SECONDS", 0.5)
    async with answered(json_answer(JOB), lease_seconds=3600) as (_, times):
        begin = anyio.current_time()
        await until(lambda: len(times) >= 1)
    assert times[0] - begin >= 0.45


@pytest.mark.parametrize("status", [404, 409])
async def test_an_answer_that_the_job_is_gone_loses_it_at_once(status: int) -> None:
    async with answered(refusal(status), lease_seconds=3) as (claim, times):
        with anyio.fail_after(30):
            await claim.lost.wait()
    assert len(times) == 1


async def test_a_proxys_404_is_a_missed_beat_and_no_loss() -> None:
    async with answered(answer(404, "not found"), json_answer(JOB)) as (claim, times):
        await until(lambda: len(times) > 2)
        assert not claim.lost.is_set()


async def test_a_beat_that_finds_the_job_ended_by_the_last_call_loses_nothing() -> None:
    beats = 0

    async def respond(request: Request) -> bytes | None:
        nonlocal beats
        if "heartbeat" in request.path:
            beats += 1
            return refusal(409)
        # The last call takes its time.
        await until(lambda: beats > 1)
        return json_answer({**JOB, "status": "succeeded"})

    async with (
        http_server(respond) as url,
        client_of(url) as queue,
        keeping(queue, Job.model_validate(JOB), 1) as claim,
    ):
        assert await claim.end(lambda: queue.complete("1", "done"))
        assert not claim.lost.is_set()


async def test_a_beat_for_another_attempt_loses_the_job() -> None:
    async with answered(json_answer({**JOB, "attempt": 2})) as (claim, times):
        with anyio.fail_after(30):
            await claim.lost.wait()
    assert len(times) == 1


async def test_another_answer_is_a_missed_beat_and_no_loss() -> None:
    missed = [*map(refusal, (401, 403, 500, 422)), answer(500, "oh"), answer(200, "{"), None]

    async def check(data: bytes | None) -> None:
        async with answered(data, json_answer(JOB), lease_seconds=4) as (claim, times):
            await until(lambda: len(times) >= 2)
            assert not claim.lost.is_set()

    # All at once: each waits for two beats.
    async with anyio.create_task_group() as tasks:
        for data in missed:
            tasks.start_soon(check, data)


async def test_no_beat_for_a_whole_lease_loses_the_job() -> None:
    async with answered(refusal(500)) as (claim, times):
        begin = anyio.current_time()
        with anyio.fail_after(30):
            await claim.lost.wait()
        assert anyio.current_time() - begin >= 0.95
    assert times


async def test_a_beat_that_is_never_answered_does_not_outlive_the_lease() -> None:
    async def respond(_: Request) -> bytes | None:
        await anyio.sleep_forever()
        return None

    async with (
        http_server(respond) as url,
        client_of(url) as queue,
        keeping(queue, Job.model_validate(JOB), 1) as claim,
    ):
        begin = anyio.current_time()
        # The call itself would be given ten seconds.
        with anyio.fail_after(8):
            await claim.lost.wait()
        assert anyio.current_time() - begin >= 0.95


async def test_the_lease_begins_when_the_claim_is_sent() -> None:
    # Its answer took so long that nothing is left of the lease.
    async with answered(json_answer(JOB), lease_seconds=5, age=5) as (claim, times):
        with anyio.fail_after(4):
            await claim.lost.wait()
        assert times == []


async def test_a_request_to_cancel_is_seen_and_the_job_kept() -> None:
    asked = json_answer({**JOB, "cancelRequestedAt": "2026-02-01T12:00:00Z"})
    async with answered(asked, lease_seconds=3) as (claim, times):
        with anyio.fail_after(30):
            await claim.cancelled.wait()
        seen = len(times)
        await until(lambda: len(times) > seen)
        assert not claim.lost.is_set()


async def test_beats_keep_a_job_beyond_its_lease(tmp_path: Path) -> None:
    async with open_desk(tmp_path / "queue.db", AT_ONCE) as desk:
        async with client_of(desk.url, lease_seconds=2) as queue:
            job_id = await desk.submit(TASK)
            async with keeping(queue, await claimed(queue), 2) as claim:
                end = anyio.current_time() + 2.4
                while anyio.current_time() < end:
                    # The queue looks at leases only when somebody claims.
                    assert await queue.claim() is None
                    await anyio.sleep(0.1)
                assert not claim.lost.is_set()
        assert (await desk.job(job_id))["attempt"] == 1


async def test_the_last_call_ends_the_job(tmp_path: Path) -> None:
    async with at_the_end(tmp_path) as (desk, way, queue, claim):
        assert await claim.end(lambda: queue.complete(claim.job.id, "done"))
        assert (await desk.job(claim.job.id))["status"] == "succeeded"
        assert way.count("/complete") == 1


@pytest.mark.parametrize("end", ["complete", "fail", "fail retryable", "cancel/ack"])
async def test_a_last_call_whose_answer_got_lost_is_not_said_twice(
    tmp_path: Path, end: str
) -> None:
    async with at_the_end(tmp_path) as (desk, way, queue, claim):
        job_id = claim.job.id
        calls = {
            "complete": (lambda: queue.complete(job_id, "done"), "succeeded"),
            "fail": (lambda: queue.fail(job_id, "no", retryable=False), "failed"),
            "fail retryable": (lambda: queue.fail(job_id, "no", retryable=True), "queued"),
            "cancel/ack": (lambda: queue.acknowledge(job_id, "stopped"), "cancelled"),
        }
        if end == "cancel/ack":
            await desk.cancel(job_id)
        call, status = calls[end]
        path = f"/{end.partition(' ')[0]}"
        way.lost.append(path)
        assert await claim.end(call)
        assert (await desk.job(job_id))["status"] == status
        assert way.count(path) == 1


async def test_a_last_call_that_nobody_heard_is_said_again(tmp_path: Path) -> None:
    async with at_the_end(tmp_path) as (desk, way, queue, claim):
        way.is_away = True

        async def come_back() -> None:
            await until(lambda: way.count("/complete") >= 1)
            way.is_away = False

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(come_back)
            assert await claim.end(lambda: queue.complete(claim.job.id, "done"))
        assert (await desk.job(claim.job.id))["status"] == "succeeded"
        assert way.count("/complete") == 2


async def test_a_lost_answer_is_found_out_though_the_next_question_is_lost_too(
    tmp_path: Path,
) -> None:
    async with at_the_end(tmp_path) as (desk, way, queue, claim):
        job_id = claim.job.id
        way.lost += ["/complete", f"/{job_id}"]
        assert await claim.end(lambda: queue.complete(job_id, "done"))
        assert (await desk.job(job_id))["status"] == "succeeded"
        # The second is refused with a 409, which is no news then.
        assert way.count("/complete") == 2


async def test_a_last_call_that_is_refused_at_once_does_not_count(tmp_path: Path) -> None:
    async with at_the_end(tmp_path) as (_, way, queue, claim):
        # Somebody else has ended it.
        await queue.fail(claim.job.id, "theirs", retryable=False)
        assert not await claim.end(lambda: queue.complete(claim.job.id, "ours"))
        assert way.count("/complete") == 1
        assert way.count(f"/{claim.job.id}") == 0


async def test_nothing_is_said_of_a_job_that_is_lost(tmp_path: Path) -> None:
    async with at_the_end(tmp_path) as (desk, way, queue, claim):
        claim.lost.set()
        assert not await claim.end(lambda: queue.complete(claim.job.id, "done"))
        assert way.count("/complete") == 0
        assert (await desk.job(claim.job.id))["status"] == "running"


async def test_a_server_that_refuses_for_ever_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moonmind_ext.worker.claim.END_SECONDS", 0.5)
    calls: list[str] = []

    async def respond(request: Request) -> bytes | None:
        calls.append(request.path)
        return json_answer(JOB) if request.method == "GET" else refusal(422)

    async with http_server(respond) as url, client_of(url) as queue:
        claim = Claim(
            Job.model_validate(JOB), queue, lease_seconds=30, claimed=anyio.current_time()
        )
        assert not await claim.end(lambda: queue.fail("1", "why", retryable=False))
    assert calls.count("/api/queue/jobs/1/fail") >= 1


def test_pauses_grow_and_stay_at_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moonmind_ext.worker.claim.RETRY_SECONDS", RETRY_SECONDS)
    last = RETRY_SECONDS[-1]
    found = [pause_after(attempt) for attempt in (1, 2, 3, 4, 5, 99)]
    assert found == [*RETRY_SECONDS, last, last]
    assert list(RETRY_SECONDS) == sorted(RETRY_SECONDS)
