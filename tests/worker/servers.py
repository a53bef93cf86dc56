"""Servers that do what the stand-in of the queue does not: hang, break off, talk nonsense."""

import asyncio
import base64
import json
import os
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from moonmind_ext.worker.metrics import Metrics
from moonmind_ext.worker.queue import Job, QueueClient, open_queue
from moonmind_ext.worker.settings import WorkerSettings
from tests.worker.support import WAIT_SECONDS

ABLE = ["git", "docker", "codex"]


@dataclass(frozen=True)
class Request:
    """What a client has asked, with lower-case names of headers."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


Respond = Callable[[Request], Awaitable[bytes | None]]
"""Gives a whole answer; None hangs up without one."""


def answer(status: int, body: bytes | str = b"", kind: str = "text/plain", **more: str) -> bytes:
    """Give an HTTP answer as it goes over the wire."""
    data = body.encode() if isinstance(body, str) else body
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(data)}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in more.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + data


def json_answer(data: object, status: int = 200) -> bytes:
    return answer(status, json.dumps(data), "application/json")


def refusal(status: int, code: str = "some_code", message: str = "no") -> bytes:
    """Give MoonMind's form of an error."""
    return json_answer({"detail": {"code": code, "message": message}}, status)


@asynccontextmanager
async def http_server(
    respond: Respond, *, port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Serve on the loopback interface; gives the base URL."""
    connections: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            # It is cancelled when the server ends, and has nothing more to say then.
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while (request := await _read_request(reader)) is not None:
                    data = await respond(request)
                    if data is None:
                        break
                    writer.write(data)
                    await writer.drain()
        finally:
            connections.discard(task)
            writer.close()

    # Connections are taken at once, though nobody may answer.
    server = await asyncio.start_server(serve, "127.0.0.1", port, ssl=tls)
    scheme = "https" if tls else "http"
    try:
        yield f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        while connections:
            for task in tuple(connections):
                task.cancel()
            await asyncio.sleep(0.01)


async def _read_request(reader: asyncio.StreamReader) -> Request | None:
    first = (await reader.readline()).decode()
    if not first:
        return None
    method, path, _ = first.split(" ", 2)
    headers: dict[str, str] = {}
    while (line := (await reader.readline()).decode().strip()) != "":
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(method, path, headers, body)


@dataclass
class Way:
    """The way to a queue, on which answers get lost and the server seems to be away.

    Attributes
    ----------
    is_away
        Connections end without an answer, and the server hears nothing.
    lost
        Ends of paths: the server hears these calls, and its answer to each gets lost.
        Once for each entry.
    asked
        Method and path of all that was asked.
    """

    target: str
    is_away: bool = False
    lost: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    _http: httpx.AsyncClient = field(init=False)

    async def respond(self, request: Request) -> bytes | None:
        self.asked.append(f"{request.method} {request.path}")
        if self.is_away:
            return None
        headers = {
            name: value
            for name, value in request.headers.items()
            if name in {"content-type", "x-moonmind-worker-token"}
        }
        found = await self._http.request(
            request.method, self.target + request.path, headers=headers, content=request.body
        )
        for end in self.lost:
            if request.path.endswith(end):
                self.lost.remove(end)
                return None
        return answer(found.status_code, found.content, found.headers["content-type"])

    def count(self, end: str) -> int:
        return sum(path.endswith(end) for path in self.asked)


@asynccontextmanager
async def open_way(target: str) -> AsyncIterator[tuple[Way, str]]:
    """Open a way to a queue; gives its URL too."""
    way = Way(target)
    async with (
        httpx.AsyncClient(timeout=WAIT_SECONDS) as way._http,
        http_server(way.respond) as url,
    ):
        yield way, url


def settings_for(url: str, **changes: Any) -> WorkerSettings:
    """Give settings for parts that need only some of them."""
    defaults: dict[str, Any] = {
        "url": url,
        "worker_id": "worker-1",
        "workdir": Path("/nowhere"),
        "capabilities": tuple(ABLE),
        "lease_seconds": 30,
    }
    return WorkerSettings(**defaults | changes)


@asynccontextmanager
async def client_of(url: str, **changes: Any) -> AsyncIterator[QueueClient]:
    """Open a worker's client of a queue."""
    async with open_queue(settings_for(url, **changes), Metrics()) as queue:
        yield queue


async def claimed(queue: QueueClient) -> Job:
    """Claim a job that must be there."""
    job = await queue.claim()
    assert job is not None
    return job


async def until(condition: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
    """Wait until something is so."""
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.01)


def certificate(folder: Path) -> Path:
    """Make a certificate for 127.0.0.1 that vouches for itself; its key is beside it."""
    path = folder / "server.pem"
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the server's certificate, is not installed")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(path.with_suffix(".key")), "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


@dataclass
class GitServer:
    """A git server on HTTPS.

    Attributes
    ----------
    refused
        How many questions came without the right credential.
    is_away
        Whether connections end without an answer.
    told
        Method and credential of every question.
    """

    url: str = ""
    refused: int = 0
    is_away: bool = False
    told: list[tuple[str, str | None]] = field(default_factory=list)

    @property
    def host(self) -> str:
        return self.url.split("/")[2]


@asynccontextmanager
async def git_server(bare: Path, tls: Path, token: str | None) -> AsyncIterator[GitServer]:
    """Serve a bare repository by git's own CGI program, to those who have the token.

    To everybody, where there is none.
    """
    config = ["git", "-C", str(bare), "config", "http.receivepack", "true"]
    subprocess.run(config, check=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls, tls.with_suffix(".key"))
    server = GitServer()
    right = f"Basic {base64.b64encode(f'x-access-token:{token}'.encode()).decode()}"

    async def respond(request: Request) -> bytes | None:
        if server.is_away:
            return None
        given = request.headers.get("authorization")
        server.told.append((request.method, given))
        if token is not None and given != right:
            server.refused += 1
            return answer(401, WWW_Authenticate='Basic realm="git"')
        path, _, query = request.path.partition("?")
        environment = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(bare.parent),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": request.method,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": request.headers.get("content-type", ""),
            "CONTENT_LENGTH": str(len(request.body)),
            "HTTP_CONTENT_ENCODING": request.headers.get("content-encoding", ""),
            "GIT_PROTOCOL": request.headers.get("git-protocol", ""),
            "REMOTE_USER": "tester",
        }
        done = await anyio.run_process(
            ["git", "http-backend"], input=request.body, env=environment, check=False
        )
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().splitlines())
        status = int(fields.get("Status", "200").split()[0])
        return answer(status, body, fields.get("Content-Type", "text/plain"))

    async with http_server(respond, tls=context) as url:
        server.url = f"{url}/{bare.name}"
        yield server
