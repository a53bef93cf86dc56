"""What one queue server does differently from the next, and how each says no."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
"""A job, an event or an artifact, as it is in JSON."""

HEARTBEAT = "Heartbeat received"
"""The message of the event that each heartbeat writes."""

TASK = "task"
"""The type of job whose payload has a contract."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRules:
    """The settings of a queue server; the defaults are MoonMind's.

    Attributes
    ----------
    token
        What workers must send as `X-MoonMind-Worker-Token`; None accepts everybody.
    upload_limit_bytes
        Of one artifact.
    sweep_delay_seconds
        How long a job waits for its next attempt after its lease ran out.
    retry_base_seconds, retry_max_seconds
        How long it waits after a retryable failure: the base, doubled with every attempt.
    cancellation
        False makes an older server, which knows nothing of it.
    """

    token: str | None = None
    upload_limit_bytes: int = 10 << 20
    sweep_delay_seconds: float = 30
    retry_base_seconds: float = 15
    retry_max_seconds: float = 600
    cancellation: bool = True


class Status(StrEnum):
    """The states of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DEAD_LETTER = "dead_letter"

    @property
    def is_end(self) -> bool:
        """Whether a job in this state stays in it."""
        return self not in {Status.QUEUED, Status.RUNNING}


class Code(StrEnum):
    """Why a call is refused, in MoonMind's words."""

    NOT_AUTHORIZED = "worker_not_authorized"
    NO_JOB = "job_not_found"
    NO_ARTIFACT = "artifact_not_found"
    NOT_OWNER = "job_ownership_mismatch"
    WRONG_STATE = "job_state_conflict"
    TOO_LARGE = "artifact_too_large"
    INVALID = "invalid_queue_payload"
    INTERNAL = "queue_internal_error"


class QueueError(Exception):
    """A call that is refused."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
