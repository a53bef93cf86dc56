"""A place where workers work."""

from pathlib import Path

import pytest

from tests.engines import Engine
from tests.worker.support import Site, make_origin


@pytest.fixture
def site(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Each engine there is, with a repository `acme/widgets` to clone."""
    origin = make_origin(tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(origin.config))
    (tmp_path / "jobs").mkdir()
    return Site(tmp_path, origin, engine)
