"""A change of what the module declares is seen here, and made on purpose.

To store the new one: python -m tests.module.store_api
"""

from pathlib import Path

from tests.module.listing import STORED, listing


def test_the_declared_api_is_the_stored_one() -> None:
    assert listing() == STORED.read_text("utf-8")


def test_everything_that_is_shown_is_documented() -> None:
    lines = listing().splitlines()
    undocumented = [line for line in lines if line.strip() == "None" or line.endswith("-> None")]
    assert undocumented == []


def test_the_workspace_is_the_repository_by_itself() -> None:
    assert listing().count("--workspace: Directory, default path /,") == 2


def test_what_runs_a_task_is_never_answered_from_the_cache() -> None:
    lines = listing().splitlines()
    assert "  run -> TaskRun (cache: never)" in lines
    assert "  container -> TaskRun (cache: never)" in lines


def test_the_upload_leaves_out_what_the_module_does_not_need() -> None:
    import json

    config = json.loads((Path(__file__).parents[2] / "dagger.json").read_text("utf-8"))
    assert {"!.git", "!.venv", "!docs", "!moonmind_ext", "!tests"} <= set(config["include"])
