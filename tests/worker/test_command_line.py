"""`moonmind-ext worker` as whoever starts it sees it."""

import signal
import subprocess

import pytest

from moonmind_ext.queue.rules import QueueRules
from moonmind_ext.run.events import LOG
from tests.conformance.support import sh
from tests.worker.faults import until
from tests.worker.support import WAIT_SECONDS, Site

FOREIGN = {
    "repository": "acme/widgets",
    "task": {"instructions": "Think.", "publish": {"mode": "none"}},
}
"""A task for an agent, without a container."""


async def end_of(worker: "subprocess.Popen[str]") -> tuple[int, str]:
    await until(lambda: worker.poll() is not None, WAIT_SECONDS)
    assert worker.stdout is not None
    return worker.returncode, worker.stdout.read()


async def test_once_does_one_job_and_ends(site: Site) -> None:
    async with site.desk() as desk:
        jobs = [await desk.submit(site.payload("true")) for _ in range(2)]
        with site.process(desk.url, "--once", "--concurrency", "4") as worker:
            code, said = await end_of(worker)
        assert code == 0, said
        assert [(await desk.job(job_id))["status"] for job_id in jobs] == ["succeeded", "queued"]
    assert site.left_over() == []


async def test_once_is_well_with_a_job_that_fails(site: Site) -> None:
    async with site.desk() as desk:
        job_id = await desk.submit(site.payload("false"))
        with site.process(desk.url, "--once") as worker:
            code, said = await end_of(worker)
        assert code == 0, said
        assert (await desk.job(job_id))["status"] == "failed"


async def test_once_is_well_with_an_empty_queue_and_says_so(site: Site) -> None:
    async with site.desk() as desk:
        with site.process(desk.url, "--once") as worker:
            code, said = await end_of(worker)
    assert code == 0
    assert "moonmind-ext: the queue has no job for this worker" in said


async def test_once_fails_without_a_queue(site: Site) -> None:
    with site.process("http://127.0.0.1:9", "--once") as worker:
        code, said = await end_of(worker)
    assert code == 75
    assert "queue http://127.0.0.1:9, claim: " in said
    assert "Traceback" not in said


async def test_once_fails_with_a_wrong_token_and_says_that_it_may_be_that(site: Site) -> None:
    async with site.desk(QueueRules(token="right")) as desk:
        with site.process(desk.url, "--once", MOONMIND_WORKER_TOKEN="wrong-token") as worker:
            code, said = await end_of(worker)
    assert code == 75
    assert "MOONMIND_WORKER_TOKEN" in said
    assert "wrong-token" not in said


async def test_max_jobs_are_done_and_no_more(site: Site) -> None:
    async with site.desk() as desk:
        jobs = [await desk.submit(site.payload("true")) for _ in range(4)]
        with site.process(desk.url, "--max-jobs", "3", "--concurrency", "2") as worker:
            code, said = await end_of(worker)
        assert code == 0, said
        found = [(await desk.job(job_id))["status"] for job_id in jobs]
    assert found == ["succeeded"] * 3 + ["queued"]


async def test_a_foreign_job_is_given_back_and_ends_the_worker(site: Site) -> None:
    async with site.desk() as desk:
        ours = await desk.submit(site.payload(*sh("echo up; sleep 3")))
        with site.process(desk.url, "--concurrency", "2") as worker:
            await desk.until_said(ours, LOG)
            foreign = await desk.submit(FOREIGN)
            code, said = await end_of(worker)
        assert code == 65, said
        assert "docs/moonmind.md" in said
        job = await desk.job(foreign)
        assert (job["status"], job["attempt"]) == ("queued", 2)
        assert "task.container is not enabled" in job["errorMessage"]
        assert "attempt 1 of 3" in job["errorMessage"]
        # What was under way came to its end.
        assert (await desk.job(ours))["status"] == "succeeded"


@pytest.mark.parametrize("option", ["--once", "--concurrency=1"])
async def test_the_last_attempt_of_a_foreign_job_fails_for_good(site: Site, option: str) -> None:
    async with site.desk() as desk:
        job_id = await desk.submit(FOREIGN, max_attempts=1)
        with site.process(desk.url, option) as worker:
            code, said = await end_of(worker)
        assert code == 65, said
        job = await desk.job(job_id)
    assert job["status"] == "failed"
    assert "the last, so the job fails for good" in job["errorMessage"]


async def test_ctrl_c_drains_and_ctrl_c_again_stops_at_once(site: Site) -> None:
    async with site.desk() as desk:
        job_id = await desk.submit(site.payload(*sh("echo up; sleep 600")))
        with site.process(desk.url) as worker:
            await desk.until_said(job_id, LOG)
            worker.send_signal(signal.SIGINT)
            second = await desk.submit(site.payload("true"))
            worker.send_signal(signal.SIGINT)
            code, said = await end_of(worker)
        assert code == 130, said
        assert "Traceback" not in said
        assert (await desk.job(second))["status"] == "queued"
    assert site.left_over() == []
