"""The engine's outside: HTTP, who may ask, and the life of it all."""

import base64
import json
import os
import secrets
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from anyio.abc import TaskStatus
from graphql import GraphQLSchema

from moonmind_ext import asgi
from moonmind_ext.embedded.logs import TRACE, parse_traceparent
from moonmind_ext.embedded.query import VERSION, Query
from moonmind_ext.embedded.sandbox import Sandbox, find_sandbox
from moonmind_ext.embedded.schema import answer, make_schema
from moonmind_ext.embedded.session import Session, open_session
from pipelines.concurrency import task_group

MAX_QUERY_BYTES = 256 << 20
"""Of one request: `withNewFile` carries whole files, but not a disk."""

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class SandboxUnavailableError(Exception):
    """No sandbox can be made here; the message says what is missing and what to do."""


class EmbeddedEngine:
    """An engine that runs in this process.

    Attributes
    ----------
    port
        On the loopback interface.
    token
        For basic authentication, as the user.
    version
        Of Dagger, as it answers it.
    """

    def __init__(self, port: int, app: "_App") -> None:
        self.port = port
        self.token = app.token
        self.version = VERSION
        self._app = app

    async def kill(self) -> None:
        """End at once, as a SIGKILL ends a real engine.

        Commands die, connections break, and nothing answers any more.
        """
        self._app.die()
        await self._app.gone.wait()


@asynccontextmanager
async def serve(
    *, state_dir: Path | None = None, logs_endpoint: str | None = None
) -> AsyncIterator[EmbeddedEngine]:
    """Run an engine for one session.

    Parameters
    ----------
    state_dir
        Where cache volumes last from one session to the next, and below which the
        session has its own files; default `moonmind-ext/embedded` in the user's cache.
    logs_endpoint
        The whole URL that gets OTLP/HTTP log records; None for no live logs.

    Raises
    ------
    SandboxUnavailableError
        When no sandbox can be made here.
    """
    state_dir = (state_dir or default_state_dir()).absolute()
    sandbox = await anyio.to_thread.run_sync(find_sandbox, state_dir)
    if isinstance(sandbox, str):
        raise SandboxUnavailableError(sandbox)
    app = _App()
    with _signals_for_commands():
        async with task_group() as tasks:
            port = await tasks.start(_run, app, state_dir, sandbox, logs_endpoint)
            try:
                yield EmbeddedEngine(port, app)
            finally:
                app.die()


@contextmanager
def _signals_for_commands() -> Iterator[None]:
    """Handle what this process ignores: commands would inherit that, as under `nohup … &`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
    ignored = [number for number in usual if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


async def _run(
    app: "_App",
    state_dir: Path,
    sandbox: Sandbox,
    logs_endpoint: str | None,
    *,
    task_status: TaskStatus[int],
) -> None:
    """Hold everything open until the application is dead: in its own time, or by `kill`."""
    try:
        async with (
            asgi.serve(app) as port,
            open_session(state_dir, sandbox, logs_endpoint) as session,
        ):
            app.session = session
            task_status.started(port)
            await app.dying.wait()
    finally:
        app.gone.set()


def default_state_dir() -> Path:
    """Say where an engine keeps its state when it is not told."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "moonmind-ext", "embedded")


def sandbox_problem() -> str | None:
    """Say why no sandbox can be made here; None where one can. Takes 5 s at most."""
    found = find_sandbox(default_state_dir())
    return found if isinstance(found, str) else None


class _App:
    """Answers queries over HTTP, as an ASGI application.

    Attributes
    ----------
    session
        Set before the first request can come: nobody knows the token earlier.
    dying, gone
        Whether it has been told to end, and whether nothing is left of it.
    """

    session: Session

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        self._schema: GraphQLSchema = make_schema()
        self._requests: set[anyio.CancelScope] = set()
        self.dying = anyio.Event()
        self.gone = anyio.Event()
        self._authorization = b"Basic " + base64.b64encode(f"{self.token}:".encode())

    def die(self) -> None:
        """Break every connection, and let go of everything."""
        self.dying.set()
        for scope in self._requests:
            scope.cancel()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Answer one request."""
        headers = dict(scope["headers"])
        if not secrets.compare_digest(headers.get(b"authorization", b""), self._authorization):
            await _respond(send, 401, {"errors": [{"message": "unauthorized"}]})
            return
        if scope["path"] != "/query" or scope["method"] != "POST":
            await _respond(send, 404, {"errors": [{"message": "only POST /query is here"}]})
            return
        body = await _read_body(receive)
        if body is None:
            await _respond(send, 413, {"errors": [{"message": "the query is too large"}]})
            return
        TRACE.set(parse_traceparent(headers.get(b"traceparent", b"").decode("latin-1")))
        result = await self._answer(body, receive)
        if result is None:
            await _break_connection(send)
        else:
            await _respond(send, 200, result)

    async def _answer(self, body: bytes, receive: _Receive) -> dict[str, Any] | None:
        """Work on a query as long as somebody waits; None when nobody does, or we are dead."""
        try:
            request = json.loads(body)
            query, variables = request["query"], request.get("variables")
        except (ValueError, KeyError, TypeError, AttributeError):
            return {"errors": [{"message": "this is no GraphQL request"}]}
        result: dict[str, Any] | None = None
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            self._requests.add(tasks.cancel_scope)
            try:
                if not self.dying.is_set():
                    result = await answer(self._schema, Query(self.session), query, variables)
            finally:
                self._requests.discard(tasks.cancel_scope)
                tasks.cancel_scope.cancel()
        return result


async def _read_body(receive: _Receive) -> bytes | None:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > MAX_QUERY_BYTES:
            return None
        chunks.append(chunk)
        if not message.get("more_body"):
            return b"".join(chunks)


async def _respond(send: _Send, status: int, result: dict[str, Any]) -> None:
    body = json.dumps(result).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _break_connection(send: _Send) -> None:
    """Begin an answer and leave it: the server then closes the connection."""
    headers = [(b"content-length", b"1")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
