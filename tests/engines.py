"""The engines that there are to test on."""

import os
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import cache

import anyio
import pytest

from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.session import EngineSession, NoEngineError, open_session

EMBEDDED_IMAGES = {
    "base": "docker.io/library/busybox:1.36",
    "python": "docker.io/library/python:3.11-slim",
    "busybox": "embedded.test/busybox",
    "no-shell": "embedded.test/no-shell",
    "not-root": "embedded.test/not-root",
    "entrypoint": "embedded.test/entrypoint",
    "missing": "embedded.test/missing:1",
}
PUBLIC_IMAGES = {
    "base": "docker.io/library/busybox:1.36",
    "busybox": "docker.io/library/busybox:1.36",
    "python": "docker.io/library/python:3.11-slim",
    "missing": "docker.io/library/there-is-no-such-image:1",
}
REGISTRY_IMAGES = {
    "base": "busybox:1.36",
    "busybox": "busybox:1.36",
    "python": "python:3.11-slim",
    "no-shell": "no-shell:1",
    "not-root": "not-root:1",
    "entrypoint": "entrypoint:1",
    "missing": "there-is-no-such-image:1",
}


@dataclass(frozen=True)
class Engine:
    """An engine to test on."""

    choice: EngineChoice
    images: dict[str, str]

    def session(self) -> AbstractAsyncContextManager[EngineSession]:
        return open_session(self.choice, environment=os.environ)

    def image(self, name: str) -> str:
        if name not in self.images:
            pytest.skip(f"the image {name!r} is only in a registry of MOONMIND_TEST_REGISTRY")
        return self.images[name]


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


def real_engine() -> Engine:
    """Give the one that `moonmind-ext run` would find."""
    registry = os.environ.get("MOONMIND_TEST_REGISTRY")
    if registry:
        images = {name: f"{registry}/{image}" for name, image in REGISTRY_IMAGES.items()}
        return Engine(EngineChoice.DAGGER, images)
    return Engine(EngineChoice.DAGGER, PUBLIC_IMAGES)
