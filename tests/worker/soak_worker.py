"""`moonmind-ext worker` with one more door: SIGUSR1 kills the embedded engine in it."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from moonmind_ext import embedded
from moonmind_ext.cli import main

_serve = embedded.serve


@asynccontextmanager
async def serve_mortal(**settings: Any) -> AsyncIterator[embedded.EmbeddedEngine]:
    async with _serve(**settings) as engine:
        # What `EmbeddedEngine.kill` does, without the wait.
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, engine._app.die)
        yield engine


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, lambda *_: None)
    embedded.serve = serve_mortal
    main()
