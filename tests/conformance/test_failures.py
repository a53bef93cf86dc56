import os
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from moonmind_ext import embedded
from moonmind_ext.engine.choice import EngineChoice
from pipelines.report import Outcome
from tests.conformance.support import Result, Task, Watcher, sh
from tests.engines import Engine


async def run_and_break(
    engine: Engine, task: Task, break_it: Callable[[], Awaitable[object]]
) -> Result:
    """Run a long task, and break something as soon as it prints."""
    watcher = Watcher()

    async def when_it_prints() -> None:
        await watcher.printed.wait()
        await break_it()

    # A hang is what must never come of it.
    with anyio.fail_after(60):
        async with engine.session() as session, anyio.create_task_group() as tasks:
            tasks.start_soon(when_it_prints)
            return await task(*sh("echo up; sleep 300"), watcher=watcher, session=session)
    raise AssertionError


def assert_engine_failed(result: Result) -> None:
    report = result.report
    assert report.outcome is Outcome.ENGINE_FAILED
    assert report.exit_code is None
    assert report.retryable
    assert report.error
    assert (result.artifacts / "metadata" / "run.json").exists()
    assert "engine-failed" in (result.output / "logs" / "execute.log").read_text()


async def test_an_engine_that_is_killed_in_the_middle_is_its_own_failure(
    engine: Engine, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine.choice is EngineChoice.EMBEDDED:
        serve = embedded.serve
        engines: list[embedded.EmbeddedEngine] = []

        @asynccontextmanager
        async def remember(**settings: Any) -> AsyncIterator[embedded.EmbeddedEngine]:
            async with serve(**settings) as running:
                engines.append(running)
                yield running

        async def kill() -> None:
            await engines[0].kill()

        monkeypatch.setattr(embedded, "serve", remember)
    else:
        command = os.environ.get("MOONMIND_TEST_RESTART_ENGINE")
        if not command:
            pytest.skip("MOONMIND_TEST_RESTART_ENGINE names no command that restarts the engine")

        async def kill() -> None:
            await anyio.run_process(shlex.split(command))

    assert_engine_failed(await run_and_break(engine, task, kill))


async def test_the_next_task_works_after_that(engine: Engine, task: Task) -> None:
    result = await task(*sh("echo fine"))

    assert result.log == b"fine\n"


async def test_a_payload_that_must_not_be_repeated_is_not_retryable(
    engine: Engine, task: Task
) -> None:
    async with engine.session() as session:
        await session.client._ctx.conn.close()
        result = await task("true", session=session, retryable=False)

    assert result.report.outcome is Outcome.ENGINE_FAILED
    assert not result.report.retryable


async def test_a_session_that_is_lost_is_an_engine_failure(engine: Engine, task: Task) -> None:
    async with engine.session() as session:
        await session.client._ctx.conn.close()
        result = await task("true", session=session)

    assert_engine_failed(result)


async def test_a_command_that_kills_its_supervisor_fails_by_itself(task: Task) -> None:
    result = await task(*sh("echo last; kill -9 $PPID; sleep 5"))

    assert result.report.outcome is Outcome.COMMAND_FAILED
    assert result.report.exit_code == 137
    assert any("lost" in warning for warning in result.report.warnings)


async def test_two_tasks_run_side_by_side_and_know_their_own(engine: Engine, task: Task) -> None:
    results: dict[str, Result] = {}

    async def run(name: str) -> None:
        results[name] = await task(
            *sh(f"for i in 1 2 3; do echo {name}; sleep 0.2; done; echo {name} > $ARTIFACT_DIR/f"),
            session=session,
        )

    async with engine.session() as session, anyio.create_task_group() as tasks:
        for name in ("one", "two", "three"):
            tasks.start_soon(run, name)

    for name, result in results.items():
        assert result.log.decode() == f"{name}\n" * 3
        assert result.watcher.live == f"{name}\n" * 3
        assert result.artifact("f") == f"{name}\n"
