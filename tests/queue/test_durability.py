"""A server that is killed, and started again on the same file."""

import os
import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.queue.support import ABLE, TASK_PAYLOAD, server_process

CLAIM = {"workerId": "w", "leaseSeconds": 600, "workerCapabilities": ABLE}


def jobs_of(url: str) -> httpx.Client:
    return httpx.Client(base_url=f"{url}/api/queue", timeout=30, trust_env=False)


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_server_goes_on_where_it_was(tmp_path: Path) -> None:
    db = tmp_path / "queue.db"
    with server_process(db) as (url, process), jobs_of(url) as http:
        for priority in (1, 2):
            body = {"type": "task", "payload": TASK_PAYLOAD, "priority": priority}
            http.post("/jobs", json=body)
        job = http.post("/jobs/claim", json=CLAIM).json()["job"]
        job_id = job["id"]
        upload = http.post(
            f"/jobs/{job_id}/artifacts/upload",
            data={"name": "log", "workerId": "w"},
            files={"file": b"bytes"},
        ).json()
        before = http.get("/jobs").json()
        events = http.get(f"/jobs/{job_id}/events").json()
        kill(process)

    with server_process(db) as (url, _), jobs_of(url) as http:
        assert http.get("/jobs").json() == before
        assert http.get(f"/jobs/{job_id}/events").json() == events
        bytes_of = http.get(f"/jobs/{job_id}/artifacts/{upload['id']}/download")
        assert bytes_of.content == b"bytes"
        # The worker has noticed nothing.
        beat = http.post(f"/jobs/{job_id}/heartbeat", json=CLAIM)
        assert beat.json()["claimedBy"] == "w"
        done = http.post(f"/jobs/{job_id}/complete", json={"workerId": "w"})
        assert done.json()["status"] == "succeeded"
        assert http.post("/jobs/claim", json=CLAIM).json()["job"]["priority"] == 1


@pytest.mark.parametrize("seed", range(3))
def test_nothing_that_was_answered_is_lost_when_the_server_is_killed_at_work(
    tmp_path: Path, seed: int
) -> None:
    db = tmp_path / "queue.db"
    said: dict[str, str] = {}

    def work(url: str, worker: str) -> None:
        # Until the server is gone, in the middle of whatever it was.
        with suppress(httpx.TransportError), jobs_of(url) as http:
            while True:
                job = http.post("/jobs", json={"type": "other", "payload": {}}).json()
                said[job["id"]] = "queued"
                job = http.post("/jobs/claim", json=CLAIM | {"workerId": worker}).json()["job"]
                said[job["id"]] = "running"
                http.post(f"/jobs/{job['id']}/complete", json={"workerId": worker})
                said[job["id"]] = "succeeded"

    with server_process(db) as (url, process), ThreadPoolExecutor(4) as workers:
        for number in range(4):
            workers.submit(work, url, f"w{number}")
        time.sleep(0.5 + random.Random(seed).random() / 2)
        kill(process)

    order = ["queued", "running", "succeeded"]
    with server_process(db) as (url, _), jobs_of(url) as http:
        assert len(said) > 10
        for job_id, status in said.items():
            found: Any = http.get(f"/jobs/{job_id}").json()
            # The last call of each worker may have been done without its answer.
            assert order.index(found["status"]) >= order.index(status)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_ends_when_it_is_told(tmp_path: Path, number: signal.Signals) -> None:
    with server_process(tmp_path / "queue.db") as (url, process), jobs_of(url) as http:
        assert http.get("/jobs").json() == {"items": []}
        os.kill(process.pid, number)
        assert process.wait(timeout=10) == 0
