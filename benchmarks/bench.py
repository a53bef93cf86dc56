"""What there is to measure on, and how often."""

import os
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import anyio

from benchmarks.figures import Figure
from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.session import EngineSession, NoEngineError, docker_problem, open_session
from moonmind_ext.run.events import Event, Phase
from moonmind_ext.run.task import RunRequest, run_task
from pipelines.payload import parse_any
from pipelines.plan import plan_task
from pipelines.report import Outcome, RunReport

IMAGE = "busybox:1.36"
QUICK_ROUNDS = 3
ROUNDS = 15

NOT_QUICK = "takes too long for a quick run"


@dataclass(frozen=True, slots=True)
class Bench:
    """What a group of figures measures with.

    Attributes
    ----------
    folder
        For everything that is written; removed at the end.
    quick
        Whether to leave out what takes long.
    rounds
        How often each side is measured.
    """

    folder: Path
    quick: bool
    rounds: int

    @property
    def image(self) -> str:
        """The image of all tasks, by the name that engine and Docker know it by."""
        registry = os.environ.get("MOONMIND_TEST_REGISTRY", "docker.io/library")
        return f"{registry}/{IMAGE}"

    def new_path(self, name: str) -> Path:
        """Give a path where nothing is."""
        return self.folder / f"{name}-{uuid4().hex[:8]}"


Group = Callable[[Bench], AsyncIterator[Figure]]
"""Gives its figures one by one, so that what breaks one leaves those before it."""


class Watcher:
    """Keeps nothing but a count: what an observer does is not ours to measure."""

    def __init__(self) -> None:
        self.events = 0

    def event(self, event: Event) -> None:  # noqa: ARG002
        """Count an event."""
        self.events += 1

    def phase_started(self, phase: Phase) -> None:
        """Do nothing."""

    def phase_finished(self, phase: Phase, seconds: float) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class Desk:
    """A session with an engine, as a worker has it.

    Attributes
    ----------
    workspace
        Of every task: one file, no repository.
    """

    bench: Bench
    session: EngineSession
    workspace: Path

    async def run(
        self, *command: str, output: Path | None = None, workspace: Path | None = None
    ) -> RunReport:
        """Run a task to its last file; one that does not succeed is an error."""
        container = {"image": self.bench.image, "command": list(command)}
        payload = parse_any(container, repository="acme/widgets")
        # No two runs have the same name, as no two jobs have.
        output = output or self.bench.new_path("output")
        report = await run_task(
            self.session,
            RunRequest(
                payload=payload,
                plan=plan_task(payload, job_id=output.name),
                workspace=workspace or self.workspace,
                output=output,
                helper_image=self.bench.image,
            ),
            Watcher(),
        )
        if report.outcome is not Outcome.SUCCEEDED:
            raise RuntimeError(f"the task did not succeed: {report.error}")
        return report


@asynccontextmanager
async def desk(bench: Bench, choice: EngineChoice) -> AsyncIterator[Desk]:
    """Open a session.

    Raises
    ------
    NoEngineError
        When there is no such engine.
    """
    if choice is EngineChoice.EMBEDDED:
        # Its cache volumes are kept there.
        os.environ["XDG_CACHE_HOME"] = str(bench.folder)
    workspace = bench.new_path("workspace")
    workspace.mkdir()
    (workspace / "README.md").write_text("# Widgets\n")
    async with open_session(choice, environment=os.environ, for_many=True) as session:
        yield Desk(bench, session, workspace)


async def find_engine() -> tuple[EngineChoice | None, str]:
    """Find the best engine there is: a real one, else the embedded one.

    Returns
    -------
    tuple
        What to open, and what it is, or why there is none.
    """
    problems = []
    for choice in (EngineChoice.DAGGER, EngineChoice.EMBEDDED):
        try:
            async with open_session(choice, environment=os.environ, for_many=True) as session:
                return choice, f"{session.kind} {session.version}"
        except NoEngineError as error:
            problems.append(" ".join(str(error).split()))
    return None, "; ".join(problems)


async def find_docker(image: str) -> tuple[bool, str]:
    """Say whether Docker is there with an image, and its version or why not."""
    if problem := await docker_problem(os.environ):
        return False, problem
    if (await _docker("image", "inspect", image)).returncode:
        pulled = await _docker("pull", image)
        if pulled.returncode:
            return False, f"docker pull {image}: {pulled.stderr.decode().strip()[-300:]}"
    version = await _docker("version", "--format", "{{.Server.Version}}")
    return True, version.stdout.decode().strip()


async def _docker(*arguments: str) -> "subprocess.CompletedProcess[bytes]":
    return await anyio.run_process(["docker", *arguments], check=False, stdin=subprocess.DEVNULL)
