"""The same task by the SDK's calls alone: the floor that nothing of ours can go below."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import dagger

from benchmarks.bench import Desk

_LOG = "/bare/log"


@dataclass(frozen=True, slots=True)
class Bare:
    """A session of the SDK's own, on the same engine."""

    client: dagger.Client
    image: str

    async def run(self, *command: str, workspace: Path, output: Path) -> None:
        """Send a workspace, run a command, fetch exit code, output and artifacts."""
        client = self.client
        sent = await client.host().directory(str(workspace), no_cache=True).sync()
        container = (
            client.container()
            .from_(self.image)
            .with_mounted_directory("/work", sent)
            .with_mounted_directory("/artifacts", client.directory())
            .with_workdir("/work")
            # Or the engine would remember the run before.
            .with_env_variable("RUN", uuid4().hex)
            .with_exec(list(command))
        )
        assert await container.exit_code() == 0
        await container.stdout()
        await container.directory("/artifacts").export(str(output))

    async def print(self, *command: str, output: Path) -> None:
        """Run a command that prints much, and fetch its output as a file."""
        container = (
            self.client.container()
            .from_(self.image)
            .with_mounted_directory("/bare", self.client.directory())
            .with_env_variable("RUN", uuid4().hex)
            .with_exec(list(command), redirect_stdout=_LOG)
        )
        await container.file(_LOG).export(str(output))


@asynccontextmanager
async def bare(desk: Desk) -> AsyncIterator[Bare]:
    """Open a session as the SDK does it; on the embedded engine there is only ours."""
    if desk.session.kind == "embedded":
        yield Bare(desk.session.client, desk.bench.image)
        return
    async with dagger.Connection(dagger.Config()) as client:
        yield Bare(client, desk.bench.image)
