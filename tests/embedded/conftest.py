"""The embedded engine on real processes, through the real SDK."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import dagger
import pytest
from dagger.client._config import ConnectConfig
from dagger.client._session import ConnectParams, SingleConnection

from moonmind_ext.embedded import EmbeddedEngine, sandbox_problem, serve

Connect = Callable[..., AbstractAsyncContextManager[dagger.Client]]


@pytest.fixture(scope="session")
def sandbox() -> None:
    """Skip where no sandbox can be made."""
    if problem := sandbox_problem():
        pytest.skip(problem)


@asynccontextmanager
async def connected(engine: EmbeddedEngine) -> AsyncIterator[dagger.Client]:
    """Connect the real SDK; it never repeats a query."""
    params = ConnectParams(port=engine.port, session_token=engine.token)
    async with SingleConnection(params, ConnectConfig(retry=None)) as connection:
        yield dagger.Client.from_connection(connection)


@pytest.fixture
def connect(sandbox: None, tmp_path: Path) -> Connect:
    """Open an engine and a client of it: a fixture cannot hold both, since task groups stay in one task."""

    @asynccontextmanager
    async def opened(**options: object) -> AsyncIterator[dagger.Client]:
        options.setdefault("state_dir", tmp_path / "state")
        async with serve(**options) as engine, connected(engine) as client:  # type: ignore[arg-type]
            yield client

    return opened


def host(client: dagger.Client) -> dagger.Container:
    """Make a container over this host's own root."""
    return client.container().from_("docker.io/library/alpine:3")


def shell(container: dagger.Container, script: str, **options: object) -> dagger.Container:
    return container.with_exec(["sh", "-c", script], **options)  # type: ignore[arg-type]
