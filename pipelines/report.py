"""What a run was: its outcome and the model of `run.json`. Pure; no Dagger import."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from pipelines.masking import MIN_SECRET_LENGTH, Masker, too_short
from pipelines.plan import Plan, reproduce_line

SCHEMA_VERSION = 1

LAST_LINE_CHARACTERS = 500
"""Of a command's last line, in an error message."""

LOG_LIMIT_BYTES = 16 << 20
"""Of one log; above it, its beginning and its end are kept. GitHub's and GitLab's own
limits are of this order; a browser still opens it, and a worker can upload it in two
parts."""

ALL_KILLED = (
    "everything in the container was killed at once (by the command itself, or for want of "
    "memory): its artifacts are lost and its log may be cut"
)

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


@dataclass(frozen=True, slots=True)
class Ending:
    """How a command ended.

    Attributes
    ----------
    exit_code
        The command's own; 128+n for a signal.
    ended_by
        What ended it, if it did not end by itself.
    started_at
        By the engine's clock.
    seconds
        How long it ran.
    cached
        Whether it ran for somebody else, earlier, and this is its result.
    """

    exit_code: int
    ended_by: Literal["timed-out", "cancelled"] | None
    started_at: datetime
    seconds: float
    cached: bool = False


def outcome_of(ending: Ending | None, failure: RunFailedError | None) -> Outcome:
    """Say how a run ended: by a failure, by its command, or stopped before that."""
    if failure is not None:
        return failure.outcome
    if ending is None or ending.ended_by == "cancelled":
        return Outcome.CANCELLED
    if ending.ended_by == "timed-out":
        return Outcome.TIMED_OUT
    return Outcome.SUCCEEDED if ending.exit_code == 0 else Outcome.COMMAND_FAILED


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a run has found out, for its report.

    Attributes
    ----------
    began
        When the run began, for one whose command never did.
    ending
        How the command ended; None when it never ran, or its end is not known.
    failure
        What ended the run before.
    reference
        The image that ran, with its digest where it is known.
    last_line
        Of the command's output.
    """

    began: datetime
    ending: Ending | None
    failure: RunFailedError | None
    engine: EngineInfo
    reference: str
    last_line: str
    timings: Timings
    workspace: WorkspaceInfo | None
    source: Source
    warnings: list[str]
    artifacts: Artifacts
    log: LogInfo
    trace_id: str


def make_report(plan: Plan, findings: Findings, masker: Masker) -> RunReport:
    """Put together what `run.json` says, masked."""
    ending, failure, mask = findings.ending, findings.failure, masker.mask
    outcome = outcome_of(ending, failure)
    exit_code = ending.exit_code if ending else None
    error = str(failure) if failure else _failure_message(outcome, plan, exit_code, findings)
    # By the engine's clock alone where the command ran: two clocks make no duration.
    began, ended = findings.began, datetime.now(UTC)
    if ending is not None:
        began, ended = ending.started_at, ending.started_at + timedelta(seconds=ending.seconds)
    return RunReport(
        job_id=plan.job_id,
        repository=plan.repository,
        container_name=plan.container_name,
        image=plan.image,
        command=[mask(token) for token in plan.command],
        command_summary=mask(plan.command_summary),
        pull_mode=plan.pull.value,
        workdir=plan.workdir,
        artifact_dir=plan.artifact_dir,
        timeout_seconds=plan.timeout_seconds,
        timed_out=outcome is Outcome.TIMED_OUT,
        exit_code=TIMED_OUT_EXIT_CODE if outcome is Outcome.TIMED_OUT else exit_code,
        started_at=began,
        finished_at=ended,
        duration_seconds=round((ended - began).total_seconds(), 3),
        error=mask(error) if error else None,
        outcome=outcome,
        retryable=failure is not None and failure.retryable and plan.retryable,
        engine=findings.engine,
        image_digest=findings.reference.partition("@")[2] or None,
        cached=ending is not None and ending.cached,
        timings=findings.timings,
        workspace=findings.workspace and _masked_workspace(findings.workspace, mask),
        source=findings.source,
        warnings=findings.warnings,
        artifacts=_masked_artifacts(findings.artifacts, mask),
        log=findings.log,
        trace_id=findings.trace_id,
        reproduce=reproduce_line(plan, image=findings.reference),
    )


_Mask = Callable[[str], str]


def _masked_artifacts(artifacts: Artifacts, mask: _Mask) -> Artifacts:
    """Mask names: commands put secrets there too."""
    files = [file.model_copy(update={"path": mask(file.path)}) for file in artifacts.files]
    return Artifacts(files=files, refused=_masked_keys(artifacts.refused, mask))


def _masked_workspace(workspace: WorkspaceInfo, mask: _Mask) -> WorkspaceInfo:
    back = workspace.written_back
    if back is None:
        return workspace
    masked = WrittenBack(
        added=[mask(path) for path in back.added],
        modified=[mask(path) for path in back.modified],
        removed=[mask(path) for path in back.removed],
        refused=_masked_keys(back.refused, mask),
    )
    return workspace.model_copy(update={"written_back": masked})


def _masked_keys(refused: dict[str, str], mask: _Mask) -> dict[str, str]:
    return {mask(path): reason for path, reason in refused.items()}


def cut_mark(total_bytes: int) -> bytes:
    """Give the line that stands where the middle of a log of so many bytes is missing."""
    return (
        f"\n[moonmind: the log limit is exceeded; of {total_bytes} bytes "
        "only the beginning and the end are kept, and this is the cut]\n"
    ).encode()


def last_line(text: str) -> str:
    """Give the last line of an output that is not blank, for an error message."""
    line = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    return line if len(line) <= LAST_LINE_CHARACTERS else line[:LAST_LINE_CHARACTERS] + "..."


def exit_status(report: RunReport) -> int:
    """Give the code to end with: the command's own, or one of sysexits.h where it never ran."""
    match report.outcome:
        case Outcome.IMAGE_UNAVAILABLE:
            return 69
        case Outcome.ENGINE_FAILED:
            return 75
        case Outcome.CANCELLED:
            return 130
        case _:
            return report.exit_code or 0


def _failure_message(
    outcome: Outcome, plan: Plan, exit_code: int | None, findings: Findings
) -> str | None:
    """Say in MoonMind's words how a command ended; None for a success."""
    match outcome:
        case Outcome.COMMAND_FAILED:
            detail = f": {findings.last_line}" if findings.last_line else ""
            return f"container command failed ({exit_code}){detail}"
        case Outcome.TIMED_OUT:
            return f"container execution timed out after {plan.timeout_seconds}s"
        case Outcome.CANCELLED:
            return "container execution was cancelled"
        case _:
            return None


def run_warnings(plan: Plan, *, hidden: Mapping[str, str], engine: EngineInfo) -> Iterator[str]:
    """Say what a plan asks for and does not get.

    Parameters
    ----------
    hidden
        The secrets, by name.
    """
    for name, value in hidden.items():
        if too_short(value):
            yield (
                f"{name} has fewer than {MIN_SECRET_LENGTH} characters: a Dagger engine takes it "
                "out of the output wherever it occurs, and nothing else is masked for it"
            )
    if plan.resources is not None:
        yield (
            "task.container.resources is not enforced: this engine has no limits for CPU and "
            "memory. The command finds the values in MOONMIND_CPUS and MOONMIND_MEMORY"
        )
    if engine.kind == "embedded":
        yield (
            f"the embedded engine pulls no images: in the place of {plan.image} the command ran "
            "on this host's own root"
        )
