"""The same cases on every engine there is.

The embedded engine needs a sandbox. A real one is found as `moonmind-ext run` finds
it; the images it needs come from the public registries, or by the same names from
the registry in MOONMIND_TEST_REGISTRY (docs/testing.md).
"""

import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import pytest

from moonmind_ext.embedded import sandbox_problem
from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.session import NoEngineError, open_session
from moonmind_ext.run.events import LOG, Event, Phase
from moonmind_ext.run.task import RunRequest, run_task
from pipelines.payload import parse_any
from pipelines.report import RunReport

EMBEDDED_IMAGES = {
    "base": "embedded.test/base",
    "python": "embedded.test/python",
    "busybox": "embedded.test/busybox",
    "no-shell": "embedded.test/no-shell",
    "not-root": "embedded.test/not-root",
    "entrypoint": "embedded.test/entrypoint",
    "missing": "embedded.test/missing:1",
}
PUBLIC_IMAGES = {
    "base": "docker.io/library/busybox:1.36",
    "busybox": "docker.io/library/busybox:1.36",
    "python": "docker.io/library/python:3.11-slim",
    "missing": "docker.io/library/there-is-no-such-image:1",
}
REGISTRY_IMAGES = {
    "base": "busybox:1.36",
    "busybox": "busybox:1.36",
    "python": "python:3.11-slim",
    "no-shell": "no-shell:1",
    "not-root": "not-root:1",
    "entrypoint": "entrypoint:1",
    "missing": "there-is-no-such-image:1",
}


@dataclass(frozen=True)
class Engine:
    """An engine to test on."""

    choice: EngineChoice
    images: dict[str, str]

    def image(self, name: str) -> str:
        if name not in self.images:
            pytest.skip(f"the image {name!r} is only in a registry of MOONMIND_TEST_REGISTRY")
        return self.images[name]


@dataclass
class Watcher:
    """Keeps what a run said, and lets a test wait for some output."""

    events: list[Event] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    printed: anyio.Event = field(default_factory=anyio.Event)

    def event(self, event: Event) -> None:
        self.events.append(event)
        if event.message == LOG:
            self.printed.set()

    def phase_started(self, phase: Phase) -> None:
        self.phases.append(phase)

    def phase_finished(self, phase: Phase, seconds: float) -> None:
        assert seconds >= 0

    @property
    def live(self) -> str:
        return "".join(e.payload["text"] for e in self.events if e.message == LOG)


@dataclass
class Result:
    """What a run has left."""

    report: RunReport
    watcher: Watcher
    output: Path
    workspace: Path
    subdir: str

    @property
    def artifacts(self) -> Path:
        return self.output / self.subdir

    @property
    def log(self) -> bytes:
        return (self.artifacts / "logs" / "runner.log").read_bytes()

    def artifact(self, name: str) -> str:
        return (self.artifacts / name).read_text()

    def every_file(self) -> str:
        """All that a run wrote, events included, for secrets that must not be there."""
        files = [p.read_text("utf-8", "replace") for p in self.output.rglob("*") if p.is_file()]
        return "\n".join([*files, *(str(event.to_dict()) for event in self.watcher.events)])


Task = Callable[..., Awaitable[Result]]


async def _answers() -> str | None:
    try:
        async with open_session(environment=os.environ, open_seconds=30):
            return None
    except NoEngineError as error:
        return str(error).replace("\n", " ")


_real_problem: list[str | None] = []


def real_engine_problem() -> str | None:
    """Say why there is no real engine; asked once."""
    if not _real_problem:
        _real_problem.append(anyio.run(_answers))
    return _real_problem[0]


@pytest.fixture(params=["embedded", "dagger"])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "embedded":
        if problem := sandbox_problem():
            pytest.skip(f"the embedded engine cannot run here: {problem}")
        return Engine(EngineChoice.EMBEDDED, EMBEDDED_IMAGES)
    if problem := real_engine_problem():
        pytest.skip(problem)
    registry = os.environ.get("MOONMIND_TEST_REGISTRY")
    if registry:
        images = {name: f"{registry}/{image}" for name, image in REGISTRY_IMAGES.items()}
        return Engine(EngineChoice.DAGGER, images)
    return Engine(EngineChoice.DAGGER, PUBLIC_IMAGES)


@pytest.fixture
def task(engine: Engine, tmp_path: Path) -> Iterator[Task]:
    """Run a container on an engine; what is no keyword of ours is one of its fields."""

    async def run(
        *command: str,
        image: str = "base",
        files: dict[str, str] | None = None,
        secrets: dict[str, str] | None = None,
        job_id: str | None = None,
        stop: anyio.Event | None = None,
        watcher: Watcher | None = None,
        workspace: Path | None = None,
        log_limit_bytes: int = 16 << 20,
        repository: str = "acme/widgets",
        fields: dict[str, Any] | None = None,
        **more_fields: Any,
    ) -> Result:
        name = job_id or f"t-{uuid4().hex[:8]}"
        folder = workspace or tmp_path / f"workspace-{name}"
        folder.mkdir(exist_ok=True)
        for path, content in (files or {"README.md": "# widgets\n"}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content)
        output = tmp_path / f"output-{name}"
        chosen = {**(fields or {}), **more_fields}
        container = {"image": engine.image(image), "command": list(command), **chosen}
        payload = parse_any(container, repository=repository)
        watcher = watcher or Watcher()
        async with open_session(engine.choice, environment=os.environ) as session:
            report = await run_task(
                session,
                RunRequest(
                    payload=payload,
                    job_id=name,
                    workspace=folder,
                    output=output,
                    secrets=secrets or {},
                    log_limit_bytes=log_limit_bytes,
                    helper_image=engine.image("busybox"),
                ),
                watcher,
                stop=stop,
            )
        subdir = chosen.get("artifactsSubdir", "container")
        return Result(report, watcher, output, folder, subdir)

    yield run


def sh(script: str) -> tuple[str, ...]:
    """Give the command that runs a shell script."""
    return ("sh", "-c", script)
