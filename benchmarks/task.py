"""One warm empty task: against Docker, against the bare engine calls, embedded."""

import subprocess
from collections.abc import AsyncIterator

import anyio

from benchmarks.bare import bare
from benchmarks.bench import Bench, Desk, desk, find_docker
from benchmarks.figures import Bound, Figure
from benchmarks.measure import CPU, MILLISECONDS, SECONDS, Act, Watch, side_by_side
from benchmarks.workload import Repository
from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.session import NoEngineError

OURS = "a task"
BARE = "bare engine calls"
DOCKER = "docker image inspect + docker run"
COMMAND = "the command alone"

VS_DOCKER = (
    "task/docker",
    "a warm empty task, whole run with events and files, against Docker",
    (Bound("ratio", 0.5),),
)
VS_BARE = ("task/bare", "the same against the bare engine calls", (Bound("ratio", 1.5),))
TASK_CPU = ("task/cpu", "our process's own CPU for it", (Bound("a", 50),))
CHECKOUT = ("task/checkout", "a task on a git checkout of 100 files against one without git")
EMBEDDED = (
    "task/embedded",
    "a warm empty task in the embedded engine, on top of the command",
    (Bound("difference", 60),),
)


async def measure(bench: Bench) -> AsyncIterator[Figure]:
    """Measure what one task costs."""
    async for figure in _real(bench):
        yield figure
    yield await _embedded(bench)


async def _real(bench: Bench) -> AsyncIterator[Figure]:
    docker_is_there, docker = await find_docker(bench.image)
    try:
        async with desk(bench, EngineChoice.DAGGER) as ours, bare(ours) as floor:

            async def task(watch: Watch) -> None:
                with watch:
                    await ours.run("true")

            async def calls(watch: Watch) -> None:
                with watch:
                    output = bench.new_path("bare")
                    await floor.run("true", workspace=ours.workspace, output=output)

            sides: dict[str, Act] = {OURS: task, BARE: calls}
            if docker_is_there:
                sides[DOCKER] = _docker_run(bench, ours)
            measured = await side_by_side(sides, rounds=bench.rounds)
            name, what, bounds = VS_DOCKER
            if docker_is_there:
                yield measured.figure(name, what, OURS, DOCKER, SECONDS, bounds)
            else:
                yield Figure(name=name, what=what, bounds=bounds, missing=docker)
            name, what, bounds = VS_BARE
            yield measured.figure(name, what, OURS, BARE, SECONDS, bounds)
            name, what, bounds = TASK_CPU
            yield measured.figure(name, what, OURS, BARE, CPU, bounds)
            yield await _checkout(bench, ours, task)
    except NoEngineError as error:
        missing = " ".join(str(error).split())
        for name, what, bounds in (VS_DOCKER, VS_BARE, TASK_CPU):
            yield Figure(name=name, what=what, bounds=bounds, missing=missing)
        yield Figure(name=CHECKOUT[0], what=CHECKOUT[1], missing=missing)


def _docker_run(bench: Bench, ours: Desk) -> Act:
    """Do with Docker what MoonMind's worker does without this project."""
    volume = f"{ours.workspace}:/work"

    async def act(watch: Watch) -> None:
        artifacts = bench.new_path("docker")
        artifacts.mkdir()
        with watch:
            for command in (
                ["docker", "image", "inspect", bench.image],
                [
                    *("docker", "run", "--rm", "--workdir", "/work", "--volume", volume),
                    *("--volume", f"{artifacts}:/artifacts", bench.image, "true"),
                ],
            ):
                await anyio.run_process(command, stdin=subprocess.DEVNULL)

    return act


async def _checkout(bench: Bench, ours: Desk, task: Act) -> Figure:
    repository = Repository.make(bench.new_path("origin"), files=100)
    checkout = repository.clone(bench.new_path("checkout"))
    there = "on a checkout"

    async def on_checkout(watch: Watch) -> None:
        with watch:
            await ours.run("true", workspace=checkout)

    measured = await side_by_side({there: on_checkout, OURS: task}, rounds=bench.rounds)
    return measured.figure(*CHECKOUT, there, OURS)


async def _embedded(bench: Bench) -> Figure:
    name, what, bounds = EMBEDDED
    try:
        async with desk(bench, EngineChoice.EMBEDDED) as ours:

            async def task(watch: Watch) -> None:
                with watch:
                    await ours.run("true")

            async def command(watch: Watch) -> None:
                with watch:
                    await anyio.run_process(["true"], cwd=ours.workspace)

            measured = await side_by_side({OURS: task, COMMAND: command}, rounds=bench.rounds)
    except NoEngineError as error:
        return Figure(name=name, what=what, unit="ms", bounds=bounds, missing=str(error))
    return measured.figure(name, what, OURS, COMMAND, MILLISECONDS, bounds)
