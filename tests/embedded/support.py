"""A client of the embedded engine, and the containers that tests start from."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import dagger
from dagger.client._config import ConnectConfig
from dagger.client._session import ConnectParams, SingleConnection

from moonmind_ext.embedded import EmbeddedEngine

Connect = Callable[..., AbstractAsyncContextManager[dagger.Client]]


@asynccontextmanager
async def connected(engine: EmbeddedEngine) -> AsyncIterator[dagger.Client]:
    """Connect the real SDK; it never repeats a query."""
    params = ConnectParams(port=engine.port, session_token=engine.token)
    async with SingleConnection(params, ConnectConfig(retry=None)) as connection:
        yield dagger.Client.from_connection(connection)


def host(client: dagger.Client) -> dagger.Container:
    """Make a container over this host's own root."""
    return client.container().from_("docker.io/library/alpine:3")


def shell(container: dagger.Container, script: str, **options: object) -> dagger.Container:
    """Run a script in it."""
    return container.with_exec(["sh", "-c", script], **options)  # type: ignore[arg-type]
