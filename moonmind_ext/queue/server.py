"""The queue's HTTP side: MoonMind's calls, and its answers."""

import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeAlias, TypeVar
from urllib.parse import urlsplit

import anyio.to_thread
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)
from pydantic.alias_generators import to_camel
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from moonmind_ext import asgi
from moonmind_ext.queue.rules import TASK, Code, QueueError, QueueRules, Row
from moonmind_ext.queue.store import Store
from moonmind_ext.run.events import Level
from pipelines.payload import TaskContractError, loads, parse_payload

_STATUS = {
    Code.NOT_AUTHORIZED: 403,
    Code.NO_JOB: 404,
    Code.NO_ARTIFACT: 404,
    Code.NOT_OWNER: 409,
    Code.WRONG_STATE: 409,
    Code.TOO_LARGE: 413,
    Code.INVALID: 422,
    Code.INTERNAL: 500,
}

_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
# To MoonMind, blank text was not given.
_MaybeText = Annotated[str | None, AfterValidator(lambda text: (text or "").strip() or None)]
_LeaseSeconds = Annotated[int, Field(ge=1)]

_Call: TypeAlias = Callable[[Request], Awaitable[Response]]
_Body = TypeVar("_Body", bound="_Model")
_Result = TypeVar("_Result")
_Given = ParamSpec("_Given")


class _Model(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel)


class _Submission(_Model):
    type: _Text
    priority: int = 0
    payload: dict[str, Any]
    affinity_key: _MaybeText = None
    max_attempts: Annotated[int, Field(ge=1)] = 3


class _Claim(_Model):
    worker_id: _Text
    lease_seconds: _LeaseSeconds
    allowed_types: list[str] | None = None
    worker_capabilities: list[str] | None = None


class _Heartbeat(_Model):
    worker_id: _Text
    lease_seconds: _LeaseSeconds


class _Completion(_Model):
    worker_id: _Text
    result_summary: _MaybeText = None


class _Failure(_Model):
    worker_id: _Text
    error_message: _Text
    retryable: bool = False


class _Event(_Model):
    worker_id: _Text
    level: Level = Level.INFO
    message: _Text
    payload: dict[str, Any] | None = None


class _Upload(_Model):
    worker_id: _Text
    name: _Text
    content_type: _MaybeText = None
    digest: _MaybeText = None


class _Cancellation(_Model):
    reason: _MaybeText = None


class _Acknowledgement(_Model):
    worker_id: _Text
    message: _MaybeText = None


@asynccontextmanager
async def serve_queue(
    db: Path, rules: QueueRules | None = None, *, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[str]:
    """Serve the queue that is in a file, which is made where there is none.

    Parameters
    ----------
    rules
        Default: MoonMind's.
    port
        0 takes a free one.

    Yields
    ------
    str
        The base URL; it takes connections already.
    """
    store = Store(db, rules)
    try:
        async with asgi.serve(make_app(store), host=host, port=port) as bound:
            yield f"http://[{host}]:{bound}" if ":" in host else f"http://{host}:{bound}"
    finally:
        store.close()


def make_app(store: Store) -> Starlette:
    """Make the ASGI application of a queue."""
    calls = _Calls(store)
    jobs = "/api/queue/jobs"
    job = f"{jobs}/{{job_id}}"
    worker = partial(_for_workers, store.rules.token)
    routes = [
        Route(jobs, calls.submit, methods=["POST"]),
        Route(jobs, calls.jobs, methods=["GET"]),
        Route(f"{jobs}/claim", worker(calls.claim), methods=["POST"]),
        Route(job, calls.job, methods=["GET"]),
        Route(f"{job}/heartbeat", worker(calls.heartbeat), methods=["POST"]),
        Route(f"{job}/complete", worker(calls.complete), methods=["POST"]),
        Route(f"{job}/fail", worker(calls.fail), methods=["POST"]),
        Route(f"{job}/events", worker(calls.append), methods=["POST"]),
        Route(f"{job}/events", calls.events, methods=["GET"]),
        Route(f"{job}/artifacts/upload", worker(calls.upload), methods=["POST"]),
        Route(f"{job}/artifacts", calls.artifacts, methods=["GET"]),
        Route(f"{job}/artifacts/{{artifact_id}}/download", calls.download, methods=["GET"]),
    ]
    if store.rules.cancellation:
        routes += [
            Route(f"{job}/cancel", calls.cancel, methods=["POST"]),
            Route(f"{job}/cancel/ack", worker(calls.acknowledge), methods=["POST"]),
        ]
    refusals: dict[Any, Any] = {
        QueueError: _refused,
        OverflowError: _too_large_a_number,
        HTTPException: _no_such_call,
        ClientDisconnect: _nobody_there,
    }
    return Starlette(routes=routes, exception_handlers=refusals)


class _Calls:
    """MoonMind's calls: what they take, and what they give."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def submit(self, request: Request) -> Response:
        body = await _json_body(request, _Submission)
        payload = _canonical(body.payload) if body.type == TASK else body.payload
        job = await _in_thread(
            self._store.create,
            body.type,
            payload,
            priority=body.priority,
            affinity_key=body.affinity_key,
            max_attempts=body.max_attempts,
        )
        return JSONResponse(job, 201)

    async def jobs(self, request: Request) -> Response:
        limit = _limit(request, default=50, most=200)
        return JSONResponse({"items": await _in_thread(self._store.jobs, limit)})

    async def job(self, request: Request) -> Response:
        return JSONResponse(await _in_thread(self._store.job, _job_id(request)))

    async def claim(self, request: Request) -> Response:
        body = await _json_body(request, _Claim)
        job = await _in_thread(
            self._store.claim,
            body.worker_id,
            body.lease_seconds,
            types=body.allowed_types or (),
            capabilities=body.worker_capabilities or (),
        )
        return JSONResponse({"job": job})

    async def heartbeat(self, request: Request) -> Response:
        body = await _json_body(request, _Heartbeat)
        beat = self._store.heartbeat
        return JSONResponse(
            await _in_thread(beat, _job_id(request), body.worker_id, body.lease_seconds)
        )

    async def complete(self, request: Request) -> Response:
        body = await _json_body(request, _Completion)
        complete = self._store.complete
        return JSONResponse(
            await _in_thread(complete, _job_id(request), body.worker_id, body.result_summary)
        )

    async def fail(self, request: Request) -> Response:
        body = await _json_body(request, _Failure)
        fail = partial(self._store.fail, retryable=body.retryable)
        return JSONResponse(
            await _in_thread(fail, _job_id(request), body.worker_id, body.error_message)
        )

    async def cancel(self, request: Request) -> Response:
        body = await _json_body(request, _Cancellation)
        return JSONResponse(await _in_thread(self._store.cancel, _job_id(request), body.reason))

    async def acknowledge(self, request: Request) -> Response:
        body = await _json_body(request, _Acknowledgement)
        acknowledge = self._store.acknowledge
        return JSONResponse(
            await _in_thread(acknowledge, _job_id(request), body.worker_id, body.message)
        )

    async def append(self, request: Request) -> Response:
        body = await _json_body(request, _Event)
        append = self._store.append
        return JSONResponse(
            await _in_thread(append, _job_id(request), body.level, body.message, body.payload), 201
        )

    async def events(self, request: Request) -> Response:
        after = _time(request.query_params["after"]) if "after" in request.query_params else None
        limit = _limit(request, default=200, most=500)
        events = partial(self._store.events, after=after, limit=limit)
        return JSONResponse({"items": await _in_thread(events, _job_id(request))})

    async def upload(self, request: Request) -> Response:
        async with request.form() as form:
            fields = {name: value for name, value in form.items() if isinstance(value, str)}
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise QueueError(Code.INVALID, "file is required")
            body = _checked(fields, _Upload)
            # One byte more than allowed is enough for a refusal.
            data = await file.read(self._store.rules.upload_limit_bytes + 1)
            content_type = body.content_type or file.content_type
        upload = partial(self._store.upload, content_type=content_type, digest=body.digest)
        return JSONResponse(
            await _in_thread(upload, _job_id(request), body.worker_id, body.name, data), 201
        )

    async def artifacts(self, request: Request) -> Response:
        limit = _limit(request, default=200, most=500)
        rows = await _in_thread(self._store.artifacts, _job_id(request), limit)
        return JSONResponse({"items": rows})

    async def download(self, request: Request) -> Response:
        artifact_id = request.path_params["artifact_id"]
        data = await _in_thread(self._store.download, _job_id(request), artifact_id)
        # Whatever type the upload claimed: a browser is to show nothing of a task's.
        return Response(data, media_type="application/octet-stream")


def _for_workers(token: str | None, call: _Call) -> _Call:
    """Let only those pass who have the token."""
    if token is None:
        return call

    @wraps(call)
    async def guarded(request: Request) -> Response:
        given = request.headers.get("X-MoonMind-Worker-Token", "")
        if secrets.compare_digest(given.encode(), token.encode()):
            return await call(request)
        # Not the 401 that one would expect: MoonMind's server breaks at this place.
        return PlainTextResponse("Internal Server Error", 500)

    return guarded


async def _in_thread(
    call: Callable[_Given, _Result], *args: _Given.args, **kwargs: _Given.kwargs
) -> _Result:
    """Wait for what blocks."""
    return await anyio.to_thread.run_sync(partial(call, *args, **kwargs))


async def _json_body(request: Request, model: type[_Body]) -> _Body:
    try:
        data = loads(await request.body())
    except TaskContractError as error:
        raise QueueError(Code.INVALID, str(error)) from None
    return _checked(data, model)


def _checked(data: object, model: type[_Body]) -> _Body:
    if any(re.search("[\0\ud800-\udfff]", text) for text in _texts(data)):
        # MoonMind's database takes neither, and its server does not ask before.
        raise QueueError(Code.INTERNAL, "a text has a NUL character or half a surrogate pair")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'the body'}: {each['msg']}"
            for each in error.errors(include_url=False, include_input=False)
        )
        raise QueueError(Code.INVALID, wrong) from None


def _texts(data: object) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict):
        for name, value in data.items():
            yield name
            yield from _texts(value)
    elif isinstance(data, list):
        for value in data:
            yield from _texts(value)


def _canonical(payload: Row) -> Row:
    try:
        task = parse_payload(payload)
    except TaskContractError as error:
        raise QueueError(Code.INVALID, str(error)) from None
    if not _can_be_cloned(task.repository):
        raise QueueError(
            Code.INVALID, "repository must be owner/name, https://host/path or git@host:path"
        )
    return task.canonical()


def _can_be_cloned(repository: str) -> bool:
    """Whether MoonMind clones it: no local path, no `file://`."""
    if repository.startswith(("http://", "https://")):
        url = urlsplit(repository)
        return bool(url.netloc) and url.path not in {"", "/"}
    return repository.startswith("git@") or bool(re.fullmatch(r"[\w.-]+/[\w.-]+", repository))


def _job_id(request: Request) -> str:
    return str(request.path_params["job_id"])


def _limit(request: Request, *, default: int, most: int) -> int:
    allowed: TypeAdapter[int] = TypeAdapter(Annotated[int, Field(ge=1, le=most)])
    try:
        return allowed.validate_python(request.query_params.get("limit", default))
    except ValidationError:
        raise QueueError(Code.INVALID, f"limit must be between 1 and {most}") from None


def _time(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise QueueError(Code.INVALID, "after must be a time, as in createdAt") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _refused(_: Request, error: QueueError) -> Response:
    detail = {"code": error.code.value, "message": str(error)}
    return JSONResponse({"detail": detail}, _STATUS[error.code])


def _too_large_a_number(request: Request, _: OverflowError) -> Response:
    return _refused(request, QueueError(Code.INTERNAL, "a number is too large for the database"))


def _no_such_call(_: Request, error: HTTPException) -> Response:
    return JSONResponse({"detail": error.detail}, error.status_code, error.headers)


def _nobody_there(_: Request, __: ClientDisconnect) -> Response:
    # The client hung up in the middle of its request, so nobody reads this.
    return Response(status_code=400)
