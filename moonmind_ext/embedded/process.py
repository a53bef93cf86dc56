"""Runs one command in a sandbox, to its very end."""

import json
import os
import selectors
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import anyio
import anyio.to_thread
from anyio import CapacityLimiter

from moonmind_ext.embedded.output import STDERR, STDOUT

_READ_BYTES = 64 << 10
"""A pipe's size."""

_DEATH_SECONDS = 10
"""For the kernel to end every process of a sandbox whose first is dead. It takes
milliseconds; one stuck in the kernel (a dead network file system) is not waited for."""


class NotStartedError(Exception):
    """The command never ran; bubblewrap has said why on the standard error."""


@dataclass(slots=True)
class Command:
    """A command that is about to run.

    Attributes
    ----------
    bwrap
        The program that makes the sandbox.
    options
        For it; they reach it through a file, so that no value is on a command line
        that others can read.
    args
        The command.
    stdin
        A descriptor.
    pass_fds
        Descriptors that options name.
    write
        Takes what the command prints, in a thread.
    """

    bwrap: str
    options: Sequence[str]
    args: Sequence[str]
    stdin: int
    pass_fds: Sequence[int]
    write: Callable[[int, bytes], None]
    _process: "subprocess.Popen[bytes] | None" = None
    _killed: bool = False
    _status: bytes = b""
    _init: int | None = None

    async def run(self) -> int:
        """Run it; when cancelled, everything in the sandbox is killed first.

        Returns
        -------
        int
            The exit code; 128+n for a signal.

        Raises
        ------
        NotStartedError
            When the sandbox could not be made, or the program is not in it.
        OSError
            When its output cannot be kept, or its arguments are too long.
        """
        ended = anyio.Event()
        outcome: list[int | Exception] = []

        async def in_thread() -> None:
            # The thread ends when the process does, and that is seen to below.
            with anyio.CancelScope(shield=True):
                try:
                    # A limiter of its own: what waits here is a process, not this host.
                    limiter = CapacityLimiter(1)
                    outcome.append(await anyio.to_thread.run_sync(self._run, limiter=limiter))
                except Exception as error:  # noqa: BLE001
                    # Raised below, without a group around it.
                    outcome.append(error)
            ended.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(in_thread)
            try:
                await ended.wait()
            finally:
                self._kill()
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def _kill(self) -> None:
        self._killed = True
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()

    def _run(self) -> int:
        """Start, read and wait in one thread: bubblewrap dies with the one that started it."""
        with ExitStack() as stack:
            options = os.memfd_create("options")
            stack.callback(os.close, options)
            with open(options, "wb", closefd=False) as file:
                file.write(b"".join(os.fsencode(option) + b"\0" for option in self.options))
            os.lseek(options, 0, os.SEEK_SET)
            status, status_end = os.pipe()
            stack.callback(os.close, status)
            try:
                self._process = process = stack.enter_context(
                    subprocess.Popen(
                        [
                            *(self.bwrap, "--args", str(options)),
                            *("--json-status-fd", str(status_end), "--", *self.args),
                        ],
                        stdin=self.stdin,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        pass_fds=[options, status_end, *self.pass_fds],
                        # Nothing of ours gets in; and nothing of the task's reaches bubblewrap.
                        env={},
                        # Ctrl-C in a terminal is for us: we stop the task, with its grace.
                        start_new_session=True,
                    )
                )
            finally:
                os.close(status_end)
            stack.callback(process.kill)
            if self._killed:
                process.kill()
            self._read_to_end(process, status)
            code = process.wait()
        if code < 0:
            return 128 - code
        if b'"exit-code"' not in self._status:
            raise NotStartedError
        return code

    def _read_to_end(self, process: "subprocess.Popen[bytes]", status: int) -> None:
        """Read all there is until every process of the sandbox is dead."""
        assert process.stdout is not None
        assert process.stderr is not None
        with selectors.DefaultSelector() as selector, ExitStack() as stack:
            streams = {process.stdout.fileno(): STDOUT, process.stderr.fileno(): STDERR}
            ended = os.pidfd_open(process.pid)
            stack.callback(os.close, ended)
            for fd in (*streams, status, ended):
                selector.register(fd, selectors.EVENT_READ)
            for fd in (*streams, status):
                os.set_blocking(fd, False)

            ready: set[int] = set()
            while ended not in ready:
                ready = {key.fd for key, _ in selector.select()}
                for fd in ready - {ended}:
                    if self._read(fd, streams.get(fd)) == 0:
                        selector.unregister(fd)
                    if self._init is None and fd == status:
                        self._init = self._open_init(stack)
            # With its first process all of a PID namespace dies; then what is in the
            # pipes is all that there will be, whoever held them open.
            if self._init is not None:
                with selectors.DefaultSelector() as last:
                    last.register(self._init, selectors.EVENT_READ)
                    last.select(_DEATH_SECONDS)
            for fd in (*streams, status):
                while self._read(fd, streams.get(fd)):
                    pass

    def _read(self, fd: int, stream: int | None) -> int | None:
        """Take what is in a pipe: its length, 0 at the end, None when there is nothing yet."""
        try:
            chunk = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return None
        if stream is None:
            self._status += chunk
        elif chunk:
            self.write(stream, chunk)
        return len(chunk)

    def _open_init(self, stack: ExitStack) -> int | None:
        """Get hold of the sandbox's first process, which bubblewrap names at the beginning."""
        with suppress(ValueError, LookupError, ProcessLookupError):
            init = os.pidfd_open(json.loads(self._status.splitlines()[0])["child-pid"])
            stack.callback(os.close, init)
            return init
        return None
