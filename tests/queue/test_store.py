"""The rules of the queue, with a clock of our own."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from moonmind_ext.queue.rules import Code, QueueError, QueueRules
from moonmind_ext.queue.store import Store
from moonmind_ext.run.events import Level
from tests.queue.support import OTHER_PAYLOAD, Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    store = Store(tmp_path / "queue.db", clock=clock)
    yield store
    store.close()


def create(store: Store, **given: Any) -> str:
    payload = {"requiredCapabilities": given.pop("needs", [])}
    return str(store.create(given.pop("kind", "other"), payload, **given)["id"])


def claimed(store: Store, worker: str = "w", lease: float = 60, **given: Any) -> str:
    """A new job that a worker has."""
    job_id = create(store, **given)
    job = store.claim(worker, lease)
    assert job is not None
    assert job["id"] == job_id
    return job_id


def refused(call: Any, *arguments: Any, **named: Any) -> Code:
    with pytest.raises(QueueError) as caught:
        call(*arguments, **named)
    return caught.value.code


def messages(store: Store, job_id: str) -> list[str]:
    return [event["message"] for event in store.events(job_id)]


def test_a_new_job_waits_for_its_first_attempt(store: Store) -> None:
    job = store.create("other", OTHER_PAYLOAD, priority=3, max_attempts=2, affinity_key="k")

    assert job["status"] == "queued"
    assert (job["attempt"], job["maxAttempts"], job["priority"]) == (1, 2, 3)
    assert job["payload"] == OTHER_PAYLOAD
    assert job["claimedBy"] is job["leaseExpiresAt"] is job["startedAt"] is None
    assert store.job(job["id"]) == job
    assert store.jobs() == [job]


def test_the_highest_priority_goes_first_and_then_the_oldest(store: Store, clock: Clock) -> None:
    ids = [create(store, priority=priority) for priority in (0, 5, 0, 5, -1)]
    # Even where the clock went back meanwhile.
    clock.turn(-100)
    ids.append(create(store, priority=5))

    order = []
    while job := store.claim("w", 60):
        order.append(ids.index(job["id"]))
    assert order == [1, 3, 5, 0, 2, 4]


@pytest.mark.parametrize(
    ("needs", "has", "given"),
    [
        ([], [], True),
        (["git"], [], False),
        (["git"], ["git"], True),
        (["git", "docker"], ["git"], False),
        (["git", "docker"], ["docker", "gpu", "git"], True),
        (["Git "], ["git"], True),
        (["git"], [" GIT"], True),
    ],
)
def test_a_job_is_given_to_a_worker_that_has_all_it_needs(
    store: Store, needs: list[str], has: list[str], given: bool
) -> None:
    create(store, needs=needs)
    assert (store.claim("w", 60, capabilities=has) is not None) is given


def test_a_job_that_nobody_can_do_holds_up_no_other(store: Store) -> None:
    create(store, needs=["gpu"], priority=9)
    create(store, kind="strange", priority=8)
    easy = create(store)

    job = store.claim("w", 60, types=["other"], capabilities=["git"])
    assert job is not None
    assert job["id"] == easy


def test_a_claimed_job_is_its_workers(store: Store, clock: Clock) -> None:
    job = store.job(claimed(store, "w", lease=60))

    assert (job["status"], job["claimedBy"]) == ("running", "w")
    assert clock - job["leaseExpiresAt"] == -60
    assert clock - job["startedAt"] == 0
    assert store.claim("v", 60) is None


def test_a_heartbeat_extends_the_lease_and_writes_one_event(store: Store, clock: Clock) -> None:
    job_id = claimed(store, lease=60)
    clock.turn(50)
    job = store.heartbeat(job_id, "w", 60)

    assert clock - job["leaseExpiresAt"] == -60
    assert messages(store, job_id) == ["Job queued", "Job claimed", "Heartbeat received"]
    clock.turn(50)
    assert store.claim("v", 60) is None


def test_a_lease_that_ran_out_is_noticed_by_nobody_but_a_claim(store: Store, clock: Clock) -> None:
    job_id = claimed(store, lease=60)
    clock.turn(3600)

    assert store.job(job_id)["status"] == "running"
    assert store.heartbeat(job_id, "w", 60)["status"] == "running"
    clock.turn(61)
    assert store.complete(job_id, "w", "late")["status"] == "succeeded"


def test_a_job_whose_lease_ran_out_waits_30_seconds_and_is_done_again(
    store: Store, clock: Clock
) -> None:
    job_id = claimed(store, "w", lease=60)
    began = store.job(job_id)["startedAt"]
    before = messages(store, job_id)
    clock.turn(60)
    assert store.claim("v", 60) is None
    assert store.job(job_id)["status"] == "running"
    clock.turn(1)

    assert store.claim("v", 60) is None
    job = store.job(job_id)
    assert (job["status"], job["attempt"], job["claimedBy"]) == ("queued", 2, None)
    assert clock - job["nextAttemptAt"] == -30
    # Nothing tells of it.
    assert messages(store, job_id) == before
    clock.turn(29)
    assert store.claim("v", 60) is None
    clock.turn(1)
    again = store.claim("v", 60)
    assert again is not None
    assert (again["attempt"], again["claimedBy"], again["startedAt"]) == (2, "v", began)
    assert refused(store.complete, job_id, "w") is Code.NOT_OWNER


def test_a_job_whose_last_lease_ran_out_is_dead(store: Store, clock: Clock) -> None:
    job_id = claimed(store, lease=60, max_attempts=1)
    clock.turn(61)

    assert store.claim("v", 60) is None
    job = store.job(job_id)
    assert job["status"] == "dead_letter"
    assert "lease" in job["errorMessage"]
    assert clock - job["finishedAt"] == 0


def test_a_retryable_failure_waits_twice_as_long_every_time(store: Store, clock: Clock) -> None:
    job_id = create(store, max_attempts=9)
    waits = []
    while (job := store.claim("w", 60)) is not None:
        job = store.fail(job_id, "w", "the engine went away", retryable=True)
        if job["status"] != "queued":
            break
        waits.append(-(clock - job["nextAttemptAt"]))
        clock.turn(waits[-1])

    assert waits == [15, 30, 60, 120, 240, 480, 600, 600]
    assert job is not None
    assert (job["status"], job["attempt"]) == ("dead_letter", 9)
    assert job["errorMessage"] == "the engine went away"


def test_a_job_with_thousands_of_attempts_waits_no_longer_than_the_longest(
    store: Store, clock: Clock
) -> None:
    job_id = create(store, max_attempts=1200)
    for _ in range(1100):
        assert store.claim("w", 60) is not None
        job = store.fail(job_id, "w", "no", retryable=True)
        clock.turn(600)
    assert clock - job["nextAttemptAt"] == 0


def test_a_failure_that_is_final_ends_the_job(store: Store) -> None:
    job = store.fail(claimed(store), "w", "tests failed")

    assert (job["status"], job["errorMessage"]) == ("failed", "tests failed")
    assert store.claim("w", 60) is None


@pytest.mark.parametrize("end", ["complete", "fail", "cancel and acknowledge"])
def test_what_ended_cannot_end_again(store: Store, end: str) -> None:
    job_id = claimed(store)
    if end == "complete":
        ended = store.complete(job_id, "w", "done")
    elif end == "fail":
        ended = store.fail(job_id, "w", "no")
    else:
        store.cancel(job_id)
        ended = store.acknowledge(job_id, "w")

    assert refused(store.complete, job_id, "w") is Code.WRONG_STATE
    assert refused(store.fail, job_id, "w", "no") is Code.WRONG_STATE
    assert refused(store.heartbeat, job_id, "w", 60) is Code.WRONG_STATE
    assert store.job(job_id) == ended


@pytest.mark.parametrize("call", ["heartbeat", "complete", "fail", "acknowledge"])
def test_only_the_owner_speaks_for_a_job(store: Store, call: str) -> None:
    job_id = claimed(store, "w")
    store.cancel(job_id)
    more: list[Any] = {"heartbeat": [60], "fail": ["no"]}.get(call, [])  # type: ignore[assignment]

    assert refused(getattr(store, call), job_id, "v", *more) is Code.NOT_OWNER
    assert store.job(job_id)["status"] == "running"


def test_a_waiting_job_is_cancelled_at_once(store: Store) -> None:
    job = store.cancel(create(store), "not needed")

    assert (job["status"], job["cancelReason"]) == ("cancelled", "not needed")
    assert store.claim("w", 60) is None
    assert store.cancel(job["id"], "again") == job


def test_a_running_job_is_only_asked_to_stop(store: Store, clock: Clock) -> None:
    job_id = claimed(store)
    asked = store.cancel(job_id, "not needed")
    clock.turn(5)

    assert asked["status"] == "running"
    assert store.cancel(job_id, "again") == asked
    assert store.heartbeat(job_id, "w", 60)["cancelRequestedAt"] == asked["cancelRequestedAt"]
    assert store.acknowledge(job_id, "w", "stopped")["status"] == "cancelled"
    # As often as the worker likes.
    assert store.acknowledge(job_id, "w")["status"] == "cancelled"


def test_nobody_acknowledges_what_was_not_asked(store: Store) -> None:
    assert refused(store.acknowledge, claimed(store), "w") is Code.WRONG_STATE


def test_a_job_that_completes_wins_over_its_cancellation(store: Store) -> None:
    job_id = claimed(store)
    store.cancel(job_id)

    assert store.complete(job_id, "w")["status"] == "succeeded"
    assert refused(store.cancel, job_id) is Code.WRONG_STATE


@pytest.mark.parametrize("retryable", [True, False])
def test_a_failure_of_a_job_that_was_to_stop_ends_it_as_cancelled(
    store: Store, retryable: bool
) -> None:
    job_id = claimed(store)
    store.cancel(job_id)

    job = store.fail(job_id, "w", "killed", retryable=retryable)
    assert (job["status"], job["attempt"], job["errorMessage"]) == ("cancelled", 1, "killed")


def test_a_lease_that_ran_out_ends_a_job_that_was_to_stop(store: Store, clock: Clock) -> None:
    job_id = claimed(store, lease=60)
    store.cancel(job_id)
    clock.turn(61)
    store.claim("v", 60)

    assert store.job(job_id)["status"] == "cancelled"


def test_a_job_that_waits_for_its_next_attempt_is_cancelled_at_once(store: Store) -> None:
    job_id = claimed(store)
    store.fail(job_id, "w", "no", retryable=True)
    assert store.cancel(job_id)["status"] == "cancelled"


def test_events_of_one_moment_keep_their_order_and_have_times_of_their_own(store: Store) -> None:
    job_id = create(store)
    for number in range(450):
        store.append(job_id, Level.INFO, f"event {number}", {"number": number})

    found, after = [], None
    while page := store.events(job_id, after=after):
        found += page
        after = datetime.fromisoformat(page[-1]["createdAt"])
    assert [event["message"] for event in found] == [
        "Job queued",
        *(f"event {number}" for number in range(450)),
    ]
    assert found[-1]["payload"] == {"number": 449}


def test_anybody_may_add_an_event_even_after_the_end(store: Store) -> None:
    job_id = claimed(store)
    store.complete(job_id, "w")
    store.append(job_id, Level.WARN, "a late word")

    assert messages(store, job_id)[-1] == "a late word"


def test_an_artifact_of_the_same_name_replaces_the_bytes_and_adds_a_row(store: Store) -> None:
    job_id = claimed(store)
    first = store.upload(job_id, "w", "log", b"old", content_type="text/plain", digest="sha256:x")
    second = store.upload(job_id, "w", "log", b"newer")
    store.upload(job_id, "w", "other", b"3")

    assert [row["name"] for row in store.artifacts(job_id)] == ["other", "log", "log"]
    assert [row["sizeBytes"] for row in store.artifacts(job_id)] == [1, 5, 3]
    # Nobody has checked that.
    assert first["digest"] == "sha256:x"
    for row in (first, second):
        assert store.download(job_id, row["id"]) == b"newer"


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/../../b", "..", "."])
def test_no_name_of_an_artifact_leads_out_of_the_queues_directory(
    tmp_path: Path, store: Store, name: str
) -> None:
    job_id = claimed(store)
    row = store.upload(job_id, "w", name, b"bytes")

    assert store.download(job_id, row["id"]) == b"bytes"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {tmp_path.name, "queue.db.artifacts"}


def test_artifacts_are_taken_from_the_owner_of_a_running_job_only(store: Store) -> None:
    waiting, running = create(store, priority=-1), claimed(store)
    assert refused(store.upload, waiting, "w", "log", b"1") is Code.NOT_AUTHORIZED
    assert refused(store.upload, running, "v", "log", b"1") is Code.NOT_AUTHORIZED
    store.complete(running, "w")
    assert refused(store.upload, running, "w", "log", b"1") is Code.NOT_AUTHORIZED
    assert store.artifacts(running) == []


def test_an_artifact_has_a_size_and_a_name_within_limits(tmp_path: Path) -> None:
    store = Store(tmp_path / "queue.db", QueueRules(upload_limit_bytes=3))
    job_id = claimed(store)

    store.upload(job_id, "w", "n" * 512, b"123")
    assert refused(store.upload, job_id, "w", "log", b"") is Code.INVALID
    assert refused(store.upload, job_id, "w", "log", b"1234") is Code.TOO_LARGE
    assert refused(store.upload, job_id, "w", "n" * 513, b"1") is Code.INTERNAL
    store.close()


def test_an_artifact_is_found_under_its_own_job_only(store: Store) -> None:
    one, other = claimed(store), claimed(store)
    row = store.upload(one, "w", "log", b"1")

    assert refused(store.download, other, row["id"]) is Code.NO_ARTIFACT
    assert refused(store.download, one, "no-such-artifact") is Code.NO_ARTIFACT


@pytest.mark.parametrize(
    ("call", "more"),
    [
        ("job", []),
        ("heartbeat", ["w", 60]),
        ("complete", ["w"]),
        ("fail", ["w", "no"]),
        ("cancel", []),
        ("acknowledge", ["w"]),
        ("append", [Level.INFO, "hello"]),
        ("events", []),
        ("upload", ["w", "log", b"1"]),
        ("artifacts", []),
        ("download", ["x"]),
    ],
)
def test_a_job_that_is_not_there_is_not_found(store: Store, call: str, more: list[Any]) -> None:
    assert refused(getattr(store, call), "no-such-job", *more) is Code.NO_JOB


def test_an_older_server_knows_nothing_of_cancellation(tmp_path: Path) -> None:
    store = Store(tmp_path / "queue.db", QueueRules(cancellation=False))
    job = store.job(create(store))
    assert not [key for key in job if key.startswith("cancel")]
    store.close()


def test_a_queue_that_is_opened_again_goes_on(tmp_path: Path) -> None:
    before = Store(tmp_path / "queue.db")
    job_id = claimed(before)
    row = before.upload(job_id, "w", "log", b"bytes")
    before.close()

    after = Store(tmp_path / "queue.db")
    assert after.job(job_id)["claimedBy"] == "w"
    assert after.download(job_id, row["id"]) == b"bytes"
    assert after.complete(job_id, "w")["status"] == "succeeded"
    after.close()
