"""What the engine tests play with: commands, an API and an image registry of their own."""

import base64
import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anyio
from graphql import build_schema, graphql_sync

MARK = "MOONMIND_TEST_MARK"
"""The variable that tells the processes of one test from all others."""

SERVES_UNTIL_TOLD = "cat >/dev/null"
"""What `dagger session` does after its line of JSON: it waits for the end of its input."""


def put_command(path: Path, *lines: str) -> str:
    """Write an executable shell script; its own PATH is the system's, whatever ours is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", "PATH=/usr/bin:/bin", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def says_address(port: int = 1, token: str = "sesame") -> str:
    return "echo '" + json.dumps({"port": port, "session_token": token}) + "'"


@dataclass
class Place:
    """Where a test's commands are, and the environment that shows nothing else."""

    bin: Path
    home: Path
    mark: str

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": str(self.bin), "HOME": str(self.home), MARK: self.mark}

    def command(self, name: str, *lines: str) -> str:
        return put_command(self.bin / name, *lines)

    def processes(self) -> dict[int, str]:
        """Those that were started with this place's environment, as pid and command."""
        return processes_with(f"{MARK}={self.mark}")

    async def empties(self, seconds: float = 5) -> bool:
        """Whether none of them is left, at once or very soon."""
        with anyio.move_on_after(seconds):
            while self.processes():
                await anyio.sleep(0.05)
        return not self.processes()

    def kill(self) -> None:
        # Again, for what was being started meanwhile.
        while found := self.processes():
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def processes_with(variable: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        # Gone meanwhile, or somebody else's. One that waits to be reaped has no variables.
        with suppress(OSError):
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(process.name)] = command.decode(errors="replace")
    return found


async def appears(path: Path, seconds: float = 30) -> str:
    """Wait for a file with something in it."""
    with anyio.fail_after(seconds):
        while not path.exists() or not path.read_text():
            await anyio.sleep(0.02)
    return path.read_text()


@contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """Serve in threads on a free port of the loopback interface."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class QuietHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        # Those who hang up first are part of the game.
        with suppress(ConnectionError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)


@dataclass
class Api:
    """A session's API with one field, `version`, and ways to misbehave."""

    port: int = 0
    token: str = "sesame"
    version: str = "v0.21.8"
    misbehaves: Callable[[QuietHandler], bool] = lambda _: False
    asked: int = 0
    hang_ends: threading.Event = field(default_factory=threading.Event)

    def hang(self, _: QuietHandler) -> bool:
        self.hang_ends.wait(60)
        return True


@contextmanager
def session_api() -> Iterator[Api]:
    schema = build_schema("type Query { version: String! }")
    api = Api()

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            api.asked += 1
            if api.misbehaves(self):
                return
            if self.headers["Authorization"] != _basic(api.token, ""):
                self.answer(401, b"no")
                return
            result = graphql_sync(schema, query["query"], {"version": api.version})
            body = json.dumps(result.formatted).encode()
            self.answer(200, body, Content_Type="application/json")

    with http_server(Handler) as api.port:
        try:
            yield api
        finally:
            api.hang_ends.set()


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@dataclass
class Registry:
    """An image registry: which tags it has, and whom it lets see them."""

    port: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    """By `name:tag`."""
    needs: str = ""
    """`token` or `basic`, as the registry's challenge."""
    users: dict[str, str] = field(default_factory=dict)
    """With their passwords; without any, everybody gets a token."""
    refuses_token: bool = False
    status_with_token: int = 0
    """What those with a token are answered, if not 0."""
    token_status: int = 0
    token_body: bytes = b""
    status: int = 0
    """What every manifest is answered with, if not 0."""
    hangs_at: str = ""
    """The beginning of the paths that are never answered."""
    hang_ends: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and authorization."""

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def has(self, image: str) -> str:
        """Take an image in, as `name:tag`; returns its digest."""
        self.digests[image] = f"sha256:{len(self.digests) + 1:064x}"
        return self.digests[image]


_TOKEN = "bearer-5f1c7e"


@contextmanager
def image_registry() -> Iterator[Registry]:
    registry = Registry()

    class Handler(QuietHandler):
        def do_HEAD(self) -> None:
            self._serve()

        def do_GET(self) -> None:
            self._serve()

        def _serve(self) -> None:
            authorization = self.headers.get("Authorization", "")
            registry.asked.append((self.command, self.path, authorization))
            if registry.hangs_at and self.path.startswith(registry.hangs_at):
                registry.hang_ends.wait(60)
                self.close_connection = True
                return
            if self.path.startswith("/token"):
                self._give_token(authorization)
            elif registry.status:
                self.answer(registry.status)
            elif self._is_welcome(authorization):
                if registry.status_with_token:
                    self.answer(registry.status_with_token)
                else:
                    self._give_manifest()

        def _known(self, authorization: str) -> bool:
            known = [_basic(user, password) for user, password in registry.users.items()]
            return not known or authorization in known

        def _give_token(self, authorization: str) -> None:
            if registry.token_status:
                self.answer(registry.token_status)
            elif registry.token_body:
                self.answer(200, registry.token_body)
            elif self._known(authorization):
                self.answer(200, json.dumps({"token": _TOKEN}).encode())
            else:
                self.answer(401, b'{"errors": [{"code": "UNAUTHORIZED"}]}')

        def _is_welcome(self, authorization: str) -> bool:
            if registry.needs == "basic" and not self._known(authorization):
                self.answer(401, Www_Authenticate='Basic realm="Registry Realm"')
                return False
            token_is_fine = authorization == f"Bearer {_TOKEN}" and not registry.refuses_token
            if registry.needs == "token" and not token_is_fine:
                realm = f"http://{registry.host}/token"
                name = self.path.removeprefix("/v2/").partition("/manifests/")[0]
                scope = f"repository:{name}:pull"
                challenge = f'Bearer realm="{realm}",service="test",scope="{scope}"'
                self.answer(401, Www_Authenticate=challenge)
                return False
            return True

        def _give_manifest(self) -> None:
            name, _, tag = self.path.removeprefix("/v2/").partition("/manifests/")
            digest = registry.digests.get(f"{name}:{tag}")
            if digest is None:
                self.answer(404)
            elif "application/vnd.oci.image.index.v1+json" not in self.headers["Accept"]:
                # Registries give an old kind of manifest, with another digest, to
                # those who do not say that they understand the new ones.
                self.answer(200, Docker_Content_Digest="sha256:" + "f" * 64)
            else:
                self.answer(200, Docker_Content_Digest=digest)

    with http_server(Handler) as registry.port:
        try:
            yield registry
        finally:
            registry.hang_ends.set()


def make_unreadable_as_program(path: Path) -> None:
    """Make a file that is executable by its mode, but is no program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF nothing of the kind")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
