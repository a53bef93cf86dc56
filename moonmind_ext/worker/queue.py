"""The queue's REST API, as a worker uses it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated, Any

import anyio
import httpx
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from pydantic.alias_generators import to_camel

from moonmind_ext.run.events import Event
from moonmind_ext.worker.metrics import Metrics
from moonmind_ext.worker.settings import TASK, WorkerSettings
from pipelines.plan import JOB_ID

REQUEST_SECONDS = 10
"""For a call without a file, from connecting to the last byte. The server answers in
milliseconds; a busy database may take seconds."""

MAX_ANSWER_BYTES = 16 << 20
"""A job with the largest payload that anybody has a use for."""

UPLOAD_SECONDS = 120
"""For one file of at most 10 MiB: a line of 1 Mbit/s makes it."""

_UNAUTHORIZED = 401
_FORBIDDEN = 403
_NOT_FOUND = 404
_CONFLICT = 409
_TOO_LARGE = 413
_PASSING = {408, 425, 429}
_SERVER_ERROR = 500


class Job(BaseModel):
    """A job, with what a worker needs of it."""

    model_config = ConfigDict(alias_generator=to_camel, frozen=True)

    id: Annotated[str, StringConstraints(pattern=f"^{JOB_ID}$")]
    type: str
    status: str = "running"
    payload: Any = None
    attempt: int = 1
    max_attempts: int = 1
    created_at: datetime | None = None
    cancel_requested_at: datetime | None = None

    @property
    def is_last_attempt(self) -> bool:
        """Whether giving it back would end it."""
        return self.attempt >= self.max_attempts


class QueueError(Exception):
    """A call that the server did not answer, or answered with no.

    Attributes
    ----------
    status
        Of the answer; None where none came.
    """

    def __init__(self, message: str, status: int | None = None, *, plain: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self._plain = plain

    @property
    def is_gone(self) -> bool:
        """Whether the job is not this worker's any more."""
        # In MoonMind's own form only: a proxy says 404 too, while the server restarts.
        return self.status in {_NOT_FOUND, _CONFLICT} and not self._plain

    @property
    def is_too_large(self) -> bool:
        """Whether a file is above the server's limit."""
        return self.status == _TOO_LARGE

    @property
    def may_be_token(self) -> bool:
        """Whether the server's answer is what it says to a wrong token.

        MoonMind answers a missing or unknown one with a 500 in plain text.
        """
        refused = self.status in {_UNAUTHORIZED, _FORBIDDEN}
        return refused or (self.status == _SERVER_ERROR and self._plain)

    @property
    def may_pass(self) -> bool:
        """Whether the same call may get through later."""
        return (
            self.status is None
            or self.status >= _SERVER_ERROR
            or self.status in _PASSING
            or (self.status == _NOT_FOUND and self._plain)
            or self.may_be_token
        )


class QueueClient:
    """Speaks to the queue in a worker's name; made by `open_queue`."""

    def __init__(self, http: httpx.AsyncClient, settings: WorkerSettings, metrics: Metrics) -> None:
        self._http = http
        self._settings = settings
        self._metrics = metrics
        self._worker = {"workerId": settings.worker_id}
        self._lease = {**self._worker, "leaseSeconds": settings.lease_seconds}

    async def claim(self) -> Job | None:
        """Take a job; None when there is nothing to do.

        Raises
        ------
        QueueError
            When the server cannot be asked, or says no.
        """
        answer = await self._post(
            "claim",
            "/claim",
            {
                **self._lease,
                "allowedTypes": [TASK],
                "workerCapabilities": list(self._settings.capabilities),
            },
        )
        job = answer.get("job") if isinstance(answer, dict) else None
        return None if job is None else self._job("claim", job)

    async def read(self, job_id: str) -> Job:
        """Ask how a job stands."""
        return self._job("read", await self._call("read", "GET", f"/{job_id}"))

    async def heartbeat(self, job_id: str) -> Job:
        """Extend the lease of a job."""
        return self._job(
            "heartbeat", await self._post("heartbeat", f"/{job_id}/heartbeat", self._lease)
        )

    async def event(self, job_id: str, event: Event) -> None:
        """Add an event to a job."""
        body = {"level": event.level.value, "message": event.message, "payload": event.payload}
        await self._post("event", f"/{job_id}/events", {**self._worker, **body})

    async def complete(self, job_id: str, summary: str) -> None:
        """End a job well."""
        await self._post(
            "complete", f"/{job_id}/complete", {**self._worker, "resultSummary": summary}
        )

    async def fail(self, job_id: str, message: str, *, retryable: bool) -> None:
        """End a job badly, or give it back."""
        body = {**self._worker, "errorMessage": message, "retryable": retryable}
        await self._post("fail", f"/{job_id}/fail", body)

    async def acknowledge(self, job_id: str, message: str) -> None:
        """End a job whose cancellation was asked for."""
        await self._post("cancel", f"/{job_id}/cancel/ack", {**self._worker, "message": message})

    async def upload(self, job_id: str, content: bytes, fields: dict[str, str]) -> None:
        """Store a file with a job.

        Parameters
        ----------
        content
            The whole file, or a part of it: 10 MiB at most by the server's limit.
        fields
            `name`, `contentType` and `digest`.

        Raises
        ------
        QueueError
            When it did not arrive.
        """
        await self._call(
            "upload",
            "POST",
            f"/{job_id}/artifacts/upload",
            seconds=UPLOAD_SECONDS,
            data=without_nul({**self._worker, **fields}),
            files={"file": ("file", content, fields["contentType"])},
        )

    async def _post(self, call: str, path: str, body: dict[str, Any]) -> Any:
        return await self._call(call, "POST", path, json=without_nul(body))

    async def _call(
        self, call: str, method: str, path: str, *, seconds: float = REQUEST_SECONDS, **content: Any
    ) -> Any:
        """Ask the server something and give its answer's JSON."""
        try:
            with anyio.fail_after(seconds):
                answer = await self._ask(method, f"/api/queue/jobs{path}", **content)
            if answer.is_success:
                return _json(answer)
            problem = _problem(answer)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError) as error:
            problem = QueueError(str(error) or f"no answer within {seconds:g}s")
        self._metrics.queue_error(call)
        hint = "; it may be the token, MOONMIND_WORKER_TOKEN" if problem.may_be_token else ""
        problem.args = (f"queue {self._settings.url}, {call}: {problem}{hint}",)
        raise problem

    async def _ask(self, method: str, path: str, **content: Any) -> httpx.Response:
        """Get an answer, unless it is larger than any of the queue's."""
        async with self._http.stream(method, path, **content) as answer:
            body = bytearray()
            async for chunk in answer.aiter_raw():
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    raise httpx.DecodingError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        # Without its headers: what is compressed all the same stays so, and is no JSON.
        return httpx.Response(answer.status_code, content=bytes(body))

    def _job(self, call: str, data: object) -> Job:
        try:
            return Job.model_validate(data)
        except ValidationError as error:
            # Its text would quote the payload.
            fields = sorted({".".join(map(str, wrong["loc"])) for wrong in error.errors()})
            self._metrics.queue_error(call)
            raise QueueError(
                f"queue {self._settings.url}, {call}: its job has no valid {', '.join(fields)}"
            ) from None


def _json(answer: httpx.Response) -> Any:
    """Read an answer; whatever is wrong with it is a ValueError."""
    try:
        return answer.json()
    except RecursionError:
        raise ValueError("the answer is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"the answer is no JSON: {error}") from None


def _problem(answer: httpx.Response) -> QueueError:
    """Say what a server's refusal says."""
    status = f"{answer.status_code} {answer.reason_phrase}"
    try:
        detail = _json(answer)["detail"]
        return QueueError(f"{status}: {detail['code']}: {detail['message']}", answer.status_code)
    except (ValueError, LookupError, TypeError):
        return QueueError(f"{status}: {answer.text[:200]}", answer.status_code, plain=True)


def without_nul(value: Any) -> Any:
    """Give JSON data that the server's database takes: no NUL, no lone surrogate.

    With one, a `fail` would be refused and the job would be running for ever.
    """
    match value:
        case str():
            return value.replace("\0", "").encode("utf-8", "replace").decode()
        case list() | tuple():
            return [without_nul(item) for item in value]
        case dict():
            return {without_nul(key): without_nul(item) for key, item in value.items()}
        case _:
            return value


@asynccontextmanager
async def open_queue(settings: WorkerSettings, metrics: Metrics) -> AsyncIterator[QueueClient]:
    """Open the way to the queue; no connection is made before the first call."""
    # Not compressed: a small answer could be any size then.
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    if settings.token:
        headers["X-MoonMind-Worker-Token"] = settings.token
    # httpx's limit is for each step of a call; the one for a whole call is ours.
    async with httpx.AsyncClient(
        base_url=settings.url, headers=headers, timeout=UPLOAD_SECONDS
    ) as http:
        yield QueueClient(http, settings, metrics)
