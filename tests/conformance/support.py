"""What the conformance cases are written with."""

import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.session import EngineSession, open_session
from moonmind_ext.run.events import LOG, Event, Phase
from pipelines.report import RunReport

EMBEDDED_IMAGES = {
    "base": "docker.io/library/busybox:1.36",
    "python": "docker.io/library/python:3.11-slim",
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

    def session(self) -> AbstractAsyncContextManager[EngineSession]:
        return open_session(self.choice, environment=os.environ)

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
    artifacts: Path

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


def sh(script: str) -> tuple[str, ...]:
    """Give the command that runs a shell script."""
    return ("sh", "-c", script)
