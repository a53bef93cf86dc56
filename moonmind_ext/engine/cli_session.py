"""`dagger session` as a child of ours.

The SDK starts it without an environment of its own, waits for its port without a
limit and 300 seconds for its end, so this does it instead. What it prints is the
same for every SDK: one line of JSON, `{"port": …, "session_token": …}`, and then
it serves until its standard input is closed.
"""

import json
import os
import signal
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib import metadata

import anyio
from anyio.abc import ByteReceiveStream, Process
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.text import TextReceiveStream

from pipelines.concurrency import task_group

CLOSE_SECONDS = 10
"""For the child to end after its standard input was closed. It only has to tell
the engine; caches are not exported here, so there is nothing to wait longer for."""

_KEPT_LINES = 50
_MAX_LINE_BYTES = 4096
PORTS = 1 << 16


class SessionStartError(Exception):
    """`dagger session` did not come up; the message has the end of what it said."""


@dataclass(frozen=True, slots=True)
class SessionAddress:
    """Where a session's API is served, on the loopback interface."""

    port: int
    token: str


@asynccontextmanager
async def cli_session(
    cli: str, *, environment: Mapping[str, str], deadline: float
) -> AsyncIterator[SessionAddress]:
    """Start `dagger session` and keep it for the duration of the context.

    Parameters
    ----------
    cli
        Path of the `dagger` command.
    environment
        The child's whole environment.
    deadline
        Seconds until it must have said its port.

    Raises
    ------
    SessionStartError
        When it ends, says something else, or says nothing in time.
    """
    version = metadata.version("dagger-io")
    labels = ("dagger.io/sdk.name:python", f"dagger.io/sdk.version:{version}")
    command = [cli, "session", *(part for label in labels for part in ("--label", label))]
    try:
        process = await anyio.open_process(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C in a terminal reaches the whole process group. The session must
            # live on, so that the task can be stopped through it.
            start_new_session=True,
        )
    except OSError as error:
        raise SessionStartError(f"{cli}: {error.strerror}") from error
    said: deque[str] = deque(maxlen=_KEPT_LINES)
    all_said = anyio.Event()
    address = None
    async with task_group() as tasks:
        # Unread, the pipe fills up and the child stops where it stands.
        tasks.start_soon(_keep_lines, process.stderr, said, all_said)
        try:
            address = await _read_address(process, deadline)
            if address is None:
                how = "gave no port" if process.returncode is None else "ended"
                _kill(process)
                # The last words are in the pipe; nobody is left to add some.
                with anyio.move_on_after(1):
                    await all_said.wait()
                last = "; ".join(said) or "it said nothing"
                raise SessionStartError(
                    f"dagger session {how} within {round(deadline, 1):g}s: {last}"
                )
            tasks.start_soon(_drain, process.stdout)
            yield address
        finally:
            with anyio.CancelScope(shield=True):
                await _close(process, gently=address is not None)
        # A child that has left its session may hold the pipes open.
        tasks.cancel_scope.cancel()


async def _read_address(process: Process, deadline: float) -> SessionAddress | None:
    assert process.stdout is not None
    line = b""
    with (
        anyio.move_on_after(deadline),
        suppress(anyio.EndOfStream, anyio.IncompleteRead, anyio.DelimiterNotFound),
    ):
        line = await BufferedByteReceiveStream(process.stdout).receive_until(b"\n", _MAX_LINE_BYTES)
    try:
        params = json.loads(line)
        port, token = int(params["port"]), str(params["session_token"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        port, token = 0, ""
    if 0 < port < PORTS:
        return SessionAddress(port, token)
    # Whether it has ended is known soon.
    with anyio.move_on_after(0.2):
        await process.wait()
    return None


async def _keep_lines(
    stream: ByteReceiveStream | None, said: deque[str], all_said: anyio.Event
) -> None:
    assert stream is not None
    rest = ""
    with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError):
        async for text in TextReceiveStream(stream, errors="replace"):
            *lines, rest = (rest + text).split("\n")
            said.extend(line.strip()[-_MAX_LINE_BYTES:] for line in lines if line.strip())
            rest = rest[-_MAX_LINE_BYTES:]
    if rest.strip():
        said.append(rest.strip())
    all_said.set()


async def _drain(stream: ByteReceiveStream | None) -> None:
    assert stream is not None
    with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError):
        async for _ in stream:
            pass


async def _close(process: Process, *, gently: bool) -> None:
    """End the child, and what it has started."""
    assert process.stdin is not None
    if gently:
        with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, OSError):
            await process.stdin.aclose()
        with anyio.move_on_after(CLOSE_SECONDS):
            await process.wait()
    _kill(process)
    await process.aclose()


def _kill(process: Process) -> None:
    """Kill the child's whole process group, which its own session made it the head of."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
