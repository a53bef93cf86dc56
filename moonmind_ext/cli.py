"""The command line, `moonmind-ext`."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import uuid4

import typer

from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.exits import (
    EXIT_ENGINE,
    EXIT_INTERRUPTED,
    EXIT_NO_INPUT,
    EXIT_USAGE,
    ExitError,
)
from moonmind_ext.queue import commands as queue_commands
from moonmind_ext.run.secrets import SecretError, read_env_file, resolve_secrets
from moonmind_ext.worker.command import worker
from pipelines.payload import (
    DEFAULT_TIMEOUT_SECONDS,
    MAX_SECONDS,
    TaskContractError,
    TaskPayload,
    loads,
    parse_any,
    warnings_of,
)
from pipelines.plan import (
    DEFAULT_WORKDIR,
    Defaults,
    Plan,
    plan_task,
    reproduce_line,
)

# What runs a task imports Dagger, which takes its time: `--help`, `validate` and
# `plan` do without, so those imports stand where they are needed.
if TYPE_CHECKING:
    from rich.console import Console


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(queue_commands.app, name="queue")
app.command()(worker)

PayloadArgument = Annotated[
    str,
    typer.Argument(
        metavar="PAYLOAD",
        help="A JSON file, or - for standard input: a queue payload, a task, or a container.",
    ),
]
JobIdOption = Annotated[
    str | None, typer.Option(metavar="ID", help="Name of the run. Default: a new one.")
]
EngineOption = Annotated[
    EngineChoice,
    typer.Option(
        help="auto takes the first Dagger engine that answers; embedded needs no Docker "
        "and pulls no images.",
    ),
]
OpenSecondsOption = Annotated[
    float,
    typer.Option(
        envvar="MOONMIND_ENGINE_OPEN_SECONDS",
        min=1,
        help="How long an engine may take to open a session.",
    ),
]
WorkdirOption = Annotated[
    str,
    typer.Option(
        envvar="MOONMIND_WORKDIR",
        help="The jobs' directory: where the workspace is inside the container.",
    ),
]
TimeoutOption = Annotated[
    int | None,
    typer.Option(
        envvar="MOONMIND_CONTAINER_TIMEOUT_SECONDS",
        min=1,
        max=MAX_SECONDS,
        help="Time limit of a command whose payload names none. Default: 3600.",
    ),
]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"moonmind-ext {metadata.version('moonmind-ext')}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Run MoonMind container tasks as Dagger pipelines."""


def main() -> None:
    """Run the command line; the entry point of `moonmind-ext`."""
    try:
        app()
    except ExitError as end:
        _say(str(end))
        sys.exit(end.code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


@app.command()
def run(
    payload: PayloadArgument,
    *,
    workspace: Annotated[
        Path, typer.Option(metavar="DIR", help="The checkout to run on.")
    ] = Path(),
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Gets logs/ and the artifacts' directory.")
    ] = Path("moonmind-output"),
    engine: EngineOption = EngineChoice.AUTO,
    job_id: JobIdOption = None,
    env_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="NAME=VALUE lines: values for the payload's secretEnv."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Events as JSON lines on stdout, run.json's content last."),
    ] = False,
    workdir: WorkdirOption = DEFAULT_WORKDIR,
    timeout_seconds: TimeoutOption = None,
    engine_open_seconds: OpenSecondsOption = 30,
) -> None:
    """Run a container task, and exit as its command did.

    Exit codes of our own: 124 timed out, 130 interrupted, 2 invalid payload or usage,
    66 workspace unreadable, 69 image unavailable, 75 engine failed.
    """
    from moonmind_ext.terminal import Job, Terminal, run_in_terminal

    def make_job(data: bytes) -> Job:
        parsed = _parse(data)
        made = _plan(parsed, job_id or str(uuid4()), _defaults(workdir, timeout_seconds))
        if not workspace.is_dir():
            raise ExitError(EXIT_NO_INPUT, f"workspace {workspace}: is not a directory")
        if output.resolve() == workspace.resolve():
            raise ExitError(EXIT_USAGE, f"output {output}: must not be the workspace itself")
        _warn_of_payload(parsed)
        return Job(
            payload=parsed,
            plan=made,
            workspace=workspace.resolve(),
            output=output.resolve(),
            secrets=_secrets(made, env_file),
        )

    terminal = Terminal(
        console=_console(stderr=True),
        engine=engine,
        open_seconds=engine_open_seconds,
        as_json=as_json,
    )
    raise typer.Exit(run_in_terminal(payload, make_job, terminal))


@app.command()
def validate(payload: PayloadArgument) -> None:
    """Print the canonical form of a payload, or everything that is wrong with it."""
    parsed = _read_payload(payload)
    _warn_of_payload(parsed)
    print(json.dumps(parsed.canonical(), indent=2, ensure_ascii=False))


@app.command()
def plan(
    payload: PayloadArgument,
    *,
    job_id: JobIdOption = None,
    workdir: WorkdirOption = DEFAULT_WORKDIR,
    timeout_seconds: TimeoutOption = None,
) -> None:
    """Print what would be run. Touches no engine."""
    parsed = _read_payload(payload)
    _warn_of_payload(parsed)
    made = _plan(parsed, job_id or "JOB_ID", _defaults(workdir, timeout_seconds))
    for title, lines in _describe(made):
        for index, line in enumerate(lines):
            print(f"{title if index == 0 else '':<12}{line}")


@app.command()
def doctor(engine_open_seconds: OpenSecondsOption = 30) -> None:
    """Show what this host has for running tasks, and what to do about the rest.

    Ends with 0 when a Dagger engine answers, and with 75 otherwise.
    """
    import anyio
    from rich.markup import escape

    from moonmind_ext.doctor import examine

    findings = anyio.run(examine, dict(os.environ), engine_open_seconds)
    console = _console(stderr=False)
    marks = {True: "[green]ok[/]", False: "[red]no[/]", None: "- "}
    for finding in findings:
        # Not a table of rich's: that would fold what is to be copied.
        for index, line in enumerate(finding.found.splitlines()):
            head = f"{marks[finding.good]}  {finding.what:<16}" if index == 0 else " " * 20
            console.print(f"{head}{escape(line)}", highlight=False)
        if finding.advice:
            console.print(f"{'':<20}{escape(finding.advice)}", highlight=False)
    engine = next(finding for finding in findings if finding.what == "Dagger engine")
    raise typer.Exit(0 if engine.good else EXIT_ENGINE)


@app.command()
def demo(
    *,
    engine: EngineOption = EngineChoice.AUTO,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the result goes.")] = Path(
        "demo-output"
    ),
    engine_open_seconds: OpenSecondsOption = 30,
) -> None:
    """Run an example on the best engine there is, and show what it leaves."""
    from moonmind_ext.terminal import Job, Terminal, run_in_terminal

    example = _example_folder()

    def make_job(data: bytes) -> Job:
        parsed = _parse(data)
        return Job(
            payload=parsed,
            plan=_plan(parsed, "demo", Defaults()),
            workspace=(example / "workspace").resolve(),
            output=output.resolve(),
            secrets={},
        )

    def run_on(chosen: EngineChoice) -> int:
        terminal = Terminal(
            console=_console(stderr=True), engine=chosen, open_seconds=engine_open_seconds
        )
        return run_in_terminal(str(example / "payload.json"), make_job, terminal)

    try:
        code = run_on(engine)
    except ExitError as error:
        # The one place where the embedded engine is taken without being asked for.
        if error.code != EXIT_ENGINE or engine is not EngineChoice.AUTO:
            raise
        _say("no Dagger engine answers: the demo takes the embedded one")
        code = run_on(EngineChoice.EMBEDDED)
    for file in sorted(path for path in output.rglob("*") if path.is_file()):
        print(f"{file}  {file.stat().st_size:,} bytes")
    raise typer.Exit(code)


@app.command()
def reproduce(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="The output directory of a run.")
    ],
    *,
    run_it: Annotated[
        bool, typer.Option("--run", help="Run it, on the current directory as the workspace.")
    ] = False,
    shell: Annotated[
        bool,
        typer.Option("--shell", help="Run it, then open a shell in its container."),
    ] = False,
    module: Annotated[
        str | None,
        typer.Option(
            envvar="MOONMIND_MODULE",
            metavar="ADDRESS",
            help="The Dagger module: a checkout or its git address. Default: this checkout.",
        ),
    ] = None,
) -> None:
    """Print the `dagger call` that runs a run again, in a checkout of its repository."""
    from moonmind_ext.reproduce import NoRunError, reproduce_command

    try:
        words = reproduce_command(run_dir, module=module, open_shell=shell)
    except NoRunError as error:
        raise ExitError(EXIT_USAGE, str(error)) from None
    if not (run_it or shell):
        print(shlex.join(words))
        return
    if shutil.which(words[0]) is None:
        raise ExitError(EXIT_ENGINE, "there is no `dagger` on PATH to run it with")
    os.execvp(words[0], words)  # noqa: S606, no shell is what is wanted


def _read_payload(argument: str) -> TaskPayload:
    try:
        data = sys.stdin.buffer.read() if argument == "-" else Path(argument).read_bytes()
    except OSError as error:
        raise ExitError(EXIT_USAGE, f"payload {argument}: {error.strerror}") from None
    return _parse(data)


def _parse(data: bytes) -> TaskPayload:
    try:
        return parse_any(loads(data))
    except TaskContractError as error:
        problems = "\n".join(f"  - {problem.message}" for problem in error.problems)
        raise ExitError(EXIT_USAGE, f"the payload is not valid:\n{problems}") from None


def _plan(payload: TaskPayload, job_id: str, defaults: Defaults) -> Plan:
    try:
        return plan_task(payload, job_id=job_id, defaults=defaults)
    except ValueError as error:
        raise ExitError(EXIT_USAGE, str(error)) from None


def _defaults(workdir: str, timeout_seconds: int | None) -> Defaults:
    if not workdir.startswith("/"):
        raise ExitError(EXIT_USAGE, f"workdir {workdir}: must be an absolute path")
    return Defaults(
        workdir=workdir,
        timeout_seconds=timeout_seconds or DEFAULT_TIMEOUT_SECONDS,
        module=os.environ.get("MOONMIND_MODULE") or ".",
    )


def _secrets(plan: Plan, env_file: Path | None) -> dict[str, str]:
    try:
        given = read_env_file(env_file) if env_file else {}
        return resolve_secrets(plan.secret_env, environment=os.environ, given=given)
    except SecretError as error:
        problems = "\n".join(f"  - {line}" for line in str(error).splitlines())
        raise ExitError(EXIT_USAGE, f"secrets are missing:\n{problems}") from None


def _describe(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    """Give a plan as titles and lines; of the environment only the names."""
    yield "image", [f"{plan.image} (pull: {plan.pull})"]
    yield "command", [shlex.join(plan.command)]
    yield "workdir", [plan.workdir]
    mounts = [f"{plan.repo_dir} <- the workspace", f"{plan.artifact_dir} -> the artifacts"]
    mounts += [f"{cache.target} <- cache volume {cache.name}" for cache in plan.cache_volumes]
    yield "mounts", mounts
    yield "env", sorted([*plan.env, *plan.secret_values])
    if plan.secret_env:
        yield "secrets", [f"{name} from {text}" for name, text in plan.secret_env.items()]
    yield "limits", [f"{plan.timeout_seconds} s, then SIGTERM, {plan.grace_seconds} s, SIGKILL"]
    yield "cache", [plan.cache.value]
    yield "write back", ["changes" if plan.write_back else "none"]
    yield "reproduce", [reproduce_line(plan, image=plan.image)]


def _example_folder() -> Path:
    here = Path(__file__).parent
    for folder in (here / "examples", here.parent / "examples"):
        if (folder / "python" / "payload.json").is_file():
            return folder / "python"
    raise ExitError(EXIT_NO_INPUT, "the examples are not installed; run the demo from a checkout")


def _console(*, stderr: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True)


def _warn_of_payload(payload: TaskPayload) -> None:
    for warning in warnings_of(payload):
        _say(f"warning: {warning}")


def _say(message: str) -> None:
    print(f"moonmind-ext: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
