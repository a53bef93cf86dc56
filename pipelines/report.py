"""What a run was: its outcome and the model of `run.json`. Pure; no Dagger import."""

from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

SCHEMA_VERSION = 1

TIMED_OUT_EXIT_CODE = 124
"""As `timeout(1)` has it."""


class Outcome(StrEnum):
    """How a run ended."""

    SUCCEEDED = "succeeded"
    COMMAND_FAILED = "command-failed"
    TIMED_OUT = "timed-out"
    CANCELLED = "cancelled"
    IMAGE_UNAVAILABLE = "image-unavailable"
    INVALID_PAYLOAD = "invalid-payload"
    ENGINE_FAILED = "engine-failed"


class RunFailedError(Exception):
    """A run that ended before its command did.

    Attributes
    ----------
    outcome
        Whose failure it is: the task's, or ours.
    retryable
        Whether the same run may succeed later.
    """

    outcome: Outcome
    retryable: bool


class ImageUnavailableError(RunFailedError):
    """The registry says that there is no such image, or not for us."""

    outcome = Outcome.IMAGE_UNAVAILABLE
    retryable = False


class EngineFailedError(RunFailedError):
    """The engine, the session or the way to the registry failed; the task did not."""

    outcome = Outcome.ENGINE_FAILED
    retryable = True


def failure_message(
    outcome: Outcome, *, exit_code: int | None, timeout_seconds: int, last_line: str
) -> str | None:
    """Say in MoonMind's words how a command ended; None for a success.

    Parameters
    ----------
    outcome
        How it ended.
    exit_code
        The command's own.
    timeout_seconds
        The limit it had.
    last_line
        The last line of its output, masked.
    """
    match outcome:
        case Outcome.COMMAND_FAILED:
            detail = f": {last_line}" if last_line else ""
            return f"container command failed ({exit_code}){detail}"
        case Outcome.TIMED_OUT:
            return f"container execution timed out after {timeout_seconds}s"
        case Outcome.CANCELLED:
            return "container execution was cancelled"
        case _:
            return None


class _Model(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid")


class EngineInfo(_Model):
    """Which engine ran it."""

    kind: Literal["dagger", "embedded"]
    version: str


class Timings(_Model):
    """Seconds per phase; None for a phase that was not reached."""

    workspace: float | None = None
    image: float | None = None
    execute: float | None = None
    export: float | None = None


class WrittenBack(_Model):
    """What the command changed in the workspace, by path; `refused` with the reason."""

    added: list[str] = []
    modified: list[str] = []
    removed: list[str] = []
    refused: dict[str, str] = {}


class WorkspaceInfo(_Model):
    """What was sent, and what came back."""

    files: int | None = Field(description="None where filters choose what is sent")
    bytes: int | None
    uploaded_bytes: int | None
    written_back: WrittenBack | None = None


class Source(_Model):
    """Where the workspace stands in its repository; None where git does not say."""

    repository: str
    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None


class Artifact(_Model):
    """A file that came back."""

    path: str
    bytes: int
    sha256: str


class Artifacts(_Model):
    """What came back, and what was refused, by path with the reason."""

    files: list[Artifact] = []
    refused: dict[str, str] = {}


class LogInfo(_Model):
    """The command's output: bytes it printed, and whether the log has them all."""

    bytes: int = 0
    truncated: bool = False


class RunReport(_Model):
    """The content of `run.json`: MoonMind's keys first, then ours."""

    job_id: str
    repository: str
    container_name: str
    image: str
    command: list[str]
    command_summary: str
    pull_mode: str
    workdir: str
    artifact_dir: str
    timeout_seconds: int
    timed_out: bool
    exit_code: int | None
    started_at: datetime
    finished_at: datetime
    duration_seconds: float
    error: str | None

    schema_version: int = SCHEMA_VERSION
    outcome: Outcome
    retryable: bool = False
    engine: EngineInfo
    image_digest: str | None = None
    cached: bool = False
    timings: Timings
    workspace: WorkspaceInfo | None = None
    source: Source
    warnings: list[str] = []
    artifacts: Artifacts
    log: LogInfo
    trace_id: str
    reproduce: str

    def to_json(self) -> str:
        """Give the text of `run.json`."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"
