from pipelines.report import Outcome
from tests.conformance.support import Result, Task, sh
from tests.engines import Engine

WITNESS = [{"name": "moonmind-witness", "target": "/witness"}]
"""A volume is the witness of what really ran: each start leaves a line in it."""


async def run(task: Task, name: str, script: str = "", **fields: object) -> Result:
    count = f"echo run >> /witness/{name}; cat /witness/{name}; {script}"
    return await task(*sh(count), cacheVolumes=WITNESS, **fields)


async def reuse(engine: Engine, task: Task, name: str, script: str, *, jobs: int) -> list[Result]:
    """Run the same task for several jobs of one repository, in one session."""
    async with engine.session() as session:
        return [
            await run(task, name, script, cache="reuse", job_id=f"job-{n}", session=session)
            for n in range(jobs)
        ]


async def test_the_same_payload_twice_really_runs_twice(task: Task, unique: str) -> None:
    first = await run(task, unique)
    second = await run(task, unique)

    assert first.log == b"run\n"
    assert second.log == b"run\nrun\n"
    assert not second.report.cached


async def test_the_same_job_twice_really_runs_twice(
    engine: Engine, task: Task, unique: str
) -> None:
    async with engine.session() as session:
        await run(task, unique, job_id="job-1", session=session)
        second = await run(task, unique, job_id="job-1", session=session)

    assert second.log == b"run\nrun\n"


async def test_reuse_runs_once_for_two_jobs(engine: Engine, task: Task, unique: str) -> None:
    first, second = await reuse(engine, task, unique, "echo $JOB_ID > $ARTIFACT_DIR/id", jobs=2)

    assert first.report.exit_code == second.report.exit_code == 0
    assert not first.report.cached
    assert second.report.cached
    assert first.log == second.log == b"run\n"
    assert first.artifact("id") == second.artifact("id")
    assert first.artifact("id").startswith("widgets-")


async def test_a_failure_is_never_reused(engine: Engine, task: Task, unique: str) -> None:
    first, second, third = await reuse(engine, task, unique, "exit 4", jobs=3)

    assert first.log == b"run\n"
    assert second.log == b"run\nrun\n"
    assert third.log == b"run\nrun\nrun\n"
    assert third.report.outcome is Outcome.COMMAND_FAILED
    assert not third.report.cached


async def test_the_first_success_after_failures_is_reused(
    engine: Engine, task: Task, unique: str
) -> None:
    third_time = f'test "$(wc -l < /witness/{unique})" -ge 3'
    *_, third, fourth = await reuse(engine, task, unique, third_time, jobs=4)

    assert third.report.exit_code == 0
    assert not third.report.cached
    assert fourth.report.cached
    assert fourth.log == b"run\nrun\nrun\n"
