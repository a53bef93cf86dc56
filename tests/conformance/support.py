"""What the conformance cases are written with."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from moonmind_ext.run.events import LOG, Event, Phase
from pipelines.report import RunReport


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
