"""What holds for the queue's jobs whatever workers and people do, in any order."""

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from moonmind_ext.queue.rules import Code, QueueError, Status
from moonmind_ext.queue.store import Store
from tests.queue.support import Clock

LEASE = 60
WORKERS = st.sampled_from(["ann", "ben"])


class Jobs(RuleBasedStateMachine):
    """Two workers, some jobs, and time that passes."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.store = Store(self.folder / "queue.db", clock=self.clock)
        self.before: dict[str, dict[str, Any]] = {}

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(target=ids, priority=st.integers(0, 2), max_attempts=st.integers(1, 3))
    def submit(self, priority: int, max_attempts: int) -> str:
        job = self.store.create("other", {}, priority=priority, max_attempts=max_attempts)
        self.before[job["id"]] = job
        return str(job["id"])

    @rule(seconds=st.sampled_from([1, 15, 31, LEASE, LEASE + 1]))
    def time_passes(self, seconds: int) -> None:
        self.clock.turn(seconds)

    @rule(worker=WORKERS)
    def claim(self, worker: str) -> None:
        # In the order of arrival, which a sort by priority keeps.
        due = [
            job
            for job in self.before.values()
            if job["status"] == "queued"
            and (job["nextAttemptAt"] is None or self.clock - job["nextAttemptAt"] >= 0)
        ]
        due.sort(key=lambda job: -job["priority"])
        given = self.store.claim(worker, LEASE)

        assert (given and given["id"]) == (due[0]["id"] if due else None)
        for before in self.before.values():
            if before["leaseExpiresAt"] and self.clock - before["leaseExpiresAt"] > 0:
                again = before["attempt"] < before["maxAttempts"]
                otherwise = "queued" if again else "dead_letter"
                after = "cancelled" if before["cancelRequestedAt"] else otherwise
                assert self.store.job(before["id"])["status"] == after

    @rule(job_id=ids, worker=WORKERS)
    def heartbeat(self, job_id: str, worker: str) -> None:
        job = self.owner_only(job_id, worker, self.store.heartbeat, LEASE)
        assert job is None or self.clock - job["leaseExpiresAt"] == -LEASE

    @rule(job_id=ids, worker=WORKERS)
    def complete(self, job_id: str, worker: str) -> None:
        job = self.owner_only(job_id, worker, self.store.complete)
        assert job is None or job["status"] == "succeeded"

    @rule(job_id=ids, worker=WORKERS)
    def fail(self, job_id: str, worker: str) -> None:
        asked = self.before[job_id]["cancelRequestedAt"]
        job = self.owner_only(job_id, worker, self.store.fail, "no")
        assert job is None or job["status"] == ("cancelled" if asked else "failed")

    @rule(job_id=ids, worker=WORKERS)
    def fail_for_now(self, job_id: str, worker: str) -> None:
        before = self.before[job_id]
        job = self.owner_only(job_id, worker, partial(self.store.fail, retryable=True), "no")
        if job is None:
            return
        if before["cancelRequestedAt"]:
            assert job["status"] == "cancelled"
        elif before["attempt"] < before["maxAttempts"]:
            assert (job["status"], job["attempt"]) == ("queued", before["attempt"] + 1)
        else:
            assert job["status"] == "dead_letter"

    @rule(job_id=ids)
    def cancel(self, job_id: str) -> None:
        before = self.before[job_id]["status"]
        if before in {"succeeded", "failed", "dead_letter"}:
            with pytest.raises(QueueError, match="too late"):
                self.store.cancel(job_id)
            return
        after = self.store.cancel(job_id)["status"]
        assert after == ("running" if before == "running" else "cancelled")

    @rule(job_id=ids, worker=WORKERS)
    def acknowledge(self, job_id: str, worker: str) -> None:
        before = self.before[job_id]
        may = before["status"] == "cancelled" or (
            before["claimedBy"] == worker and before["cancelRequestedAt"] is not None
        )
        if may:
            assert self.store.acknowledge(job_id, worker)["status"] == "cancelled"
        else:
            with pytest.raises(QueueError):
                self.store.acknowledge(job_id, worker)

    @rule()
    def the_server_starts_again(self) -> None:
        self.store.close()
        self.store = Store(self.folder / "queue.db", clock=self.clock)

    def owner_only(self, job_id: str, worker: str, call: Any, *more: Any) -> Any:
        """Make a call that looks at status and owner, and at nothing else."""
        before = self.before[job_id]
        if (before["status"], before["claimedBy"]) == ("running", worker):
            return call(job_id, worker, *more)
        with pytest.raises(QueueError) as caught:
            call(job_id, worker, *more)
        running = before["status"] == "running"
        assert caught.value.code is (Code.NOT_OWNER if running else Code.WRONG_STATE)
        return None

    @invariant()
    def every_job_is_in_one_state_and_ends_once(self) -> None:
        after = {job["id"]: job for job in self.store.jobs(1000)}
        assert after.keys() == self.before.keys()
        for job_id, before in self.before.items():
            job = after[job_id]
            status = Status(job["status"])
            if Status(before["status"]).is_end:
                assert job == before
            assert before["attempt"] <= job["attempt"] <= before["attempt"] + 1
            assert job["attempt"] <= job["maxAttempts"]
            assert (job["claimedBy"] is not None) is (status is Status.RUNNING)
            assert (job["leaseExpiresAt"] is not None) is (status is Status.RUNNING)
            assert (job["finishedAt"] is not None) is status.is_end
            assert job["nextAttemptAt"] is None or status is Status.QUEUED
            assert job["cancelRequestedAt"] is None or status is not Status.QUEUED
            self.before[job_id] = job


TestJobs = Jobs.TestCase
TestJobs.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
