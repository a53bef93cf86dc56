"""What a run says while it happens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from time import monotonic
from typing import Any, Protocol

STARTED = "moonmind.task.container.started"
FINISHED = "moonmind.task.container.finished"
LOG = "moonmind.task.container.log"


class Level(StrEnum):
    """MoonMind's levels."""

    INFO = "info"
    WARN = "warn"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Event:
    """One event, as MoonMind's queue takes it; its texts are masked already."""

    message: str
    payload: dict[str, Any]
    level: Level = Level.INFO
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def to_dict(self) -> dict[str, Any]:
        """Give it in MoonMind's own words."""
        return {
            "level": self.level.value,
            "message": self.message,
            "payload": self.payload,
            "createdAt": self.created_at.isoformat(),
        }


class Phase(StrEnum):
    """The parts of a run."""

    WORKSPACE = "workspace"
    IMAGE = "image"
    EXECUTE = "execute"
    EXPORT = "export"


class Observer(Protocol):
    """Who watches a run. Called in the event loop, so it must be quick."""

    def event(self, event: Event) -> None:
        """Take an event."""

    def phase_started(self, phase: Phase) -> None:
        """Note that a phase begins; workspace and image do so side by side."""

    def phase_finished(self, phase: Phase, seconds: float) -> None:
        """Note that a phase came to its end, well or not."""


class Stopwatch:
    """Times the phases of a run and tells its observer.

    Attributes
    ----------
    seconds
        Of each phase that was begun, rounded to milliseconds.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Time what happens in the context."""
        self._observer.phase_started(phase)
        began = monotonic()
        try:
            yield
        finally:
            seconds = round(monotonic() - began, 3)
            self.seconds[phase.value] = seconds
            self._observer.phase_finished(phase, seconds)
