"""A job's life as the queue records it, from the claim to the last call."""

import hashlib
import json

import anyio
import pytest

from moonmind_ext.queue.rules import QueueRules
from moonmind_ext.worker.service import End, Limits
from tests.conformance.support import sh
from tests.worker.support import Site, running

ORDER = [
    "Worker claimed job",
    "moonmind.task.plan",
    "moonmind.task.prepare started",
    "task.git.defaultBranchResolved",
    "moonmind.task.prepare finished",
    "moonmind.task.execute started",
    "moonmind.task.container.started",
    "moonmind.task.container.finished",
    "moonmind.task.execute finished",
    "moonmind.task.publish started",
    "moonmind.task.publish finished",
    "moonmind.task.publish published",
    "Job completed",
]


async def test_a_job_goes_through_moonminds_stages_in_their_order(site: Site) -> None:
    async with site.desk() as desk:
        job_id = await desk.submit(site.payload(*sh("echo new >new.txt"), publish="branch"))
        async with running(site.settings(desk.url), Limits(jobs=1)) as worker:
            job = await desk.until(job_id, "succeeded")
            await worker.drain()
        said = [
            f"{event['message']} {event['payload'].get('status', '')}".strip()
            for event in await desk.events(job_id)
            if event["payload"] and event["payload"].get("workerId") is None
        ]
    assert [message for message in said if message in ORDER] == ORDER
    branch = f"task/{job['startedAt'][:10].replace('-', '')}/{job_id[:8]}"
    assert job["resultSummary"] == (
        f"container task execution completed; published branch {branch}"
    )
    assert site.origin.file(branch, "new.txt") == "new"


async def test_every_log_and_artifact_is_uploaded_with_digest_and_content_type(site: Site) -> None:
    script = 'echo hello; mkdir "$ARTIFACT_DIR/sub"; printf data >"$ARTIFACT_DIR/sub/a.bin"'
    async with site.desk() as desk:
        job_id = await desk.submit(site.payload(*sh(script)))
        async with running(site.settings(desk.url), Limits(jobs=1)) as worker:
            await desk.until(job_id, "succeeded")
            await worker.drain()
        found = await desk.artifacts(job_id)
        answer = await desk.http.get(f"/api/queue/jobs/{job_id}/artifacts")
        items = {item["name"]: item for item in answer.json()["items"]}
    assert set(found) == {
        "logs/prepare.log",
        "logs/execute.log",
        "task_context.json",
        "container/logs/runner.log",
        "container/metadata/run.json",
        "container/metadata/payload.json",
        "container/sub/a.bin",
    }
    assert found["container/logs/runner.log"] == b"hello\n"
    digest = hashlib.sha256(b"data").hexdigest()
    assert items["container/sub/a.bin"]["digest"] == f"sha256:{digest}"
    assert items["container/metadata/run.json"]["contentType"] == "application/json"
    assert json.loads(found["container/metadata/run.json"])["jobId"] == job_id


async def test_a_failed_command_is_final_and_brings_its_files_back(site: Site) -> None:
    script = 'echo kept >"$ARTIFACT_DIR/kept.txt"; echo the reason >&2; exit 7'
    async with site.desk() as desk:
        job_id = await desk.submit(site.payload(*sh(script), publish="branch"))
        async with running(site.settings(desk.url), Limits(jobs=1)):
            job = await desk.until(job_id, "failed", "succeeded", "dead_letter")
        assert job["status"] == "failed"
        assert job["errorMessage"] == "container command failed (7): the reason"
        assert (await desk.artifacts(job_id))["container/kept.txt"] == b"kept\n"
    assert site.origin.branches() == ["main"]


async def test_output_is_live_and_in_order(site: Site) -> None:
    script = "for n in 1 2 3 4 5 6; do echo line $n; sleep 0.5; done"
    async with site.desk() as desk:
        job_id = await desk.submit(site.payload(*sh(script)))
        async with running(site.settings(desk.url), Limits(jobs=1)):
            with anyio.fail_after(30):
                while "line 1" not in await desk.live(job_id):
                    await anyio.sleep(0.05)
            # Seen while it runs.
            assert (await desk.job(job_id))["status"] == "running"
            await desk.until(job_id, "succeeded")
        assert await desk.live(job_id) == "".join(f"line {n}\n" for n in range(1, 7))


async def test_each_of_many_jobs_has_its_own_output(site: Site) -> None:
    async with site.desk() as desk:
        jobs = {
            name: await desk.submit(site.payload(*sh(f"echo {name}; sleep 1; echo {name}")))
            for name in ("one", "two", "three", "four")
        }
        async with running(site.settings(desk.url, concurrency=4), Limits(jobs=4)):
            for name, job_id in jobs.items():
                await desk.until(job_id, "succeeded")
                assert await desk.live(job_id) == f"{name}\n{name}\n"


@pytest.mark.parametrize("cancellation", [True, False])
async def test_nothing_is_left_when_a_worker_has_ended(site: Site, cancellation: bool) -> None:
    async with site.desk(QueueRules(cancellation=cancellation)) as desk:
        job_id = await desk.submit(site.payload("true"))
        async with running(site.settings(desk.url), Limits(jobs=1)) as worker:
            await desk.until(job_id, "succeeded")
            assert await worker.drain() is End.ENOUGH_JOBS
    assert site.left_over() == []


async def test_a_cancelled_job_is_stopped_and_brings_its_files_back(site: Site) -> None:
    script = (
        'trap "echo stopping; exit 0" TERM; echo a >"$ARTIFACT_DIR/a"; echo up; sleep 60 & wait'
    )
    async with site.desk() as desk:
        job_id = await desk.submit(site.payload(*sh(script), publish="branch"))
        async with running(site.settings(desk.url, lease_seconds=3), Limits(jobs=1)):
            await desk.until_said(job_id, "moonmind.task.container.log")
            await desk.cancel(job_id)
            job = await desk.until(job_id, "cancelled", "failed", "succeeded")
        assert job["status"] == "cancelled"
        assert "Job cancellation requested; stopping" in await desk.messages(job_id)
        found = await desk.artifacts(job_id)
    assert found["container/a"] == b"a\n"
    assert found["container/logs/runner.log"] == b"up\nstopping\n"
    assert site.origin.branches() == ["main"]
