"""Runs one command in a sandbox, to its very end."""

import json
import os
import selectors
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

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
    _init: int | None = field(default=None)

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
                except Exception as error:  # noqa: BLE001: raised below, without a group around it.
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
        """Start, read and wait, all in one thread: bubblewrap dies with the thread that started it."""
        with ExitStack() as stack:
            options = os.memfd_create("options")
            stack.callback(os.close, options)
            with open(options, "wb", closefd=False) as file:  # noqa: PTH123
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
        assert process.stdout is not None
        assert process.stderr is not None
        with selectors.DefaultSelector() as selector, ExitStack() as stack:
            streams: dict[int, tuple[int, int]] = {}
            for pipe, stream in ((process.stdout, STDOUT), (process.stderr, STDERR)):
                fd = pipe.fileno()
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ)
                streams[fd] = (fd, stream)
            os.set_blocking(status, False)
            selector.register(status, selectors.EVENT_READ)
            ended = os.pidfd_open(process.pid)
            stack.callback(os.close, ended)
            selector.register(ended, selectors.EVENT_READ)

            running = True
            while running:
                for key, _ in selector.select():
                    if key.fd == ended:
                        running = False
                    elif key.fd == status:
                        self._read_status(status, selector, stack)
                    elif self._read(*streams[key.fd]) == 0:
                        selector.unregister(key.fileobj)
            # With its first process all of a PID namespace dies; then what is in the
            # pipes is all that there will be, whoever held them open.
            if status in selector.get_map():
                self._read_status(status, selector, stack)
            if self._init is not None:
                with selectors.DefaultSelector() as last:
                    last.register(self._init, selectors.EVENT_READ)
                    last.select(_DEATH_SECONDS)
            for fd, stream in streams.values():
                while self._read(fd, stream):
                    pass

    def _read(self, fd: int, stream: int) -> int | None:
        """Pass on what is in a pipe; give its length, 0 at the end, None when there is nothing yet."""
        try:
            chunk = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return None
        if chunk:
            self.write(stream, chunk)
        return len(chunk)

    def _read_status(self, status: int, selector: selectors.BaseSelector, stack: ExitStack) -> None:
        """Take in what bubblewrap says: who the sandbox's first process is, and how it ended."""
        try:
            chunk = os.read(status, _READ_BYTES)
        except BlockingIOError:
            return
        if not chunk:
            selector.unregister(status)
        self._status += chunk
        for line in chunk.splitlines():
            with suppress(ValueError, KeyError, ProcessLookupError):
                self._init = os.pidfd_open(json.loads(line)["child-pid"])
                stack.callback(os.close, self._init)
