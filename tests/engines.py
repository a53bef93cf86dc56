"""Whether there is a real engine to test on."""

import os
from functools import cache

import anyio

from moonmind_ext.engine.session import NoEngineError, open_session


async def _answers() -> str | None:
    try:
        async with open_session(environment=os.environ, open_seconds=30):
            return None
    except NoEngineError as error:
        return str(error).replace("\n", " ")


@cache
def real_engine_problem() -> str | None:
    """Say why `moonmind-ext run` would find no real engine; asked once."""
    return anyio.run(_answers)
