"""What is between a worker and its world, to be broken; and what tells how that went."""

import os
import shlex
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import httpx
import pytest

from moonmind_ext import asgi, embedded
from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.queue.rules import Row
from tests.engines import Engine
from tests.worker.support import WAIT_SECONDS

RESTART = "MOONMIND_TEST_RESTART_ENGINE"

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class Proxy:
    """Stands between a worker and the queue, as an ASGI application.

    Attributes
    ----------
    url
        What the worker is told.
    cut
        While set, calls are neither passed on nor answered.
    refuse
        Paths that end with this are answered with a 500.
    slow
        Paths that end with this are answered only after so many seconds.
    """

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.url = ""
        self.cut = False
        self.refuse: str | None = None
        self.slow: tuple[str, float] | None = None
        self.calls: list[str] = []

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"]
        if self.cut:
            # Without an end: what is begun and not finished breaks the connection.
            await self._answer(send, 200, b"", length=1)
            return
        self.calls.append(path)
        if self.refuse is not None and path.endswith(self.refuse):
            error = b'{"detail": {"code": "queue_internal_error", "message": "no"}}'
            await self._answer(send, 500, error)
            return
        headers = [
            (name, value)
            for name, value in scope["headers"]
            if name not in {b"host", b"content-length", b"transfer-encoding"}
        ]
        query = scope["query_string"].decode()
        try:
            found = await self._http.request(
                scope["method"],
                f"{path}?{query}" if query else path,
                content=body,
                headers=headers,
            )
        except httpx.HTTPError:
            await self._answer(send, 200, b"", length=1)
            return
        if self.slow is not None and path.endswith(self.slow[0]):
            await anyio.sleep(self.slow[1])
        if self.cut:
            await self._answer(send, 200, b"", length=1)
            return
        await self._answer(send, found.status_code, found.content)

    async def _answer(
        self, send: _Send, status: int, body: bytes, *, length: int | None = None
    ) -> None:
        size = len(body) if length is None else length
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % size)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if length is None:
            await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def open_proxy(url: str) -> AsyncIterator[Proxy]:
    """Put a proxy before a queue."""
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=WAIT_SECONDS, limits=limits) as http:
        proxy = Proxy(http)
        async with asgi.serve(proxy) as port:
            proxy.url = f"http://127.0.0.1:{port}"
            yield proxy


@dataclass(frozen=True)
class Ledger:
    """A file in a cache volume, to which each start of a command adds a line.

    It is outside of the worker and of the queue, and the engine's death does not take it.
    """

    engine: Engine
    name: str

    @property
    def volumes(self) -> list[Row]:
        """For a payload's `cacheVolumes`."""
        return [{"name": self.name, "target": "/ledger"}]

    async def lines(self, name: str = "lines") -> list[str]:
        """Read it, by a command of its own."""
        script = f"cat /ledger/{name} || true"
        async with self.engine.session() as session:
            client = session.client
            volume = client.cache_volume(self.name)
            container = client.container().from_(self.engine.image("base"))
            # Engines remember what a command has printed.
            fresh = container.with_mounted_cache("/ledger", volume).with_env_variable(
                "NOW", uuid4().hex
            )
            with anyio.fail_after(WAIT_SECONDS):
                return (await fresh.with_exec(["sh", "-c", script]).stdout()).splitlines()


class EngineKiller:
    """Ends the engine of a worker in this process, as hard as can be."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._engines: list[embedded.EmbeddedEngine] = []
        self._command: str | None = None
        if engine.choice is EngineChoice.EMBEDDED:
            monkeypatch.setattr(embedded, "serve", remembering(self._engines))
        else:
            self._command = os.environ.get(RESTART)
            if not self._command:
                pytest.skip(f"{RESTART} names no command that restarts the engine")

    async def kill(self) -> None:
        """End it; where that takes a command, the engine is up again afterwards."""
        if self._command is not None:
            with anyio.fail_after(WAIT_SECONDS * 2):
                await anyio.run_process(shlex.split(self._command))
        else:
            await self._engines[-1].kill()


def remembering(engines: "list[embedded.EmbeddedEngine]") -> Callable[..., Any]:
    """Make an `embedded.serve` that keeps what it gives."""
    serve = embedded.serve

    @asynccontextmanager
    async def remember(**settings: Any) -> AsyncIterator[embedded.EmbeddedEngine]:
        async with serve(**settings) as engine:
            engines.append(engine)
            try:
                yield engine
            finally:
                engines.remove(engine)

    return remember


def processes(token: str) -> list[int]:
    """Find the processes on this host whose command line has some text."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal() and int(path.name) != os.getpid():
            with suppress(OSError):
                if token.encode() in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
    return found


def kill_sessions_of(process: int) -> int:
    """Kill the `dagger session` processes that a process has started."""
    killed = 0
    for path in Path("/proc").iterdir():
        if not path.name.isdecimal():
            continue
        with suppress(OSError, IndexError, ValueError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            words = (path / "cmdline").read_bytes().split(b"\0")
            if parent == process and words[1] == b"session":
                os.kill(int(path.name), signal.SIGKILL)
                killed += 1
    return killed


async def until(condition: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    """Wait until something is so."""
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.05)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """Mount a disk of some size at a directory; skips where that may not be."""
    if not mount_disk(path, size):
        pytest.skip("a small disk can only be mounted by root")
    try:
        yield
    finally:
        unmount_disk(path)


def mount_disk(path: Path, size: str) -> bool:
    """Mount a disk of some size, where that may be."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    return not os.geteuid() and not subprocess.run(command, check=False).returncode


def unmount_disk(path: Path) -> None:
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * (1 << 20))
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(b"\0" * 512)
