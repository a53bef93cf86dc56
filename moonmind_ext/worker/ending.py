"""How a job ends: one of three calls to the queue, and the words for it. Pure."""

from dataclasses import dataclass
from enum import StrEnum

from moonmind_ext.worker.queue import Job
from pipelines.report import RunReport


class Call(StrEnum):
    """The last call of a job."""

    COMPLETE = "complete"
    FAIL = "fail"
    ACKNOWLEDGE = "acknowledge"


@dataclass(frozen=True, slots=True)
class Ending:
    """What the queue is told at a job's end.

    Attributes
    ----------
    outcome
        For the metrics: the run's, or what kept it from one.
    message
        The summary, or the error.
    retryable
        Whether the queue may give the job out again.
    """

    call: Call
    outcome: str
    message: str
    retryable: bool = False


class JobEndedError(Exception):
    """Ends a job before its last stage."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.message)
        self.ending = ending


def completed(note: str | None) -> Ending:
    """Say that all went well, in MoonMind's words."""
    summary = "container task execution completed"
    return Ending(Call.COMPLETE, "succeeded", f"{summary}; {note}" if note else summary)


def failed(outcome: str, message: str, *, retryable: bool) -> Ending:
    """Say what went wrong, and whether it may go well another time."""
    return Ending(Call.FAIL, outcome, message, retryable)


def failed_run(report: RunReport) -> Ending:
    """Say how a run failed."""
    return failed(report.outcome.value, report.error or report.outcome, retryable=report.retryable)


def cancelled() -> Ending:
    """Say that the job was stopped because somebody asked for it."""
    return Ending(Call.ACKNOWLEDGE, "cancelled", "stopped as requested")


def given_back(job: Job, why: str, *, may_repeat: bool = True) -> Ending:
    """Give a job back, which costs one of its attempts: the last one fails for good.

    Parameters
    ----------
    may_repeat
        False for a command that has begun, and by its payload must not begin again.
    """
    count = f"attempt {job.attempt} of {job.max_attempts}"
    if not may_repeat:
        message = f"{why}. The payload says retryable: false, so the job fails for good"
    elif job.is_last_attempt:
        message = f"{why}. This was {count}, the last, so the job fails for good"
    else:
        message = f"{why}. The job goes back to the queue; this used up {count}"
    retryable = may_repeat and not job.is_last_attempt
    return Ending(Call.FAIL, "given-back", message, retryable)
