"""Fixtures for what is between this project and an engine."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from uuid import uuid4

import anyio
import pytest

from moonmind_ext.engine.session import NoEngineError, open_session
from tests.engine.support import Api, Place, Registry, image_registry, session_api


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Somewhere for commands; what a failed test has left running ends with it."""
    place = Place(tmp_path / "bin", tmp_path / "home", uuid4().hex)
    place.bin.mkdir()
    place.home.mkdir()
    yield place
    place.kill()


@pytest.fixture
def api() -> Iterator[Api]:
    with session_api() as api:
        yield api


@pytest.fixture
def registry() -> Iterator[Registry]:
    with image_registry() as registry:
        yield registry


async def _answers() -> str | None:
    try:
        async with open_session(environment=os.environ, open_seconds=30):
            return None
    except NoEngineError as error:
        return str(error).replace("\n", " ")


@cache
def _real_engine_problem() -> str | None:
    return anyio.run(_answers)


@pytest.fixture
def real_engine() -> None:
    """Skip where `moonmind-ext run` would find no real engine; asked once."""
    if problem := _real_engine_problem():
        pytest.skip(problem)
