"""A stand-in of MoonMind's own worker: the names and shapes that the drop-in meets.

It has MoonMind's life of a job and no more of it: a queue in memory that refuses what
the real one refuses, a checkout, the stages, and the upload that fails at the first
file which is refused.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from tests.worker.support import git

MAX_UPLOAD_BYTES = 10 << 20
MAX_NAME_LENGTH = 512


@dataclass(frozen=True, slots=True)
class ArtifactUpload:
    path: Path
    name: str
    content_type: str | None = None
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class WorkerExecutionResult:
    succeeded: bool
    summary: str | None
    error_message: str | None
    artifacts: tuple[ArtifactUpload, ...] = ()


@dataclass(frozen=True, slots=True)
class CodexWorkerConfig:
    workdir: Path
    moonmind_url: str = "http://moonmind.test"
    worker_id: str = "worker-1"
    worker_token: str | None = "token-of-the-worker"
    poll_interval_ms: int = 20
    container_default_timeout_seconds: int = 600
    vault_address: str | None = None
    vault_token: str | None = None
    vault_namespace: str | None = None
    vault_allowed_mounts: tuple[str, ...] = ("kv",)
    vault_timeout_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    id: UUID
    type: str
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PreparedTaskWorkspace:
    job_root: Path
    repo_dir: Path
    artifacts_dir: Path
    execute_log_path: Path


@dataclass(frozen=True, slots=True)
class Said:
    """An event, as the queue has it."""

    job_id: UUID
    level: str
    message: str
    payload: dict[str, Any] | None


class RefusedError(RuntimeError):
    """What the real queue answers with 413, 422 or 500."""


@dataclass
class Queue:
    """The queue's records."""

    waiting: deque[ClaimedJob] = field(default_factory=deque)
    events: list[Said] = field(default_factory=list)
    uploads: list[ArtifactUpload] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    results: dict[UUID, str] = field(default_factory=dict)
    errors: dict[UUID, str] = field(default_factory=dict)
    published: dict[UUID, list[str]] = field(default_factory=dict)

    def submit(self, payload: dict[str, Any]) -> UUID:
        job = ClaimedJob(uuid4(), "task", payload)
        self.waiting.append(job)
        return job.id

    def append_event(self, said: Said) -> None:
        if "\0" in repr(said):
            raise RefusedError("500")
        self.events.append(said)

    def upload_artifact(self, artifact: ArtifactUpload) -> None:
        artifact.path.name.encode()
        content = artifact.path.read_bytes()
        if not content or len(content) > MAX_UPLOAD_BYTES or len(artifact.name) > MAX_NAME_LENGTH:
            raise RefusedError(artifact.name)
        self.uploads.append(artifact)
        self.stored[artifact.name] = content


class CodexWorker:
    """The worker's life cycle at feature 020."""

    def __init__(self, *, config: CodexWorkerConfig, queue: Queue) -> None:
        self._config = config
        self._queue = queue

    async def run_forever(self, *, stop_event: asyncio.Event | None = None) -> None:
        stop = stop_event or asyncio.Event()
        while not stop.is_set():
            if not await self.run_once():
                await asyncio.sleep(self._config.poll_interval_ms / 1000)

    async def run_once(self) -> bool:
        if not self._queue.waiting:
            return False
        job = self._queue.waiting.popleft()
        try:
            summary = await self._do(job)
        except Exception as error:  # noqa: BLE001, as MoonMind's does
            self._queue.errors[job.id] = str(error)
        else:
            self._queue.results[job.id] = summary
        return True

    async def _do(self, job: ClaimedJob) -> str:
        # Canonical already, as the server stores it.
        payload = job.payload
        prepared = self._prepare(job)
        result = await self._run_execute_stage(
            job_id=job.id, canonical_payload=payload, prepared=prepared
        )
        staged = [*result.artifacts]
        if prepared.execute_log_path.exists():
            staged.append(ArtifactUpload(prepared.execute_log_path, "logs/execute.log"))
        status = "finished" if result.succeeded else "failed"
        await self._emit_event(
            job_id=job.id,
            level="info" if result.succeeded else "error",
            message="moonmind.task.execute",
            payload={"stage": "moonmind.task.execute", "status": status},
        )
        if result.succeeded and payload["task"].get("publish", {}).get("mode") == "branch":
            git(prepared.repo_dir, "add", "--all")
            changed = git(prepared.repo_dir, "diff", "--cached", "--name-status")
            self._queue.published[job.id] = changed.splitlines()
        for artifact in staged:
            if artifact.path.exists() and artifact.path.stat().st_size:
                self._queue.upload_artifact(artifact)
        if not result.succeeded:
            raise RuntimeError(result.error_message)
        return str(result.summary)

    def _prepare(self, job: ClaimedJob) -> PreparedTaskWorkspace:
        root = self._config.workdir / str(job.id)
        repo, artifacts = root / "repo", root / "artifacts"
        for folder in (repo, artifacts / "logs"):
            folder.mkdir(parents=True)
        git(repo, "init", "--quiet", "--initial-branch=main")
        (repo / "README.md").write_text("# widgets\n")
        (repo / "old.txt").write_text("old\n")
        git(repo, "add", "--all")
        git(repo, "commit", "--quiet", "--message=one")
        return PreparedTaskWorkspace(root, repo, artifacts, artifacts / "logs" / "execute.log")

    async def _run_execute_stage(
        self, *, job_id: UUID, canonical_payload: dict[str, Any], prepared: PreparedTaskWorkspace
    ) -> WorkerExecutionResult:
        container = canonical_payload["task"].get("container")
        if not container:
            return WorkerExecutionResult(True, "the agent has done it", None)
        return await self._run_container_execute_stage(
            job_id=job_id,
            canonical_payload=canonical_payload,
            prepared=prepared,
            container_spec=container,
        )

    async def _run_container_execute_stage(
        self,
        *,
        job_id: UUID,
        canonical_payload: dict[str, Any],
        prepared: PreparedTaskWorkspace,
        container_spec: Any,
    ) -> WorkerExecutionResult:
        raise AssertionError("docker run was to be replaced")

    async def _emit_event(
        self,
        *,
        job_id: UUID,
        level: str,
        message: str,
        payload: dict[str, Any] | None = None,
    ) -> None:
        try:
            self._queue.append_event(Said(job_id, level, message, payload))
        except RefusedError:
            return
