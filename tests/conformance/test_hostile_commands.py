"""Commands that work against their run, by malice or by accident."""

import anyio
import pytest

from moonmind_ext.run.events import Phase
from pipelines.report import Outcome
from tests.conformance.support import Result, Task, Watcher, sh
from tests.engines import Engine


@pytest.mark.parametrize("name", ["logs/runner.log", "metadata/run.json", "metadata/payload.json"])
async def test_a_directory_in_the_place_of_our_file_is_refused(task: Task, name: str) -> None:
    result = await task(*sh(f'mkdir -p "$ARTIFACT_DIR/{name}/sub"; echo out'))

    assert result.report.outcome is Outcome.SUCCEEDED
    assert name in result.report.artifacts.refused
    assert result.log == b"out\n"
    assert (result.artifacts / "metadata" / "run.json").is_file()


async def test_a_command_that_signals_its_group_keeps_its_time_limit(task: Task) -> None:
    result = await task(
        *sh("trap '' TERM; kill 0; sleep 30"), timeoutSeconds=1, gracePeriodSeconds=1
    )

    assert result.report.outcome is Outcome.TIMED_OUT
    assert result.report.duration_seconds < 8


@pytest.mark.parametrize(("signal", "code"), [("USR1", 138), ("INT", 130), ("HUP", 129)])
async def test_a_command_that_signals_its_group_loses_no_artifact(
    task: Task, signal: str, code: int
) -> None:
    result = await task(*sh(f"echo left > $ARTIFACT_DIR/left; kill -{signal} 0; sleep 30"))

    assert result.report.exit_code == code
    assert result.artifact("left") == "left\n"


@pytest.mark.parametrize(
    "script",
    [
        "rm -rf /.moonmind/out/result; mkfifo /.moonmind/out/result",
        "rm -rf /.moonmind/out/specials; mkdir /.moonmind/out/specials",
        "mkfifo /.moonmind/out/ended",
        "mkfifo /.moonmind/control/$JOB_ID",
    ],
)
async def test_a_command_that_meddles_with_our_files_changes_nothing(
    task: Task, script: str
) -> None:
    result = await task(*sh(f"{script}; echo left > $ARTIFACT_DIR/left; exit 3"))

    assert result.report.outcome is Outcome.COMMAND_FAILED
    assert result.report.exit_code == 3
    assert result.artifact("left") == "left\n"


async def test_a_pipe_in_the_place_of_the_stop_file_does_not_stop_the_clock(task: Task) -> None:
    result = await task(*sh("mkfifo /.moonmind/control/$JOB_ID; sleep 60"), timeoutSeconds=1)

    assert result.report.outcome is Outcome.TIMED_OUT


async def test_no_job_finds_anything_of_anothers_control(
    engine: Engine, task: Task, unique: str
) -> None:
    async with engine.session() as session:
        await task(*sh(f"echo x > /.moonmind/control/job-{unique}"), job_id="evil", session=session)
        result = await task(*sh("ls /.moonmind/control"), job_id=f"job-{unique}", session=session)

    assert result.report.outcome is Outcome.SUCCEEDED
    assert result.log == b""


class StopAsItBegins(Watcher):
    """Stops a run when its command is about to start."""

    def __init__(self, stop: anyio.Event) -> None:
        super().__init__()
        self.stop = stop

    def phase_started(self, phase: Phase) -> None:
        if phase is Phase.EXECUTE:
            self.stop.set()


async def test_a_stop_that_comes_before_the_command_counts_too(task: Task) -> None:
    stop = anyio.Event()
    with anyio.fail_after(30):
        result = await task(*sh("sleep 60"), stop=stop, watcher=StopAsItBegins(stop))

    assert result.report.outcome is Outcome.CANCELLED
    assert (result.artifacts / "logs" / "runner.log").exists()


async def at_once(engine: Engine, task: Task, script: str, **second: object) -> list[Result]:
    """Run the same reusable task for two jobs at the same time, in one session."""
    results: dict[str, Result] = {}

    async def run(name: str, **more: object) -> None:
        results[name] = await task(
            *sh(script),
            job_id=name,
            cache="reuse",
            session=session,
            cacheVolumes=[{"name": "moonmind-witness", "target": "/witness"}],
            **more,
        )

    with anyio.fail_after(60):
        async with engine.session() as session, anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: run("one", **second))
            await anyio.sleep(0.1)
            tasks.start_soon(run, "two")
    return [results["one"], results["two"]]


async def test_two_jobs_that_fail_alike_at_once_both_really_ran(
    engine: Engine, task: Task, unique: str
) -> None:
    script = f"echo run >> /witness/{unique}; cat /witness/{unique}; sleep 0.3; exit 4"
    one, two = await at_once(engine, task, script)

    assert sorted([one.log, two.log]) == [b"run\n", b"run\nrun\n"]


async def test_a_stop_of_one_job_is_not_its_twins(engine: Engine, task: Task, unique: str) -> None:
    watcher, stop = Watcher(), anyio.Event()
    script = f"echo up; test -e /witness/{unique} || {{ touch /witness/{unique}; sleep 60; }}"

    async def stop_when_it_prints() -> None:
        await watcher.printed.wait()
        stop.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_when_it_prints)
        one, two = await at_once(engine, task, script, watcher=watcher, stop=stop)

    assert one.report.outcome is Outcome.CANCELLED
    assert two.report.outcome is Outcome.SUCCEEDED


async def test_a_stop_ends_the_wait_for_a_twin_and_not_the_twin(
    engine: Engine, task: Task, unique: str
) -> None:
    stop, watcher = anyio.Event(), Watcher()
    results: dict[str, Result] = {}

    async def run(name: str, **more: object) -> None:
        results[name] = await task(
            *sh(f"echo up {unique}; sleep 4"), job_id=name, cache="reuse", session=session, **more
        )
        stop.set()

    with anyio.fail_after(60):
        async with engine.session() as session, anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: run("first", watcher=watcher))
            await watcher.printed.wait()
            early = anyio.Event()
            tasks.start_soon(lambda: run("second", stop=early))
            await anyio.sleep(1)
            early.set()
            await stop.wait()
            assert list(results) == ["second"]

    assert results["second"].report.outcome is Outcome.CANCELLED
    assert results["second"].report.exit_code is None
    assert results["first"].report.outcome is Outcome.SUCCEEDED
