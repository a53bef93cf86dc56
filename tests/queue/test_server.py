"""The queue's REST API over real HTTP, as the contract has it."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from anyio.from_thread import start_blocking_portal

from moonmind_ext.queue.rules import QueueRules
from moonmind_ext.queue.server import serve_queue
from pipelines.payload import parse_payload
from tests.queue.support import ABLE, OTHER_PAYLOAD, TASK_PAYLOAD, with_repository

WORKER_CALLS = [
    ("/claim", {"workerId": "w", "leaseSeconds": 60}),
    ("/{id}/heartbeat", {"workerId": "w", "leaseSeconds": 60}),
    ("/{id}/events", {"workerId": "w", "message": "hello"}),
    ("/{id}/complete", {"workerId": "w"}),
    ("/{id}/fail", {"workerId": "w", "errorMessage": "no"}),
    ("/{id}/cancel/ack", {"workerId": "w"}),
    ("/{id}/artifacts/upload", {}),
]


class Queue:
    """Calls of a server."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def call(self, method: str, path: str, **given: Any) -> httpx.Response:
        return self.http.request(method, f"/api/queue/jobs{path}", **given)

    def post(self, path: str, /, **body: Any) -> httpx.Response:
        return self.call("POST", path, json=body)

    def submit(self, payload: Any = TASK_PAYLOAD, kind: str = "task", **more: Any) -> str:
        response = self.post("", type=kind, payload=payload, **more)
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    def claim(self, worker: str = "w", **more: Any) -> Any:
        body = {"workerId": worker, "leaseSeconds": 60, "workerCapabilities": ABLE}
        response = self.post("/claim", **body, **more)
        assert response.status_code == 200
        assert response.json().keys() == {"job"}
        return response.json()["job"]

    def running(self) -> str:
        job_id = self.submit()
        assert (self.claim())["id"] == job_id
        return job_id

    def upload(
        self, job_id: str, data: bytes = b"bytes", name: str = "log", worker: str = "w"
    ) -> httpx.Response:
        return self.call(
            "POST",
            f"/{job_id}/artifacts/upload",
            data={"name": name, "workerId": worker, "digest": "sha256:unchecked"},
            files={"file": ("local-name", data, "text/plain")},
        )

    def get(self, path: str, **query: Any) -> Any:
        response = self.call("GET", path, params=query)
        assert response.status_code == 200, response.text
        return response.json()


@contextmanager
def a_queue(folder: Path, rules: QueueRules | None = None) -> Iterator[Queue]:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(serve_queue(folder / "queue.db", rules)) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as http,
    ):
        yield Queue(http)


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    with a_queue(tmp_path) as queue:
        yield queue


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Queue]:
    """One server for the many calls that are refused."""
    with a_queue(tmp_path_factory.mktemp("queue")) as queue:
        yield queue


def code(response: httpx.Response) -> tuple[int, str]:
    detail = response.json()["detail"]
    assert detail.keys() == {"code", "message"}
    assert detail["message"]
    return response.status_code, detail["code"]


def test_a_submitted_task_is_stored_in_its_canonical_form(queue: Queue) -> None:
    response = queue.post("", type="task", payload=TASK_PAYLOAD, priority=2, maxAttempts=5)
    job = response.json()

    assert response.status_code == 201
    assert job["payload"] == parse_payload(TASK_PAYLOAD).canonical()
    assert (job["type"], job["status"]) == ("task", "queued")
    assert (job["priority"], job["attempt"], job["maxAttempts"]) == (2, 1, 5)
    assert job.keys() >= {
        *("id", "type", "status", "priority", "payload", "attempt", "maxAttempts", "claimedBy"),
        *("leaseExpiresAt", "nextAttemptAt", "resultSummary", "errorMessage", "artifactsPath"),
        *("startedAt", "finishedAt", "createdAt", "updatedAt", "cancelRequestedAt"),
    }
    assert datetime.fromisoformat(job["createdAt"]).tzinfo is not None
    assert queue.get(f"/{job['id']}") == job
    assert queue.get("") == {"items": [job]}


def test_jobs_of_other_types_and_tasks_without_a_container_are_taken(queue: Queue) -> None:
    task = {"repository": "acme/widgets", "task": {"instructions": "Think."}}
    plain = queue.submit(task)
    other = queue.submit(OTHER_PAYLOAD, "codex_exec")

    assert queue.get(f"/{plain}")["payload"] == parse_payload(task).canonical()
    assert queue.get(f"/{other}")["payload"] == OTHER_PAYLOAD


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"type": "task", "payload": {}}, "task is required"),
        ({"type": "task", "payload": with_repository("/srv/git/x")}, "repository"),
        ({"type": "task", "payload": with_repository("file:///srv/x")}, "repository"),
        ({"type": "task", "payload": with_repository("https://example.org")}, "repository"),
        ({"type": "task", "payload": with_repository("https://me:pw@h/x")}, "credentials"),
        ({"type": "task"}, "payload"),
        ({"payload": {}}, "type"),
        ({"type": " ", "payload": {}}, "type"),
        ({"type": "other", "payload": []}, "payload"),
        ({"type": "other", "payload": {}, "maxAttempts": 0}, "maxAttempts"),
        ({"type": "other", "payload": {}, "priority": "high"}, "priority"),
    ],
)
def test_a_job_that_breaks_the_contract_is_refused_in_a_sentence(
    shared: Queue, body: dict[str, Any], says: str
) -> None:
    before = shared.get("")
    response = shared.post("", **body)

    assert code(response) == (422, "invalid_queue_payload")
    assert says in response.json()["detail"]["message"]
    assert shared.get("") == before


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"type": NaN}', '"\\ud800"', "[" * 9999])
def test_a_body_that_is_no_object_is_refused(shared: Queue, text: str) -> None:
    response = shared.call("POST", "", content=text)
    assert response.status_code in {422, 500}
    code(response)


@pytest.mark.parametrize(
    "repository", ["acme/widgets", "https://example.org/x.git", "git@example.org:acme/x.git"]
)
def test_what_can_be_cloned_is_taken(queue: Queue, repository: str) -> None:
    queue.submit(with_repository(repository))


def test_nothing_to_do_is_null(queue: Queue) -> None:
    assert queue.claim() is None


def test_a_claim_asks_for_types_and_says_what_the_worker_is_able_to(queue: Queue) -> None:
    other = queue.submit(OTHER_PAYLOAD, "other")
    task = queue.submit()

    assert queue.claim(allowedTypes=["strange"]) is None
    body = {"workerId": "w", "leaseSeconds": 60, "allowedTypes": ["task"]}
    for able in (None, [], ["codex", "git"]):
        response = queue.post("/claim", **body, workerCapabilities=able)
        assert response.json() == {"job": None}
    assert (queue.claim(allowedTypes=["task"]))["id"] == task
    assert (queue.claim())["id"] == other


def test_many_workers_that_claim_at_once_get_a_job_each(queue: Queue) -> None:
    ids = {queue.submit() for _ in range(20)}
    with ThreadPoolExecutor(25) as workers:
        got = list(workers.map(queue.claim, [f"w{number}" for number in range(25)]))
    assert {job["id"] for job in got if job} == ids
    assert got.count(None) == 5
    assert len({job["claimedBy"] for job in got if job}) == 20


def test_a_job_runs_to_its_end(queue: Queue) -> None:
    job_id = queue.running()
    beat = queue.post(f"/{job_id}/heartbeat", workerId="w", leaseSeconds=90)
    event = queue.post(
        f"/{job_id}/events", workerId="w", level="warn", message="hello", payload={"a": [1]}
    )
    artifact = queue.upload(job_id)
    done = queue.post(f"/{job_id}/complete", workerId="w", resultSummary="all is well")

    assert beat.json()["leaseExpiresAt"] > beat.json()["startedAt"]
    assert event.status_code == artifact.status_code == 201
    assert event.json().keys() == {"id", "jobId", "level", "message", "payload", "createdAt"}
    assert (event.json()["level"], event.json()["payload"]) == ("warn", {"a": [1]})
    assert (done.json()["status"], done.json()["resultSummary"]) == ("succeeded", "all is well")
    events = queue.get(f"/{job_id}/events")["items"]
    assert [each["message"] for each in events] == [
        *("Job queued", "Job claimed", "Heartbeat received", "hello"),
        *("Artifact uploaded", "Job completed"),
    ]
    assert events[3] == event.json()
    assert queue.get(f"/{job_id}/artifacts")["items"] == [artifact.json()]
    download = queue.call("GET", f"/{job_id}/artifacts/{artifact.json()['id']}/download")
    assert download.content == b"bytes"
    for again in ("complete", "fail"):
        response = queue.post(f"/{job_id}/{again}", workerId="w", errorMessage="no")
        assert code(response) == (409, "job_state_conflict")


def test_events_are_read_on_from_the_last_one(queue: Queue) -> None:
    job_id = queue.submit()
    for number in range(5):
        queue.post(f"/{job_id}/events", workerId="anybody", message=str(number))

    first = queue.get(f"/{job_id}/events", limit=3)["items"]
    rest = queue.get(f"/{job_id}/events", after=first[-1]["createdAt"])["items"]
    assert [event["message"] for event in first] == ["Job queued", "0", "1"]
    assert [event["message"] for event in rest] == ["2", "3", "4"]
    # The same moment, as it is written elsewhere.
    elsewhere = first[-1]["createdAt"].replace("Z", "+00:00")
    assert queue.get(f"/{job_id}/events", after=elsewhere)["items"] == rest


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 501}, {"limit": "x"}, {"after": "now"}])
def test_an_unreadable_question_is_refused(shared: Queue, query: dict[str, Any]) -> None:
    job_id = shared.running()
    response = shared.call("GET", f"/{job_id}/events", params=query)
    assert code(response) == (422, "invalid_queue_payload")


def test_a_failure_that_may_pass_puts_the_job_back(queue: Queue) -> None:
    job_id = queue.running()
    response = queue.post(f"/{job_id}/fail", workerId="w", errorMessage="engine", retryable=True)
    job = response.json()

    assert (job["status"], job["attempt"], job["errorMessage"]) == ("queued", 2, "engine")
    wait = datetime.fromisoformat(job["nextAttemptAt"]) - datetime.fromisoformat(job["updatedAt"])
    assert 14.9 < wait.total_seconds() < 15.1
    assert queue.claim() is None


def test_waits_are_as_long_as_the_rules_say(tmp_path: Path) -> None:
    rules = QueueRules(sweep_delay_seconds=0, retry_base_seconds=0, retry_max_seconds=0)
    with a_queue(tmp_path, rules) as queue:
        job_id = queue.running()
        queue.post(f"/{job_id}/fail", workerId="w", errorMessage="no", retryable=True)
        # A lease of a second, which runs out.
        response = queue.post("/claim", workerId="w", leaseSeconds=1, workerCapabilities=ABLE)
        assert response.json()["job"]["attempt"] == 2
        time.sleep(1.1)
        again = queue.claim("v")
        assert (again["id"], again["attempt"], again["claimedBy"]) == (job_id, 3, "v")


@pytest.mark.parametrize(
    ("call", "body"),
    [
        ("heartbeat", {"leaseSeconds": 60}),
        ("complete", {}),
        ("fail", {"errorMessage": "no"}),
        ("cancel/ack", {}),
    ],
)
def test_another_workers_job_is_left_alone(queue: Queue, call: str, body: dict[str, Any]) -> None:
    job_id = queue.running()
    queue.post(f"/{job_id}/cancel")
    response = queue.post(f"/{job_id}/{call}", workerId="v", **body)

    assert code(response) == (409, "job_ownership_mismatch")
    assert queue.get(f"/{job_id}")["claimedBy"] == "w"


def test_uploads_have_limits(queue: Queue) -> None:
    job_id = queue.running()
    answers = {
        "at the limit": queue.upload(job_id, b"1" * (10 << 20)),
        "above it": queue.upload(job_id, b"1" * ((10 << 20) + 1)),
        "empty": queue.upload(job_id, b""),
        "long name": queue.upload(job_id, name="n" * 513),
        "blank name": queue.upload(job_id, name=" "),
        "another worker": queue.upload(job_id, worker="v"),
        "no job": queue.upload("no-such-job"),
    }
    queue.post(f"/{job_id}/complete", workerId="w")
    answers["after the end"] = queue.upload(job_id)

    assert answers.pop("at the limit").status_code == 201
    assert {case: code(answer) for case, answer in answers.items()} == {
        "above it": (413, "artifact_too_large"),
        "empty": (422, "invalid_queue_payload"),
        "long name": (500, "queue_internal_error"),
        "blank name": (422, "invalid_queue_payload"),
        "another worker": (403, "worker_not_authorized"),
        "no job": (404, "job_not_found"),
        "after the end": (403, "worker_not_authorized"),
    }


def test_an_upload_without_a_file_is_refused(queue: Queue) -> None:
    job_id = queue.running()
    for given in ({"data": {"name": "x", "workerId": "w"}}, {"content": b"no form"}):
        response = queue.call("POST", f"/{job_id}/artifacts/upload", **given)
        assert code(response) == (422, "invalid_queue_payload")


def test_the_same_name_again_is_a_second_row_with_the_new_bytes(queue: Queue) -> None:
    job_id = queue.running()
    rows = [(queue.upload(job_id, data)).json() for data in (b"old", b"newer")]

    items = queue.get(f"/{job_id}/artifacts")["items"]
    assert items == rows[::-1]
    assert items[0].keys() == {
        *("id", "jobId", "name", "contentType", "sizeBytes", "digest", "createdAt")
    }
    assert (items[0]["contentType"], items[0]["digest"]) == ("text/plain", "sha256:unchecked")
    for row in rows:
        download = queue.call("GET", f"/{job_id}/artifacts/{row['id']}/download")
        assert download.content == b"newer"


@pytest.mark.parametrize("text", ["a\0b", "\0", "half \ud800"])
def test_what_the_database_cannot_hold_breaks_the_server(shared: Queue, text: str) -> None:
    job_id = shared.running()
    broken = (500, "queue_internal_error")
    event = {"workerId": "w", "message": "hello"}
    for call, body in [
        ("events", event | {"message": text}),
        ("events", event | {"payload": {"deep": [{"text": text}]}}),
        ("events", event | {"payload": {text: 1}}),
        ("complete", {"workerId": "w", "resultSummary": text}),
        ("fail", {"workerId": "w", "errorMessage": text}),
    ]:
        # httpx would not encode half a surrogate pair.
        response = shared.call("POST", f"/{job_id}/{call}", content=json.dumps(body))
        assert code(response) == broken, call
    assert shared.get(f"/{job_id}")["status"] == "running"


@pytest.mark.parametrize(
    ("call", "body"),
    [
        ("/claim", {"leaseSeconds": 60}),
        ("/claim", {"workerId": "w"}),
        ("/claim", {"workerId": "w", "leaseSeconds": 0}),
        ("/claim", {"workerId": " ", "leaseSeconds": 60}),
        ("/{id}/heartbeat", {"workerId": "w", "leaseSeconds": 0}),
        ("/{id}/events", {"workerId": "w"}),
        ("/{id}/events", {"workerId": "w", "message": " "}),
        ("/{id}/events", {"workerId": "w", "message": "m", "level": "loud"}),
        ("/{id}/events", {"workerId": "w", "message": "m", "payload": "text"}),
        ("/{id}/fail", {"workerId": "w"}),
        ("/{id}/fail", {"workerId": "w", "errorMessage": " "}),
        ("/{id}/complete", {}),
    ],
)
def test_a_call_without_what_it_needs_is_refused(
    shared: Queue, call: str, body: dict[str, Any]
) -> None:
    job_id = shared.running()
    response = shared.post(call.format(id=job_id), **body)
    assert code(response) == (422, "invalid_queue_payload")


def test_a_number_that_no_database_holds_breaks_the_server_and_nothing_else(
    queue: Queue,
) -> None:
    job_id = queue.running()
    response = queue.post(f"/{job_id}/heartbeat", workerId="w", leaseSeconds=10**30)

    assert code(response) == (500, "queue_internal_error")
    response = queue.post("", type="other", payload={}, priority=10**30)
    assert code(response) == (500, "queue_internal_error")
    assert len(queue.get("")["items"]) == 1


def test_a_job_that_is_not_there_is_404(queue: Queue) -> None:
    not_found = (404, "job_not_found")
    for path in ("/nope", "/nope/events", "/nope/artifacts", "/nope/artifacts/x/download"):
        assert code(queue.call("GET", path)) == not_found
    assert code(queue.post("/nope/cancel")) == not_found
    assert code(queue.post("/nope/complete", workerId="w")) == not_found
    job_id = queue.submit()
    response = queue.call("GET", f"/{job_id}/artifacts/nope/download")
    assert code(response) == (404, "artifact_not_found")


def test_a_running_job_learns_of_its_cancellation_in_its_heartbeat(queue: Queue) -> None:
    job_id = queue.running()
    early = queue.post(f"/{job_id}/cancel/ack", workerId="w")
    asked = queue.post(f"/{job_id}/cancel", reason="not needed")
    beat = queue.post(f"/{job_id}/heartbeat", workerId="w", leaseSeconds=60)
    end = queue.post(f"/{job_id}/cancel/ack", workerId="w", message="stopped")

    assert code(early) == (409, "job_state_conflict")
    assert asked.json()["status"] == beat.json()["status"] == "running"
    assert beat.json()["cancelRequestedAt"] == asked.json()["cancelRequestedAt"]
    assert end.json()["status"] == "cancelled"
    late = queue.post(f"/{job_id}/complete", workerId="w")
    assert code(late) == (409, "job_state_conflict")


def test_a_waiting_job_is_cancelled_at_once(queue: Queue) -> None:
    job_id = queue.submit()
    response = queue.post(f"/{job_id}/cancel")

    assert response.json()["status"] == "cancelled"
    assert queue.claim() is None


def test_an_older_server_does_not_know_of_cancellation(tmp_path: Path) -> None:
    with a_queue(tmp_path, QueueRules(cancellation=False)) as queue:
        job_id = queue.running()
        for call in ("cancel", "cancel/ack"):
            response = queue.post(f"/{job_id}/{call}", workerId="w")
            assert response.status_code == 404
            assert response.json() == {"detail": "Not Found"}
        assert "cancelRequestedAt" not in queue.get(f"/{job_id}")


@pytest.mark.parametrize("token", [None, "", "wrong", "sesame2", "sésame"])
def test_a_worker_without_the_token_gets_a_500_in_plain_text(
    tmp_path: Path, token: str | None
) -> None:
    with a_queue(tmp_path, QueueRules(token="sesame")) as queue:
        job_id = queue.submit()
        headers = {} if token is None else {"X-MoonMind-Worker-Token": token.encode()}
        for call, body in WORKER_CALLS:
            response = queue.call(
                "POST",
                call.format(id=job_id),
                json=body,
                headers=headers,
            )
            assert response.status_code == 500, call
            assert response.headers["content-type"].startswith("text/plain")
            assert response.text == "Internal Server Error"
        # Who submits and reads is no worker.
        assert queue.get(f"/{job_id}")["status"] == "queued"


def test_a_worker_with_the_token_is_served(tmp_path: Path) -> None:
    with a_queue(tmp_path, QueueRules(token="sesame")) as queue:
        queue.http.headers["X-MoonMind-Worker-Token"] = "sesame"
        job_id = queue.running()
        assert (queue.upload(job_id)).status_code == 201


def test_a_client_that_hangs_up_in_the_middle_leaves_nothing(
    queue: Queue, capfd: pytest.CaptureFixture[str]
) -> None:
    job_id = queue.running()
    url = queue.http.base_url
    head = f"POST /api/queue/jobs/{job_id}/artifacts/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n"
    form = "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\nContent-Disposition: form"
    with socket.create_connection((url.host, url.port or 0)) as connection:
        connection.sendall((head + form).encode())
        time.sleep(0.1)
    time.sleep(0.1)

    assert queue.get(f"/{job_id}/artifacts")["items"] == []
    assert "Traceback" not in capfd.readouterr().err
