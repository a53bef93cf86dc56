"""Fixtures for what is between this project and an engine."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.engine.support import Api, Place, Registry, image_registry, session_api
from tests.engines import real_engine_problem


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


@pytest.fixture
def real_engine() -> None:
    """Skip where `moonmind-ext run` would find no real engine; asked once."""
    if problem := real_engine_problem():
        pytest.skip(problem)
