"""When things break: what was not done is never reported, and what can be done is done again."""

import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NoReturn

import anyio
import httpx
import pytest

from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.session import EngineSession, NoEngineError
from moonmind_ext.queue.rules import QueueRules
from moonmind_ext.run.events import LOG
from moonmind_ext.worker import claim as claim_module
from moonmind_ext.worker import engine as engine_module
from moonmind_ext.worker import uploads
from moonmind_ext.worker.service import Limits
from tests.conformance.support import sh
from tests.worker.faults import (
    EngineKiller,
    Ledger,
    fill,
    kill_sessions_of,
    open_proxy,
    processes,
    small_disk,
    until,
)
from tests.worker.queue_process import queue_process
from tests.worker.support import WAIT_SECONDS, Desk, Site, git, running

ENDED = ("succeeded", "failed", "cancelled", "dead_letter")
FIRST_TIME_STAYS = (
    "echo begin >>/ledger/lines; if [ $(wc -l </ledger/lines) = 1 ]; then echo up; sleep {}; fi; "
    "echo end >>/ledger/lines; echo done"
)
"""Runs long when it is started first, and shortly after that."""


UNTIL_COMMIT = sh(
    "echo begin >>/ledger/lines; if [ ! -e again ]; then echo up; sleep 600; fi; "
    "echo end >>/ledger/lines; echo done"
)
"""Runs long unless the repository has a newer commit than at first."""


def commit_to(site: Site) -> None:
    """Put a file `again` into the repository."""
    seed = site.folder / "seed"
    (seed / "again").touch()
    git(seed, "add", "--all")
    git(seed, "commit", "--quiet", "--message=again")
    git(seed, "push", "--quiet", str(site.origin.path), "main")


@pytest.fixture
def ledger(site: Site, unique: str) -> Ledger:
    return Ledger(site.engine, f"ledger-{unique}")


async def starts(desk: Desk, job_id: str) -> int:
    return (await desk.messages(job_id)).count("moonmind.task.container.started")


async def completions(desk: Desk, job_id: str) -> list[str]:
    """Name the workers whose `complete` the queue has taken."""
    return [
        event["payload"]["workerId"]
        for event in await desk.events(job_id)
        if event["message"] == "Job completed" and "workerId" in event["payload"]
    ]


async def test_a_killed_engine_gives_the_job_back_and_a_new_session_runs_it(
    site: Site, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = EngineKiller(site.engine, monkeypatch)
    async with site.desk() as desk:
        job_id = await desk.submit(site.payload(*UNTIL_COMMIT, cacheVolumes=ledger.volumes))
        async with running(site.settings(desk.url)):
            await desk.until_said(job_id, LOG)
            commit_to(site)
            await killer.kill()
            job = await desk.until(job_id, *ENDED)

            assert job["status"] == "succeeded"
            assert job["attempt"] == 2
            assert await starts(desk, job_id) == 2
            assert await completions(desk, job_id) == ["worker-1"]

            after = await desk.submit(site.payload("true"))
            assert (await desk.until(after, *ENDED))["attempt"] == 1
    lines = await ledger.lines()
    # A real engine that is killed forgets its cache volumes.
    assert lines[-2:] == ["begin", "end"]
    assert len(lines) == 3 or site.engine.choice is EngineChoice.DAGGER
    assert site.left_over() == []


async def test_a_killed_engine_is_final_for_a_command_that_must_not_be_repeated(
    site: Site, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = EngineKiller(site.engine, monkeypatch)
    async with site.desk() as desk:
        payload = site.payload(*UNTIL_COMMIT, cacheVolumes=ledger.volumes, retryable=False)
        job_id = await desk.submit(payload)
        async with running(site.settings(desk.url)):
            await desk.until_said(job_id, LOG)
            commit_to(site)
            await killer.kill()
            job = await desk.until(job_id, *ENDED)

            assert job["status"] == "failed"
            assert job["attempt"] == 1
            assert job["errorMessage"].startswith("running the command: ")
    assert len(await ledger.lines()) <= 1


async def test_a_worker_with_limits_reports_when_the_engine_goes(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with site.desk() as desk:
        # The next session is a long time coming, and must not keep the report from being made.
        killer = EngineKiller(site.engine, monkeypatch)
        job_id = await desk.submit(site.payload(*sh("echo up; sleep 600")), max_attempts=1)
        async with running(site.settings(desk.url), Limits(claims=1)) as worker:
            await desk.until_said(job_id, LOG)
            monkeypatch.setattr(engine_module, "open_session", _no_session)
            await killer.kill()
            job = await desk.until(job_id, *ENDED)
            await worker.drain()
        assert job["status"] == "dead_letter"


async def test_a_lost_session_gives_the_job_back_and_a_new_one_runs_it(
    site: Site, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with site.desk() as desk:
        sessions: list[EngineSession] = []
        hand_out = engine_module.EngineKeeper._answers

        async def remember(self: engine_module.EngineKeeper, lent: engine_module._Lent) -> bool:
            sessions.append(lent.session)
            return await hand_out(self, lent)

        monkeypatch.setattr(engine_module.EngineKeeper, "_answers", remember)
        script = sh(FIRST_TIME_STAYS.format(600))
        job_id = await desk.submit(site.payload(*script, cacheVolumes=ledger.volumes))
        async with running(site.settings(desk.url)):
            await desk.until_said(job_id, LOG)
            if site.engine.choice is EngineChoice.DAGGER:
                assert kill_sessions_of(os.getpid()) == 1
            else:
                await sessions[-1].client._ctx.conn.close()
            job = await desk.until(job_id, *ENDED)

        assert job["status"] == "succeeded"
        assert job["attempt"] == 2
        assert sessions[-1] is not sessions[0]
        assert await ledger.lines() == ["begin", "begin", "end"]
        assert site.left_over() == []


async def test_the_queue_server_goes_down_and_comes_back(site: Site, tmp_path: Path) -> None:
    script = sh("for n in 1 2 3 4 5 6; do echo $n; sleep 1; done; echo x >$ARTIFACT_DIR/x")
    with queue_process(tmp_path / "q.db") as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_SECONDS) as http:
            desk = Desk(server.url, http)
            job_id = await desk.submit(site.payload(*script, publish="branch"))
            async with running(site.settings(desk.url)):
                await desk.until_said(job_id, LOG)
                server.kill()
                # The command ends meanwhile: all of its files, and its end, have to wait.
                await anyio.sleep(9)
                server.start()
                job = await desk.until(job_id, *ENDED)

                assert job["status"] == "succeeded"
                assert job["attempt"] == 1
                assert await completions(desk, job_id) == ["worker-1"]
                assert (await desk.artifacts(job_id))["container/x"] == b"x\n"
                # And it claims again.
                after = await desk.submit(site.payload("true"))
                assert (await desk.until(after, *ENDED))["status"] == "succeeded"


async def test_an_outage_longer_than_the_lease_stops_the_command_and_reports_nothing(
    site: Site, ledger: Ledger, tmp_path: Path
) -> None:
    script = sh(FIRST_TIME_STAYS.format(600))
    with queue_process(tmp_path / "q.db") as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_SECONDS) as http:
            desk = Desk(server.url, http)
            job_id = await desk.submit(site.payload(*script, cacheVolumes=ledger.volumes))
            async with running(site.settings(desk.url, lease_seconds=3)):
                await desk.until_said(job_id, LOG)
                server.kill()
                with anyio.fail_after(WAIT_SECONDS):
                    while site.left_over():
                        await anyio.sleep(0.1)
                server.start()
                job = await desk.until(job_id, *ENDED)
            assert job["status"] == "succeeded"
            assert job["attempt"] == 2
            assert "Job failed" not in await desk.messages(job_id)
    assert await ledger.lines() == ["begin", "begin", "end"]


async def test_an_upload_that_is_refused_is_said_and_fails_no_job(site: Site) -> None:
    script = sh("head -c 5000 /dev/zero >$ARTIFACT_DIR/large; echo x >$ARTIFACT_DIR/small")
    rules = QueueRules(upload_limit_bytes=1000)
    async with site.desk(rules) as desk:
        job_id = await desk.submit(site.payload(*script))
        async with running(site.settings(desk.url)):
            job = await desk.until(job_id, *ENDED)
        assert job["status"] == "succeeded"
        found = await desk.artifacts(job_id)
        said = [e for e in await desk.events(job_id) if e["message"] == "moonmind.task.artifacts"]
    assert "container/small" in found
    assert "container/large" not in found
    assert "artifact_too_large" in said[0]["payload"]["missing"]["container/large"]
    assert said[0]["level"] == "warn"


@pytest.mark.parametrize("passes", [True, False])
async def test_uploads_that_break_the_server_are_waited_for_a_while(
    site: Site, monkeypatch: pytest.MonkeyPatch, passes: bool
) -> None:
    async with site.desk() as desk:
        monkeypatch.setattr(uploads, "PATIENCE_SECONDS", 60 if passes else 2)
        async with open_proxy(desk.url) as proxy:
            proxy.refuse = "/artifacts/upload"
            job_id = await desk.submit(site.payload(*sh("echo x >$ARTIFACT_DIR/x")))
            async with running(site.settings(proxy.url)):
                await until(lambda: any(call.endswith("/upload") for call in proxy.calls))
                await anyio.sleep(1)
                if passes:
                    proxy.refuse = None
                job = await desk.until(job_id, *ENDED)
        assert job["status"] == "succeeded"
        assert ("container/x" in await desk.artifacts(job_id)) is passes
        assert ("moonmind.task.artifacts" in await desk.messages(job_id)) is not passes


async def test_on_a_full_disk_no_job_is_claimed_and_none_is_lost(site: Site) -> None:
    async with site.desk() as desk:
        with small_disk(site.folder / "jobs", "8m"):
            job_id = await desk.submit(site.payload("true"), max_attempts=1)
            filler = site.folder / "jobs" / "filler"
            fill(filler)
            async with running(site.settings(desk.url)):
                await anyio.sleep(1)
                assert (await desk.job(job_id))["status"] == "queued"
                filler.unlink()
                assert (await desk.until(job_id, *ENDED))["status"] == "succeeded"
            assert site.left_over() == []


@pytest.mark.parametrize("retryable", [True, False])
async def test_a_disk_that_is_full_when_the_result_comes_back_is_no_success(
    site: Site, ledger: Ledger, retryable: bool
) -> None:
    async with site.desk() as desk:
        script = sh(
            "echo begin >>/ledger/lines; head -c 20000000 /dev/urandom >$ARTIFACT_DIR/large"
        )
        payload = site.payload(*script, cacheVolumes=ledger.volumes, retryable=retryable)
        with small_disk(site.folder / "jobs", "8m"):
            job_id = await desk.submit(payload, max_attempts=2)
            async with running(site.settings(desk.url)):
                job = await desk.until(job_id, *ENDED)
            assert site.left_over() == []
        assert job["status"] == ("dead_letter" if retryable else "failed")
        assert len(await ledger.lines()) == (2 if retryable else 1)


async def test_a_clone_that_fails_gives_the_job_back(site: Site) -> None:
    async with site.desk() as desk:
        away = site.folder / "away.git"
        site.origin.path.rename(away)
        job_id = await desk.submit(site.payload("true"), max_attempts=20)
        async with running(site.settings(desk.url)):
            with anyio.fail_after(WAIT_SECONDS):
                while (await desk.job(job_id))["attempt"] < 2:
                    await anyio.sleep(0.02)
            assert "prepare failed: git clone failed" in (await desk.job(job_id))["errorMessage"]
            away.rename(site.origin.path)
            job = await desk.until(job_id, *ENDED)
        assert job["status"] == "succeeded"
        assert await starts(desk, job_id) == 1
        assert site.left_over() == []


async def test_a_branch_whose_job_was_lost_after_the_push_is_pushed_again(site: Site) -> None:
    # What is published differs from one attempt to the next, as most results do.
    payload = site.payload(
        *sh("cat /proc/uptime >published"),
        publish="branch",
        task={"git": {"newBranch": "named"}, "publish": {"mode": "branch", "commitMessage": "x"}},
    )
    async with site.desk() as desk, open_proxy(desk.url) as proxy:
        proxy.refuse = "/complete"
        job_id = await desk.submit(payload)
        async with running(site.settings(proxy.url, lease_seconds=2)):
            await until(lambda: any(call.endswith("/complete") for call in proxy.calls))
            first = site.origin.file("named", "published")
        async with running(site.settings(desk.url)):
            job = await desk.until(job_id, *ENDED)
    assert job["status"] == "succeeded"
    assert job["attempt"] == 2
    assert site.origin.file("named", "published") != first


async def test_a_worker_that_was_killed_and_started_again_cleans_up_and_runs_the_job_once_more(
    site: Site, ledger: Ledger, unique: str
) -> None:
    async with site.desk() as desk:
        script = sh(FIRST_TIME_STAYS.format(600) + f"; : {unique}")
        lease = {"MOONMIND_LEASE_SECONDS": "3"}
        job_id = await desk.submit(site.payload(*script, cacheVolumes=ledger.volumes))
        with site.process(desk.url, **lease) as worker:
            await desk.until_said(job_id, LOG)
            worker.kill()
            worker.wait(WAIT_SECONDS)
            assert site.left_over() == [site.folder / "jobs" / job_id]
            # Its command goes with it.
            await until(lambda: not processes(unique))
        assert (await desk.job(job_id))["status"] == "running"
        with site.process(desk.url, **lease) as worker:
            await until(lambda: not site.left_over() or (_is_new(site, job_id)))
            job = await desk.until(job_id, *ENDED)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(WAIT_SECONDS) == 0
        assert job["status"] == "succeeded"
        assert job["attempt"] == 2
        assert await ledger.lines() == ["begin", "begin", "end"]
        assert site.left_over() == []


async def test_a_directory_that_a_killed_worker_left_is_removed_though_its_job_does_not_come_back(
    site: Site,
) -> None:
    async with site.desk() as desk:
        job_id = await desk.submit(site.payload(*sh("echo up; sleep 600")), max_attempts=1)
        with site.process(desk.url, MOONMIND_LEASE_SECONDS="1") as worker:
            await desk.until_said(job_id, LOG)
            worker.kill()
            worker.wait(WAIT_SECONDS)
        with site.process(desk.url):
            await until(lambda: not site.left_over())
            job = await desk.until(job_id, *ENDED)
        assert job["status"] == "dead_letter"


@pytest.mark.parametrize("same_name", [False, True])
async def test_of_two_workers_one_lost_its_lease_and_only_the_other_reports(
    site: Site, ledger: Ledger, same_name: bool
) -> None:
    async with site.desk() as desk:
        script = sh(FIRST_TIME_STAYS.format(20))
        lease = 4
        others = site.folder / "others"
        others.mkdir()
        async with open_proxy(desk.url) as proxy, AsyncExitStack() as stack:
            job_id = await desk.submit(site.payload(*script, cacheVolumes=ledger.volumes))
            lost = site.settings(proxy.url, lease_seconds=lease)
            await stack.enter_async_context(running(lost, Limits(jobs=1)))
            await desk.until_said(job_id, LOG)
            proxy.cut = True
            other = site.settings(
                desk.url,
                lease_seconds=lease,
                workdir=others,
                worker_id="worker-1" if same_name else "worker-2",
            )
            await stack.enter_async_context(running(other))
            job = await desk.until(job_id, *ENDED)
            # Stopped, and its directory away, without having heard anything.
            await until(lambda: not site.left_over())
            proxy.cut = False
            said = len(await desk.events(job_id))
            await anyio.sleep(2)
            assert len(await desk.events(job_id)) == said
        assert job["status"] == "succeeded"
        assert job["attempt"] == 2
        assert await completions(desk, job_id) == [other.worker_id]
        assert await ledger.lines() == ["begin", "begin", "end"]


async def test_a_worker_whose_job_another_one_of_its_name_has_got_stops(
    site: Site, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with site.desk() as desk:
        # As after a pause of the whole machine: no clock of ours has seen the lease run out,
        # and the server takes the heartbeats, for it knows workers by their names alone.
        async with open_proxy(desk.url) as proxy:
            job_id = await desk.submit(site.payload(*sh("echo up; sleep 600")))
            lease = 3
            async with running(site.settings(proxy.url, lease_seconds=lease), Limits(jobs=1)):
                await desk.until_said(job_id, LOG)
                extend = claim_module.Claim._beat
                proxy.cut = True

                async def forever_young(self: claim_module.Claim) -> bool:
                    self._extended = anyio.current_time() + WAIT_SECONDS
                    return await extend(self)

                monkeypatch.setattr(claim_module.Claim, "_beat", forever_young)
                answer = {"job": None}
                with anyio.fail_after(WAIT_SECONDS):
                    while answer["job"] is None:
                        await anyio.sleep(0.2)
                        body = {
                            "workerId": "worker-1",
                            "leaseSeconds": 600,
                            "workerCapabilities": list(site.settings("").capabilities),
                        }
                        answer = (await desk.http.post("/api/queue/jobs/claim", json=body)).json()
                proxy.cut = False
                await until(lambda: not site.left_over())
            job = await desk.job(job_id)
        assert job["status"] == "running"
        assert job["attempt"] == 2


async def test_where_no_jobs_directory_can_be_made_no_job_is_claimed(site: Site) -> None:
    jobs, aside = site.folder / "jobs", site.folder / "aside"
    async with site.desk() as desk:
        first = await desk.submit(site.payload("true"))
        async with running(site.settings(desk.url)):
            await desk.until(first, "succeeded")
            jobs.rename(aside)
            jobs.write_text("a volume that is not mounted")
            second = await desk.submit(site.payload("true"), max_attempts=1)
            await anyio.sleep(1)
            assert (await desk.job(second))["status"] == "queued"
            jobs.unlink()
            aside.rename(jobs)
            await desk.until(second, "succeeded")


async def test_after_failures_that_are_no_jobs_fault_fewer_are_claimed(site: Site) -> None:
    site.origin.path.rename(site.folder / "moved")
    async with site.desk() as desk:
        jobs = [await desk.submit(site.payload("true"), max_attempts=3) for _ in range(10)]
        async with running(site.settings(desk.url)):
            await anyio.sleep(5)
        attempts = [(await desk.job(job_id))["attempt"] for job_id in jobs]
        # At once, 1, 3 and 7 seconds later; not all thirty in one.
        assert sum(attempts) - len(jobs) <= 4


def _no_session(*_: object, **__: object) -> NoReturn:
    raise NoEngineError("there is none")


def _is_new(site: Site, job_id: str) -> bool:
    """Whether a job's directory is one of a new attempt."""
    return not (site.folder / "jobs" / job_id / "artifacts" / "container").exists()
