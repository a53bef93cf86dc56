"""The embedded engine on real processes, through the real SDK."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import dagger
import pytest

from moonmind_ext.embedded import sandbox_problem, serve
from tests.embedded.support import Connect, connected


@pytest.fixture(scope="session")
def sandbox() -> None:
    """Skip where no sandbox can be made."""
    if problem := sandbox_problem():
        pytest.skip(problem)


@pytest.fixture
def connect(sandbox: None, tmp_path: Path) -> Connect:
    """Open an engine and a client of it.

    By the test itself: a fixture is entered and left in two tasks, a task group in one.
    """

    @asynccontextmanager
    async def opened(**options: object) -> AsyncIterator[dagger.Client]:
        options.setdefault("state_dir", tmp_path / "state")
        async with serve(**options) as engine, connected(engine) as client:  # type: ignore[arg-type]
            yield client

    return opened
