"""One run in a terminal: everything that it needs is made ready at once."""

import os
import signal
import stat
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread
from rich.console import Console

from moonmind_ext.console import ConsoleObserver, closing_table
from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.session import NoEngineError, open_session
from moonmind_ext.exits import (
    EXIT_ENGINE,
    EXIT_INTERRUPTED,
    EXIT_NO_INPUT,
    EXIT_USAGE,
    ExitError,
)
from moonmind_ext.run.output import OutputError, clear_output
from moonmind_ext.workspace.errors import WorkspaceError
from pipelines.concurrency import task_group
from pipelines.payload import TaskPayload
from pipelines.plan import DEFAULT_HELPER_IMAGE, Plan
from pipelines.report import RunReport, exit_status

_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be run.

    Attributes
    ----------
    workspace, output
        Absolute.
    secrets
        Values of the payload's `secretEnv`.
    """

    payload: TaskPayload
    plan: Plan
    workspace: Path
    output: Path
    secrets: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """How a run is shown, and on what it runs.

    Attributes
    ----------
    console
        On stderr.
    as_json
        Whether stdout gets the events, rather than the command's output.
    open_seconds
        For the engine's session.
    """

    console: Console
    engine: EngineChoice
    open_seconds: float
    as_json: bool = False


def run_in_terminal(payload: str, make_job: Callable[[bytes], Job], terminal: Terminal) -> int:
    """Run a job, show it, and give its exit code.

    Parameters
    ----------
    payload
        A file's path, or `-` for standard input.
    make_job
        Makes the job of what is read there.

    Raises
    ------
    ExitError
        When it does not come to a report; also what `make_job` raises.
    """
    observer = ConsoleObserver(terminal.console, as_json=terminal.as_json)
    try:
        ended = anyio.run(_run, payload, make_job, terminal, observer)
    except OutputError as error:
        raise ExitError(EXIT_USAGE, str(error)) from None
    except NoEngineError as error:
        raise ExitError(EXIT_ENGINE, str(error)) from None
    except WorkspaceError as error:
        raise ExitError(
            EXIT_NO_INPUT,
            f"workspace: {error}. Name another --workspace, or leave it out with "
            "task.container.workspace.exclude",
        ) from None
    if ended is None:
        raise ExitError(EXIT_INTERRUPTED, "interrupted")
    job, report = ended
    observer.report(report)
    for line in closing_table(report, job.output, job.plan.artifacts_subdir):
        terminal.console.print(line, highlight=False)
    return exit_status(report)


async def _run(
    payload: str,
    make_job: Callable[[bytes], Job],
    terminal: Terminal,
    observer: ConsoleObserver,
) -> tuple[Job, RunReport] | None:
    """Open a session and run; None when interrupted before there is a report."""
    stop, opened, made = anyio.Event(), anyio.Event(), anyio.Event()
    jobs: list[Job] = []

    async def prepare() -> None:
        # In threads, so that an engine that answers meanwhile is heard.
        read = await read_input(payload)
        job = await anyio.to_thread.run_sync(make_job, read, abandon_on_cancel=True)
        # The run does so too, but only when the engine is there: what cannot be written to
        # is said before.
        await anyio.to_thread.run_sync(clear_output, job.output, job.plan.artifacts_subdir)
        jobs.append(job)
        made.set()

    async with _stop_on_signals(stop, opened, terminal.console), task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, _import_dagger)
        if payload == "-":
            # Whoever writes it may take his time.
            tasks.start_soon(prepare)
        else:
            # What is wrong with a file is said before an engine is started.
            await prepare()
        try:
            async with open_session(
                terminal.engine, environment=dict(os.environ), open_seconds=terminal.open_seconds
            ) as session:
                await made.wait()
                opened.set()
                await anyio.to_thread.run_sync(_import_dagger)
                from moonmind_ext.run.task import RunRequest, run_task

                (job,) = jobs
                request = RunRequest(
                    payload=job.payload,
                    plan=job.plan,
                    workspace=job.workspace,
                    output=job.output,
                    secrets=job.secrets,
                    helper_image=os.environ.get("MOONMIND_HELPER_IMAGE") or DEFAULT_HELPER_IMAGE,
                )
                return job, await run_task(session, request, observer, stop=stop)
        except NoEngineError:
            # What is wrong with the payload comes first.
            await made.wait()
            raise
    # A second signal has ended it.
    return None


def _import_dagger() -> None:
    """Import what runs a task, and with it Dagger: half a second."""
    import moonmind_ext.run.task  # noqa: F401


async def read_input(payload: str) -> bytes:
    """Read a payload; a pipe is waited for.

    Parameters
    ----------
    payload
        A file's path, or `-` for standard input.

    Raises
    ------
    ExitError
        When it cannot be read.
    """
    try:
        # A pipe is opened without waiting for who writes to it.
        descriptor = 0 if payload == "-" else os.open(payload, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return await _read_all(descriptor)
        finally:
            if descriptor:
                os.close(descriptor)
    except OSError as error:
        raise ExitError(EXIT_USAGE, f"payload {payload}: {error.strerror}") from None


async def _read_all(descriptor: int) -> bytes:
    mode = os.fstat(descriptor).st_mode
    may_block = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(descriptor)
    read = bytearray()
    while True:
        if may_block:
            await anyio.wait_readable(descriptor)
        chunk = os.read(descriptor, _READ_BYTES)
        if not chunk:
            return bytes(read)
        read += chunk


@asynccontextmanager
async def _stop_on_signals(
    stop: anyio.Event, opened: anyio.Event, console: Console
) -> AsyncIterator[None]:
    """Turn the first Ctrl-C or SIGTERM into a stop, and the second into an end at once.

    Before the engine's session is open there is nothing to stop: then the first ends it.
    """

    async def watch(scope: anyio.CancelScope) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                if stop.is_set() or not opened.is_set():
                    scope.cancel()
                else:
                    console.print("stopping the task; once more to end at once", style="yellow")
                    stop.set()

    async with task_group() as tasks:
        tasks.start_soon(watch, tasks.cancel_scope)
        yield
        tasks.cancel_scope.cancel()
