"""A repository to clone, a queue to serve, and workers to run: all of them real."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import httpx

from moonmind_ext.queue.rules import QueueRules, Row
from moonmind_ext.queue.server import serve_queue
from moonmind_ext.run.events import LOG
from moonmind_ext.worker.service import End, Limits, run_worker
from moonmind_ext.worker.settings import WorkerSettings
from pipelines.concurrency import task_group
from tests.engines import Engine

AT_ONCE = QueueRules(sweep_delay_seconds=0, retry_base_seconds=0)
"""A queue that gives a job out again without letting anybody wait."""

WAIT_SECONDS = 60
"""For anything that a test waits for; on two busy cores most takes a second."""


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=Tester", "-c", "user.email=tester@example.org"]
    command = ["git", *names, *arguments]
    result = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return result.stdout.strip()


@dataclass(frozen=True)
class Origin:
    """A bare repository that git finds under `https://github.com/acme/widgets.git`."""

    path: Path
    config: Path

    def branches(self) -> list[str]:
        names = git(self.path, "for-each-ref", "--format=%(refname:short)", "refs/heads")
        return names.splitlines()

    def file(self, branch: str, name: str) -> str:
        return git(self.path, "show", f"{branch}:{name}")


def make_origin(folder: Path) -> Origin:
    """Make a repository `acme/widgets` with one commit, and git's settings to find it."""
    seed, bare, config = folder / "seed", folder / "origin.git", folder / "gitconfig"
    seed.mkdir()
    git(seed, "init", "--quiet", "--initial-branch=main")
    (seed / "README.md").write_text("# widgets\n")
    git(seed, "add", "--all")
    git(seed, "commit", "--quiet", "--message=one")
    git(folder, "clone", "--quiet", "--bare", str(seed), str(bare))
    config.write_text(
        f'[url "file://{bare}"]\n\tinsteadOf = https://github.com/acme/widgets.git\n'
        '[protocol "file"]\n\tallow = always\n'
    )
    return Origin(bare, config)


def payload(
    image: str, *command: str, publish: str = "none", task: Row | None = None, **container: Any
) -> Row:
    """Give a payload with a container task on `acme/widgets`."""
    spec = {"enabled": True, "image": image, "command": list(command), **container}
    return {
        "repository": "acme/widgets",
        "task": {
            "instructions": "Run it.",
            "publish": {"mode": publish},
            "container": spec,
            **(task or {}),
        },
    }


@dataclass
class Desk:
    """The queue as its users see it."""

    url: str
    http: httpx.AsyncClient = field(repr=False)

    async def submit(self, payload: Any, *, kind: str = "task", max_attempts: int = 3) -> str:
        body = {"type": kind, "payload": payload, "maxAttempts": max_attempts}
        answer = await self.http.post("/api/queue/jobs", json=body)
        assert answer.is_success, answer.text
        return str(answer.json()["id"])

    async def job(self, job_id: str) -> Row:
        answer = await self.http.get(f"/api/queue/jobs/{job_id}")
        result: Row = answer.raise_for_status().json()
        return result

    async def events(self, job_id: str) -> list[Row]:
        items: list[Row] = []
        while True:
            after = {"after": items[-1]["createdAt"]} if items else {}
            path = f"/api/queue/jobs/{job_id}/events"
            answer = await self.http.get(path, params={"limit": 200, **after})
            found = answer.raise_for_status().json()["items"]
            if not found:
                return items
            items += found

    async def messages(self, job_id: str) -> list[str]:
        return [event["message"] for event in await self.events(job_id)]

    async def live(self, job_id: str) -> str:
        events = await self.events(job_id)
        return "".join(event["payload"]["text"] for event in events if event["message"] == LOG)

    async def artifacts(self, job_id: str) -> dict[str, bytes]:
        answer = await self.http.get(f"/api/queue/jobs/{job_id}/artifacts")
        found: dict[str, bytes] = {}
        for item in answer.raise_for_status().json()["items"]:
            path = f"/api/queue/jobs/{job_id}/artifacts/{item['id']}/download"
            found.setdefault(item["name"], (await self.http.get(path)).raise_for_status().content)
        return found

    async def cancel(self, job_id: str) -> None:
        (await self.http.post(f"/api/queue/jobs/{job_id}/cancel", json={})).raise_for_status()

    async def until(self, job_id: str, *statuses: str) -> Row:
        """Wait until a job has one of these."""
        with anyio.fail_after(WAIT_SECONDS):
            while (job := await self.job(job_id))["status"] not in statuses:
                await anyio.sleep(0.05)
        return job

    async def until_said(self, job_id: str, message: str) -> None:
        """Wait until a job has an event."""
        with anyio.fail_after(WAIT_SECONDS):
            while message not in await self.messages(job_id):
                await anyio.sleep(0.05)


@asynccontextmanager
async def open_desk(db: Path, rules: QueueRules = AT_ONCE, *, port: int = 0) -> AsyncIterator[Desk]:
    """Serve a queue in this process, and speak to it."""
    async with (
        serve_queue(db, rules, port=port) as url,
        httpx.AsyncClient(base_url=url, timeout=WAIT_SECONDS) as http,
    ):
        yield Desk(url, http)


@dataclass
class RunningWorker:
    """A worker in this process."""

    draining: anyio.Event = field(default_factory=anyio.Event)
    ended: anyio.Event = field(default_factory=anyio.Event)
    end: End | None = None

    async def drain(self) -> End | None:
        """Let it come to its end."""
        self.draining.set()
        with anyio.fail_after(WAIT_SECONDS):
            await self.ended.wait()
        return self.end


@asynccontextmanager
async def running(
    settings: WorkerSettings, limits: Limits | None = None, *, metrics_port: int | None = None
) -> AsyncIterator[RunningWorker]:
    """Run a worker in this process while the context lasts; then it is stopped at once."""
    worker = RunningWorker()

    async def run() -> None:
        worker.end = await run_worker(
            settings, worker.draining, limits=limits, metrics_port=metrics_port
        )
        worker.ended.set()

    async with task_group() as tasks:
        tasks.start_soon(run)
        yield worker
        tasks.cancel_scope.cancel()


@dataclass(frozen=True)
class Site:
    """Where a worker works: its directory, a repository, an engine."""

    folder: Path
    origin: Origin
    engine: Engine

    def settings(self, url: str, **changes: Any) -> WorkerSettings:
        settings = WorkerSettings(
            url=url,
            worker_id="worker-1",
            workdir=self.folder / "jobs",
            engine=self.engine.choice,
            helper_image=self.engine.image("busybox"),
            poll_seconds=0.05,
            lease_seconds=30,
        )
        return replace(settings, **changes)

    def desk(self, rules: QueueRules = AT_ONCE) -> "Any":
        return open_desk(self.folder / "queue.db", rules)

    def payload(self, *command: str, **fields: Any) -> Row:
        return payload(self.engine.image("base"), *command, **fields)

    def left_over(self) -> list[Path]:
        """What the worker's jobs have left on disk."""
        return sorted((self.folder / "jobs").iterdir())

    @contextmanager
    def process(
        self, url: str, *options: str, **variables: str
    ) -> "Iterator[subprocess.Popen[str]]":
        """A worker as a process of its own; what is left of it is killed."""
        command = [sys.executable, "-m", "moonmind_ext.cli", "worker", *options]
        environment = {
            **{name: text for name, text in os.environ.items() if not name.startswith("MOONMIND_")},
            "MOONMIND_URL": url,
            "MOONMIND_WORKER_ID": "worker-1",
            "MOONMIND_WORKDIR": str(self.folder / "jobs"),
            "MOONMIND_WORKER_ENGINE": self.engine.choice.value,
            "MOONMIND_HELPER_IMAGE": self.engine.image("busybox"),
            "MOONMIND_POLL_INTERVAL_MS": "50",
            "GIT_CONFIG_GLOBAL": str(self.origin.config),
            "NO_COLOR": "1",
            **variables,
        }
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                process.send_signal(signal.SIGKILL)
