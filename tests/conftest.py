"""What tests of several packages need."""

from uuid import uuid4

import pytest

from moonmind_ext.engine.choice import EngineChoice
from tests.engines import EMBEDDED_IMAGES, Engine, real_engine, real_engine_problem


@pytest.fixture(params=["embedded", "dagger"])
def engine(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Engine:
    if request.param == "embedded":
        from moonmind_ext.embedded import sandbox_problem

        if problem := sandbox_problem():
            pytest.skip(f"the embedded engine cannot run here: {problem}")
        # Its cache volumes are kept there.
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return Engine(EngineChoice.EMBEDDED, EMBEDDED_IMAGES)
    if problem := real_engine_problem():
        pytest.skip(problem)
    return real_engine()


@pytest.fixture
def unique() -> str:
    """A name that no earlier test run has used: real engines remember."""
    return uuid4().hex[:12]
