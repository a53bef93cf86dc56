"""Programs that a job's stages run: with a limit, and never longer than their owner."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio.abc import ByteReceiveStream

from moonmind_ext.run.stage_log import StageLog
from pipelines.concurrency import task_group

OUTPUT_BYTES = 1 << 20
"""Kept of what a program prints. git and gh say little; a file list may be long."""

LINE_CHARACTERS = 2000
"""Of the last line that a program printed, in an error's message."""

LINGER_SECONDS = 1.0
"""For output that a program's children still write when it has ended. A child that
keeps the output open is a process left in the background, and ends with this."""

_WRONG_TEXT = "a NUL character or half a surrogate pair"


class CommandError(Exception):
    """A program that failed, was not there, or took too long.

    Attributes
    ----------
    output
        What it printed, both streams.
    """

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs programs of one stage, each into the stage's log.

    Attributes
    ----------
    cwd
        Where they run.
    environment
        All of it: nothing is inherited.
    log
        Masks what it is given.
    """

    cwd: Path
    environment: Mapping[str, str]
    log: StageLog

    async def run(self, *command: str, seconds: float) -> str:
        """Run a program to its end; when cancelled, it and its children are killed.

        Parameters
        ----------
        seconds
            The limit.

        Returns
        -------
        str
            What it printed on its standard output.

        Raises
        ------
        CommandError
            When it does not end well within its limit.
        """
        try:
            self.log.line(f"$ {' '.join(command)}")
            with anyio.fail_after(seconds):
                code, out, err = await self._run(command)
        except TimeoutError:
            raise CommandError(f"{command[0]}: no end within {seconds:g}s") from None
        except OSError as error:
            raise CommandError(f"{command[0]}: {error.strerror}") from error
        except ValueError as error:
            # A NUL or half a surrogate pair, from a payload: no argument can hold it.
            raise CommandError(f"{command[0]}: an argument has {_WRONG_TEXT}") from error
        # The program has done what it has done, whether there is room to log it or not.
        with suppress(OSError):
            self.log.text(f"{out}\n{err}")
        if code:
            lines = err.splitlines() if err.strip() else out.splitlines()
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            raise CommandError(
                f"{_title(command)} failed ({code}): {last[:LINE_CHARACTERS]}", out + err
            )
        return out

    async def _run(self, command: Sequence[str]) -> tuple[int, str, str]:
        process = await anyio.open_process(
            command,
            cwd=self.cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            # So that what it starts can be killed with it.
            start_new_session=True,
        )
        out, err = bytearray(), bytearray()
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with task_group() as tasks:
                tasks.start_soon(_read, process.stdout, out)
                tasks.start_soon(_read, process.stderr, err)
                code = await process.wait()
                tasks.cancel_scope.deadline = anyio.current_time() + LINGER_SECONDS
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.aclose()
        return code, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


def _title(command: Sequence[str]) -> str:
    """Name a command as people do: `git push`, not `git -C`."""
    program, *words = command
    while words[:1] in (["-C"], ["-c"]) and program == "git":
        words = words[2:]
    return " ".join([program, *words[:1]])


async def _read(stream: ByteReceiveStream, into: bytearray) -> None:
    async for chunk in stream:
        into += chunk[: max(OUTPUT_BYTES - len(into), 0)]
