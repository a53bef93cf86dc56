"""The same cases on every engine there is.

The embedded engine needs a sandbox. A real one is found as `moonmind-ext run` finds
it; the images it needs come from the public registries, or by the same names from
the registry in MOONMIND_TEST_REGISTRY (docs/testing.md).
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import anyio.from_thread
import pytest

from moonmind_ext.engine.session import EngineSession
from moonmind_ext.run.task import RunRequest, run_task
from pipelines.payload import parse_any
from pipelines.plan import plan_task
from tests.conformance.support import Result, Task, Watcher
from tests.engines import Engine


@pytest.fixture
def task(engine: Engine, tmp_path: Path) -> Task:
    """Run a container on an engine; what is no keyword of ours is one of its fields."""

    async def run(
        *command: str,
        image: str = "base",
        files: dict[str, str] | None = None,
        secrets: dict[str, str] | None = None,
        job_id: str | None = None,
        session: EngineSession | None = None,
        stop: anyio.Event | None = None,
        watcher: Watcher | None = None,
        workspace: Path | None = None,
        make: bool = True,
        log_limit_bytes: int = 16 << 20,
        repository: str = "acme/widgets",
        fields: dict[str, Any] | None = None,
        **more_fields: Any,
    ) -> Result:
        name = job_id or f"t-{uuid4().hex[:8]}"
        folder = workspace or tmp_path / f"workspace-{name}"
        if make:
            folder.mkdir(exist_ok=True)
        for path, content in ({"README.md": "# widgets\n"} if files is None else files).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content)
        output = tmp_path / f"output-{name}"
        chosen = {**(fields or {}), **more_fields}
        container = {"image": engine.image(image), "command": list(command), **chosen}
        payload = parse_any(container, repository=repository)
        watcher = watcher or Watcher()
        async with engine.session() if session is None else nullcontext(session) as opened:
            report = await run_task(
                opened,
                RunRequest(
                    payload=payload,
                    plan=plan_task(payload, job_id=name),
                    workspace=folder,
                    output=output,
                    secrets=secrets or {},
                    log_limit_bytes=log_limit_bytes,
                    helper_image=engine.image("busybox"),
                ),
                watcher,
                stop=stop,
            )
        assert payload.task.container is not None
        artifacts = output / payload.task.container.artifacts_subdir
        return Result(report, watcher, output, folder, artifacts)

    return run


@pytest.fixture
def in_session(engine: Engine) -> Iterator[Callable[..., Any]]:
    """Run something in a session that stays open, as hypothesis needs it."""

    async def keep(ready: Callable[[EngineSession], None]) -> None:
        async with engine.session() as session:
            ready(session)
            await done.wait()

    with anyio.from_thread.start_blocking_portal() as portal:
        done = portal.call(anyio.Event)
        sessions: list[EngineSession] = []
        opened = portal.call(anyio.Event)

        def ready(session: EngineSession) -> None:
            sessions.append(session)
            opened.set()

        future = portal.start_task_soon(keep, ready)
        portal.call(opened.wait)

        def run(work: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
            return portal.call(work, sessions[0], *arguments)

        yield run
        portal.call(done.set)
        future.result(60)
