"""MoonMind's container tasks: a payload and a workspace become a result.

The same pipeline as the worker's, for a laptop and for CI.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, TypeVar
from uuid import uuid4

import dagger
from dagger import DefaultPath, Doc, Ignore, dag, field, function, object_type

from pipelines.engine_run import run_in_engine
from pipelines.payload import DEFAULT_TIMEOUT_SECONDS, TaskPayload, loads, parse_any
from pipelines.plan import DEFAULT_HELPER_IMAGE, DEFAULT_WORKDIR, Defaults, plan_task
from pipelines.report import exit_status

TAIL_LINES = 20
"""Of the output, that `check` shows."""

# What a fresh checkout has not: the worker's workspace is one.
_NEVER_CHECKED_IN = [
    "**/.venv",
    "**/__pycache__",
    "**/node_modules",
    "**/.mypy_cache",
    "**/.pytest_cache",
    "**/.ruff_cache",
    "moonmind-output",
]

Workspace = Annotated[
    dagger.Directory,
    Doc("The checkout that the command works on; it gets a writable copy."),
    DefaultPath("/"),
    Ignore(_NEVER_CHECKED_IN),
]
JobId = Annotated[
    str | None, Doc("Name of the run, and part of its paths in the container. Default: a new one.")
]
JobsDir = Annotated[str, Doc("The jobs' directory in the container, MOONMIND_WORKDIR.")]

_Func = TypeVar("_Func", bound=Callable[..., Any])


def never_cached(func: _Func) -> _Func:
    """Make a function of the module that runs every time it is called.

    Dagger answers other calls with the same arguments from its cache.
    """
    # The SDK's overloads forget `cache`.
    return function(func, cache="never")  # type: ignore[call-overload, no-any-return]


@object_type
class TaskRun:
    """How a task ended, and what it has left.

    Nothing in here runs the task again.
    """

    exit_code: Annotated[
        int,
        Doc(
            "The command's own; 124 after its time limit, 69 where there is no such image, "
            "75 where the engine failed."
        ),
    ] = field()
    outcome: Annotated[
        str,
        Doc("succeeded, command-failed, timed-out, image-unavailable or engine-failed."),
    ] = field()
    log: Annotated[
        dagger.File, Doc("The command's output, stdout and stderr in their order, masked.")
    ] = field()
    artifacts: Annotated[dagger.Directory, Doc("What the command wrote below ARTIFACT_DIR.")] = (
        field()
    )
    changes: Annotated[
        dagger.Changeset, Doc("What the command did to the workspace; never to a .git.")
    ] = field()
    report: Annotated[dagger.File, Doc("The run.json: everything about the run.")] = field()
    result: Annotated[
        dagger.Directory,
        Doc("All of it: artifacts/, logs/runner.log, run.json, payload.json, exit-code."),
    ] = field()

    # Not shown by Dagger, and kept from call to call.
    summary: str
    tail: str
    bare: dagger.Container | None
    before: dagger.Container | None
    after: dagger.Container | None
    shell: list[str]

    @function
    async def stdout(self) -> str:
        """Print the command's output: stdout and stderr in their order, as in `log`."""
        return await self.log.contents()

    @function
    def stderr(self) -> str:
        """Print what the run says of itself: its warnings and how it ended.

        The command's own stderr is part of `stdout`: only one stream keeps their order.
        """
        return self.summary

    @function
    async def check(self) -> str:
        """Show the end of the output, and end with the command's exit code."""
        shown = f"{self.tail}\n{self.summary}".lstrip("\n")
        if self.exit_code == 0:
            return shown
        if self.bare is None:
            raise RuntimeError(shown)
        # A real failing command is what makes `dagger call` end with its code; its
        # arguments cannot hold a NUL.
        shown = shown.replace("\0", "")
        script = 'printf "%s" "$0" >&2; exit "$1"'
        await self.bare.with_exec([*self.shell, "-c", script, shown, str(self.exit_code)]).sync()
        raise AssertionError("the command above fails")

    @never_cached
    def terminal(self) -> dagger.Container:
        """Open a shell in the container that ran, as the command has left it."""
        return self._shell_in(self.after)

    @never_cached
    def terminal_before(self) -> dagger.Container:
        """Open a shell in the container that ran, as the command has found it."""
        return self._shell_in(self.before)

    def _shell_in(self, container: dagger.Container | None) -> dagger.Container:
        if container is None:
            raise RuntimeError(f"there is no container to look into: {self.summary}")
        return container.terminal(cmd=self.shell)


@object_type
class Moonmind:
    """Runs MoonMind's container tasks."""

    helper_image: Annotated[
        str, Doc("Lends its static busybox to images that have no shell or no find.")
    ] = DEFAULT_HELPER_IMAGE

    @never_cached
    async def run(  # noqa: PLR0913, PLR0917, its arguments are a command line
        self,
        payload: Annotated[
            dagger.File, Doc("JSON: a queue job, a queue payload, a task, or a bare container.")
        ],
        workspace: Workspace,
        secrets: Annotated[
            list[dagger.Secret] | None,
            Doc("The values of the payload's secretEnv, in its order: env://NAME, file://PATH, …"),
        ] = None,
        job_id: JobId = None,
        image: Annotated[
            str | None, Doc("Run on this image instead of the payload's, e.g. by its digest.")
        ] = None,
        jobs_dir: JobsDir = DEFAULT_WORKDIR,
        timeout_seconds: Annotated[
            int, Doc("Time limit of a command whose payload names none.")
        ] = DEFAULT_TIMEOUT_SECONDS,
    ) -> TaskRun:
        """Run the task of a payload file on a workspace.

        The call succeeds when the task has come to its end, whatever that is:
        `check` is what fails.
        """
        defaults = Defaults(workdir=jobs_dir, timeout_seconds=timeout_seconds)
        task = parse_any(loads(await payload.contents()))
        return await self._run(task, workspace, secrets or [], job_id, image, defaults)

    @never_cached
    async def container(  # noqa: PLR0913, PLR0917, its arguments are a command line
        self,
        image: Annotated[str, Doc("Image reference, by tag or digest.")],
        command: Annotated[
            list[str], Doc("The command, one token after the other: --command=sh,-c,'make test'.")
        ],
        workspace: Workspace,
        env: Annotated[list[str] | None, Doc("NAME=VALUE, for each variable.")] = None,
        secret_names: Annotated[
            list[str] | None, Doc("Names of the variables that get `secrets`, in their order.")
        ] = None,
        secrets: Annotated[
            list[dagger.Secret] | None, Doc("Their values: env://NAME, file://PATH, …")
        ] = None,
        job_id: JobId = None,
        timeout_seconds: Annotated[
            int, Doc("Time limit of the command.")
        ] = DEFAULT_TIMEOUT_SECONDS,
    ) -> TaskRun:
        """Run a command in an image on a workspace: a task from flags alone."""
        variables = dict(_pair(text) for text in env or [])
        task = parse_any(
            {
                "image": image,
                "command": command,
                "env": variables,
                "secretEnv": {name: f"env://{name}" for name in secret_names or []},
                "timeoutSeconds": timeout_seconds,
            }
        )
        return await self._run(task, workspace, secrets or [], job_id, None, Defaults())

    async def _run(
        self,
        task: TaskPayload,
        workspace: dagger.Directory,
        secrets: list[dagger.Secret],
        job_id: str | None,
        image: str | None,
        defaults: Defaults,
    ) -> TaskRun:
        plan = plan_task(task, job_id=job_id or str(uuid4()), defaults=defaults)
        # `changes` is always there to be asked for; nothing is applied by itself.
        plan = dataclasses.replace(plan, image=image or plan.image, write_back=True)
        report, left = await run_in_engine(
            dag, task, plan, workspace, secrets, helper_image=self.helper_image
        )
        code = exit_status(report)
        run_json = dag.file("run.json", report.to_json())
        result = (
            dag.directory()
            .with_directory("artifacts", left.artifacts)
            .with_file("logs/runner.log", left.log, permissions=0o644)
            .with_file("run.json", run_json)
            .with_new_file("payload.json", left.payload)
            .with_new_file("exit-code", f"{code}\n")
        )
        ending = f"{report.outcome}: exit code {code}" + (
            f", {report.error}" if report.error else ""
        )
        # mypy does not see that `object_type` makes a dataclass.
        return TaskRun(  # type: ignore[call-arg]
            exit_code=code,
            outcome=report.outcome.value,
            log=left.log,
            artifacts=left.artifacts,
            changes=left.after.changes(left.before),
            report=run_json,
            result=result,
            summary="".join(f"warning: {w}\n" for w in report.warnings) + ending + "\n",
            tail="\n".join(left.log_tail.splitlines()[-TAIL_LINES:]),
            bare=left.image.container if left.image else None,
            before=left.prepared,
            after=left.finished,
            shell=list(left.image.shell) if left.image else [],
        )


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        # Not repeated: it may be a value whose name was forgotten.
        raise ValueError("env: each must be NAME=VALUE")
    return name, value
