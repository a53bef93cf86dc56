"""The module's objects in this process, on the embedded engine."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from dagger.client._session import ConnectParams, SharedConnection

from moonmind_ext.embedded import sandbox_problem, serve

Engine = Callable[[], AbstractAsyncContextManager[None]]


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Connect `dagger.dag`, as the module runtime does, for the time of a context."""
    if problem := sandbox_problem():
        pytest.skip(f"the embedded engine cannot run here: {problem}")

    @asynccontextmanager
    async def connected() -> AsyncIterator[None]:
        shared = SharedConnection()
        async with serve(state_dir=tmp_path / "state") as served:
            shared.with_params(ConnectParams(port=served.port, session_token=served.token))
            try:
                yield
            finally:
                await shared.close()
                SharedConnection._params = None
                shared._params = None

    return connected
