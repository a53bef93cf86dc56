"""The command line's `queue`: a server for local work, and the jobs of any."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moonmind_ext.exits import EXIT_QUEUE, EXIT_USAGE, ExitError
from moonmind_ext.queue.rules import HEARTBEAT, TASK, QueueRules, Row, Status
from moonmind_ext.run.events import LOG
from pipelines.payload import TaskContractError, loads, parse_any, warnings_of

# What serves and what asks takes its time to import, and `--help` does without.
if TYPE_CHECKING:
    from moonmind_ext.queue.client import QueueClient

DEFAULT_PORT = 8765
DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"

POLL_SECONDS = 0.5
"""Between two looks at a job that is followed: soon enough for a reader, and no load."""

PATIENCE_SECONDS = 60
"""How long `logs --follow` waits for a server that went away: a restart takes less."""

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

UrlOption = Annotated[
    str, typer.Option(envvar="MOONMIND_URL", metavar="URL", help="The queue's server.")
]
JobArgument = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]


@app.callback()
def queue() -> None:
    """Submit and watch jobs of a MoonMind queue, or serve one for local work."""


@app.command()
def serve(
    *,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = DEFAULT_PORT,
    db: Annotated[
        Path,
        typer.Option(metavar="FILE", help="The queue; FILE.artifacts/ beside it has the files."),
    ] = Path("moonmind-queue.db"),
    token: Annotated[
        str | None,
        typer.Option(
            envvar="MOONMIND_WORKER_TOKEN", help="What workers must send. Default: nothing."
        ),
    ] = None,
) -> None:
    """Serve a stand-in of MoonMind's queue, until Ctrl-C or SIGTERM.

    Prints its URL when it takes calls.
    """
    import sqlite3

    import anyio

    try:
        from moonmind_ext.queue.server import serve_queue
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: pip install 'moonmind-ext[queue]'"
        raise ExitError(EXIT_USAGE, message) from None

    async def until_told() -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with serve_queue(db, QueueRules(token=token), host=host, port=port) as url:
                # At once, for a program that waits for it.
                typer.echo(url)
                async for _ in signals:
                    break

    try:
        anyio.run(until_told)
    except (OSError, sqlite3.Error) as error:
        raise ExitError(EXIT_USAGE, f"cannot serve {db} on {host}:{port}: {error}") from None


@app.command()
def submit(
    payload: Annotated[
        str,
        typer.Argument(
            metavar="PAYLOAD",
            help="A JSON file, or - for standard input: a queue payload, a task, or a container.",
        ),
    ],
    *,
    url: UrlOption = DEFAULT_URL,
    priority: Annotated[int, typer.Option(help="The higher, the sooner.")] = 0,
    max_attempts: Annotated[int, typer.Option(min=1, help="Including the first.")] = 3,
    kind: Annotated[
        str, typer.Option("--type", help="Any other than task: the payload is sent as it is.")
    ] = TASK,
    repository: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of a task or a container, which name none."),
    ] = None,
) -> None:
    """Put a job in the queue, and print its id."""
    body = _read(payload, kind, repository)
    with _client(url) as client:
        job = client.submit(kind, body, priority=priority, max_attempts=max_attempts)
    typer.echo(job["id"])


@app.command()
def show(
    job_id: JobArgument,
    *,
    url: UrlOption = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="The job as the queue has it.")] = False,
) -> None:
    """Show a job: where it stands, how it ended, and its artifacts."""
    with _client(url) as client:
        job = client.job(job_id)
        if as_json:
            typer.echo(json.dumps(job, indent=2, ensure_ascii=False))
            return
        artifacts = client.artifacts(job_id)
    for title, value in _described(job, artifacts):
        typer.echo(f"{title:<12}{value}")


@app.command()
def logs(
    job_id: JobArgument,
    *,
    url: UrlOption = DEFAULT_URL,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Until the job's end; then 0 if it succeeded, 1 if not."),
    ] = False,
) -> None:
    """Print a command's output on stdout, and what else happened to the job on stderr."""
    show_event = _EventPrinter()
    with _client(url) as client:
        if not follow:
            for event in client.events(job_id):
                show_event(event)
            return
        status = _follow(client, job_id, show_event)
    raise typer.Exit(0 if status == Status.SUCCEEDED else 1)


@app.command()
def cancel(
    job_id: JobArgument,
    *,
    url: UrlOption = DEFAULT_URL,
    reason: Annotated[str | None, typer.Option(help="For whoever asks why.")] = None,
) -> None:
    """Cancel a job that waits, or ask the worker that runs it to stop."""
    from moonmind_ext.queue.client import RefusedError

    with _client(url) as client:
        try:
            job = client.cancel(job_id, reason)
        except RefusedError as error:
            if error.code is not None:
                raise
            raise ExitError(EXIT_USAGE, f"the queue at {url} has no cancellation") from None
    waits = job["status"] == Status.RUNNING
    typer.echo("asked its worker to stop" if waits else job["status"])


@contextmanager
def _client(url: str) -> Iterator["QueueClient"]:
    """Make a client whose errors are for people."""
    from moonmind_ext.queue.client import RefusedError, UnreachableError, open_client

    try:
        with open_client(url) as client:
            yield client
    except UnreachableError as error:
        message = (
            f"no queue answers at {url} ({error}). Name another --url, or start one with: "
            "moonmind-ext queue serve"
        )
        raise ExitError(EXIT_QUEUE, message) from None
    except RefusedError as error:
        raise ExitError(EXIT_USAGE, str(error)) from None


def _read(argument: str, kind: str, repository: str | None) -> Row:
    """Read a payload; one of a task in its canonical form, so that mistakes show here."""
    try:
        data = sys.stdin.buffer.read() if argument == "-" else Path(argument).read_bytes()
    except OSError as error:
        raise ExitError(EXIT_USAGE, f"payload {argument}: {error.strerror}") from None
    try:
        read = loads(data)
        if kind == TASK:
            task = parse_any(read, repository=repository)
            for warning in warnings_of(task):
                typer.echo(f"moonmind-ext: warning: {warning}", err=True)
            return task.canonical()
    except TaskContractError as error:
        problems = "\n".join(f"  - {problem.message}" for problem in error.problems)
        raise ExitError(EXIT_USAGE, f"the payload is not valid:\n{problems}") from None
    if not isinstance(read, dict):
        raise ExitError(EXIT_USAGE, "the payload is not valid:\n  - it must be an object")
    return read


def _follow(client: "QueueClient", job_id: str, show_event: "_EventPrinter") -> str:
    """Show events as they come, and give the status that the job ends with."""
    from moonmind_ext.queue.client import UnreachableError

    last: str | None = None
    away_since: float | None = None
    while True:
        try:
            # The status first: what led to an end is then among the events.
            status = str(client.job(job_id)["status"])
            for event in client.events(job_id, last):
                show_event(event)
                last = event["createdAt"]
        except UnreachableError:
            # A server that was never there has a wrong URL rather than a restart.
            if last is None:
                raise
            if away_since is None:
                away_since = time.monotonic()
                show_event.say("the queue does not answer; trying again")
            elif time.monotonic() - away_since > PATIENCE_SECONDS:
                raise
        else:
            away_since = None
            if status not in {Status.QUEUED, Status.RUNNING}:
                return status
        time.sleep(POLL_SECONDS)


class _EventPrinter:
    """Prints events: a command's output on stdout, all else on stderr."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, soft_wrap=True)
        self._line_open = False

    def __call__(self, event: Row) -> None:
        if event["message"] == HEARTBEAT:
            # One every few seconds, and nothing happened.
            return
        payload: Row = event["payload"] or {}
        if event["message"] == LOG:
            # What a command prints need not be what this terminal can show.
            text = str(payload.get("text", ""))
            encoding = sys.stdout.encoding or "utf-8"
            typer.echo(text.encode(encoding, "backslashreplace"), nl=False)
            self._line_open = bool(text) and not text.endswith("\n")
            return
        moment = datetime.fromisoformat(event["createdAt"]).astimezone()
        known = {name: value for name, value in payload.items() if value is not None}
        details = f" {json.dumps(known, ensure_ascii=False)}" if known else ""
        self.say(f"{moment:%H:%M:%S} {event['message']}{details}")

    def say(self, line: str) -> None:
        """Print a line on stderr."""
        if self._line_open and self._console.is_terminal:
            self._console.print()
            self._line_open = False
        style = "" if self._console.no_color else "dim"
        self._console.print(line, style=style, highlight=False, markup=False)


def _described(job: Row, artifacts: list[Row]) -> Iterator[tuple[str, Any]]:
    """Give a job as titles and values, without what is not there."""
    # What a payload of another type holds is not known.
    payload = job["payload"] if job["type"] == TASK else {}
    container = payload.get("task", {}).get("container") or {}
    lease = f"{job['claimedBy']}, lease until {job['leaseExpiresAt']}" if job["claimedBy"] else None
    asked = job.get("cancelRequestedAt")
    reason = job.get("cancelReason")
    rows = [
        ("job", job["id"]),
        ("type", job["type"]),
        ("status", job["status"]),
        ("attempt", f"{job['attempt']} of {job['maxAttempts']}"),
        ("priority", job["priority"]),
        ("needs", ", ".join(payload.get("requiredCapabilities", []))),
        ("repository", payload.get("repository")),
        ("image", container.get("image")),
        ("worker", lease),
        ("next try", job["nextAttemptAt"]),
        ("cancel", f"asked for at {asked}{f': {reason}' if reason else ''}" if asked else None),
        ("created", job["createdAt"]),
        ("started", job["startedAt"]),
        ("finished", job["finishedAt"]),
        ("result", job["resultSummary"]),
        ("error", job["errorMessage"]),
    ]
    yield from ((title, value) for title, value in rows if value not in (None, ""))
    for index, artifact in enumerate(artifacts):
        size = f"{artifact['sizeBytes']:,} bytes"
        yield "artifacts" if index == 0 else "", f"{artifact['name']} ({size})"
