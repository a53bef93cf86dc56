"""The end that somebody asks for: what runs may end, and what does not end is given back."""

import signal
import subprocess

import anyio
import pytest

from moonmind_ext.queue.rules import Row
from moonmind_ext.run.events import LOG
from tests.conformance.support import sh
from tests.worker.faults import Ledger, open_proxy, processes, until
from tests.worker.support import WAIT_SECONDS, Desk, Site

SOON = 20
"""Seconds for what has no reason to take long."""


@pytest.fixture
def ledger(site: Site, unique: str) -> Ledger:
    return Ledger(site.engine, f"ledger-{unique}")


async def end_of(worker: "subprocess.Popen[str]", seconds: float = SOON) -> tuple[int, str]:
    """Wait for a worker's end; gives its exit code and what it said."""
    await until(lambda: worker.poll() is not None, seconds)
    assert worker.stdout is not None
    return worker.returncode, worker.stdout.read()


async def test_a_running_job_ends_and_no_other_is_taken(site: Site) -> None:
    async with site.desk() as desk:
        first = await desk.submit(site.payload(*sh("echo up; sleep 3")))
        with site.process(desk.url, "--drain-seconds", "50") as worker:
            await desk.until_said(first, LOG)
            second = await desk.submit(site.payload("true"))
            worker.send_signal(signal.SIGTERM)
            code, said = await end_of(worker)
        assert code == 0, said
        assert (await desk.job(first))["status"] == "succeeded"
        assert (await desk.job(second))["status"] == "queued"
    assert site.left_over() == []


async def test_an_idle_worker_ends_at_once(site: Site) -> None:
    async with site.desk() as desk:
        job_id = await desk.submit(site.payload("true"))
        with site.process(desk.url) as worker:
            await desk.until(job_id, "succeeded")
            worker.send_signal(signal.SIGTERM)
            code, said = await end_of(worker)
        assert code == 0, said


async def test_a_worker_that_looks_for_its_queue_ends_at_once(site: Site) -> None:
    with site.process("http://127.0.0.1:9") as worker:
        output = worker.stdout
        assert output is not None
        await until(lambda: "no job could be claimed" in output.readline())
        worker.send_signal(signal.SIGTERM)
        code, said = await end_of(worker)
    assert code == 0, said


async def drained_in_the_middle(
    site: Site, desk: Desk, *, max_attempts: int = 3, **fields: object
) -> Row:
    """Let a worker come to the end of its drain with a job; gives the job."""
    script = sh("echo kept >$ARTIFACT_DIR/kept; echo begin >>/ledger/lines; echo up; sleep 600")
    payload = site.payload(*script, gracePeriodSeconds=1, publish="branch", **fields)
    job_id = await desk.submit(payload, max_attempts=max_attempts)
    with site.process(desk.url, "--drain-seconds", "1") as worker:
        await desk.until_said(job_id, LOG)
        worker.send_signal(signal.SIGTERM)
        code, said = await end_of(worker)
    assert code == 0, said
    assert site.left_over() == []
    assert site.origin.branches() == ["main"]
    assert (await desk.artifacts(job_id))["container/kept"] == b"kept\n"
    return await desk.job(job_id)


async def test_a_job_that_does_not_end_in_time_is_given_back(site: Site, ledger: Ledger) -> None:
    async with site.desk() as desk:
        job = await drained_in_the_middle(site, desk, cacheVolumes=ledger.volumes)
    assert job["status"] == "queued"
    assert job["attempt"] == 2
    assert job["errorMessage"] == (
        "the worker is shutting down. The job goes back to the queue; this used up attempt 1 of 3"
    )
    assert await ledger.lines() == ["begin"]


async def test_the_last_attempt_fails_for_good(site: Site, ledger: Ledger) -> None:
    async with site.desk() as desk:
        job = await drained_in_the_middle(site, desk, max_attempts=1, cacheVolumes=ledger.volumes)
    assert job["status"] == "failed"
    assert job["errorMessage"] == (
        "the worker is shutting down. This was attempt 1 of 1, the last, so the job fails for good"
    )


async def test_a_command_that_must_not_be_repeated_fails_for_good(
    site: Site, ledger: Ledger
) -> None:
    async with site.desk() as desk:
        job = await drained_in_the_middle(site, desk, cacheVolumes=ledger.volumes, retryable=False)
    assert job["status"] == "failed"
    assert job["attempt"] == 1
    assert "retryable: false" in job["errorMessage"]


async def test_a_second_sigterm_stops_at_once_and_reports_nothing(site: Site, unique: str) -> None:
    async with site.desk() as desk:
        job_id = await desk.submit(
            site.payload(*sh(f"trap '' TERM; echo up; sleep 600; : {unique}"))
        )
        with site.process(desk.url) as worker:
            await desk.until_said(job_id, LOG)
            worker.send_signal(signal.SIGTERM)
            await anyio.sleep(1)
            assert worker.poll() is None
            worker.send_signal(signal.SIGTERM)
            code, said = await end_of(worker)
        assert code == 130
        assert "stopped at once" in said
        assert "Traceback" not in said
        assert (await desk.job(job_id))["status"] == "running"
    assert site.left_over() == []
    await until(lambda: not processes(unique))


async def test_a_claim_that_was_under_way_is_given_back_too(site: Site) -> None:
    async with site.desk() as desk, open_proxy(desk.url) as proxy:
        proxy.slow = "/claim", 4
        job_id = await desk.submit(site.payload(*sh("sleep 600")))
        with site.process(proxy.url, "--drain-seconds", "0") as worker:
            await desk.until(job_id, "running")
            worker.send_signal(signal.SIGTERM)
            code, said = await end_of(worker)
        job = await desk.job(job_id)
    assert code == 0, said
    assert job["status"] == "queued"
    assert "shutting down" in job["errorMessage"]
    assert site.left_over() == []


async def test_a_job_that_waits_for_room_is_given_back_and_needs_no_room_for_that(
    site: Site,
) -> None:
    everything = {"resources": {"cpus": 4}}
    async with site.desk() as desk:
        first = await desk.submit(site.payload(*sh("echo up; sleep 8"), **everything))
        options = ("--concurrency", "2", "--cpus", "4", "--drain-seconds", "1")
        with site.process(desk.url, *options) as worker:
            await desk.until_said(first, LOG)
            second = await desk.submit(
                site.payload(*sh("sleep 600"), retryable=False, **everything)
            )
            await desk.until_said(second, "moonmind.task.execute")
            await desk.cancel(second)
            # Long before the first one's end.
            with anyio.fail_after(7):
                await desk.until(second, "cancelled")
            third = await desk.submit(site.payload(*sh("sleep 600"), retryable=False, **everything))
            await desk.until_said(third, "moonmind.task.execute")
            worker.send_signal(signal.SIGTERM)
            code, said = await end_of(worker)
        assert code == 0, said
        # Its command has not begun, so it may begin elsewhere.
        assert (await desk.job(third))["status"] == "queued"


async def test_a_drain_ends_when_the_queue_is_gone(site: Site) -> None:
    async with site.desk() as desk, open_proxy(desk.url) as proxy:
        job_id = await desk.submit(site.payload(*sh("echo up; sleep 600")))
        options = ("--drain-seconds", "1", "--lease-seconds", "5")
        with site.process(proxy.url, *options) as worker:
            await desk.until_said(job_id, LOG)
            proxy.cut = True
            worker.send_signal(signal.SIGTERM)
            code, said = await end_of(worker, WAIT_SECONDS)
    assert code == 0, said
    assert site.left_over() == []
