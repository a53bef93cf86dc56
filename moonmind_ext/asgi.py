"""A small HTTP server inside this process, for as long as its owner wants it."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import uvicorn

from pipelines.concurrency import task_group

STOP_SECONDS = 2
"""For requests under way when the server stops. Their senders are being closed
too, so what is not done by then is waiting for nothing."""

TICK_SECONDS = 0.1
"""As uvicorn has it: every tenth tick sets the date of the answers."""


@asynccontextmanager
async def serve(app: object, *, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[int]:
    """Serve an ASGI application, by default on a free port of the loopback interface.

    Parameters
    ----------
    host
        The address of an interface.
    port
        0 takes a free one.

    Yields
    ------
    int
        The port; it takes connections already.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    # asyncio sets it on sockets of its own making only; without it every answer
    # waits 40 ms for an acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=STOP_SECONDS,
        timeout_keep_alive=60,
    )
    server = _Server(config)
    with listener:
        async with task_group() as tasks:
            # Not `start`: cancelled, that would wait for the server before it is told to stop.
            tasks.start_soon(server.run_until_told, listener)
            try:
                await server.up.wait()
                yield listener.getsockname()[1]
            finally:
                server.told.set()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: signals are the command line's.

    Attributes
    ----------
    up
        Set when it takes connections.
    told
        To be set for it to end.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = anyio.Event()
        self.told = anyio.Event()

    async def run_until_told(self, listener: socket.socket) -> None:
        """Serve until `told` is set, also when this is cancelled."""
        # Cancelled, it would leave the listener's number with the event loop, and the
        # next listener to get that number would never hear of a connection.
        with anyio.CancelScope(shield=True):
            await self._serve(sockets=[listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.up.set()

    async def main_loop(self) -> None:
        """Wait for the end; uvicorn's own looks for it ten times a second."""
        ticks = 0
        while not self.told.is_set() and not await self.on_tick(ticks):
            ticks += 1
            with anyio.move_on_after(TICK_SECONDS):
                await self.told.wait()
