import os
import subprocess
from pathlib import Path

import pytest

from moonmind_ext.embedded import sandbox_problem
from moonmind_ext.workspace.send import Size, WorkspaceError, measure
from tests.workspace.support import as_ordinary_user


def test_a_workspace_is_measured_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("12345")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "b").write_text("123")
    (tmp_path / "loop").symlink_to(tmp_path)

    size = measure(tmp_path)

    assert size.files == 3
    assert size.bytes == 8 + len(os.fspath(tmp_path))


def test_an_empty_workspace_has_no_files(tmp_path: Path) -> None:
    assert measure(tmp_path) == Size(0, 0)


def test_what_is_no_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="missing"):
        measure(tmp_path / "missing")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    printed = as_ordinary_user(
        tmp_path,
        """
        from moonmind_ext.workspace.send import *
        Path("private").write_text("x")
        Path("private").chmod(0)
        try: measure(Path.cwd())
        except WorkspaceError as error: print(error)
        """,
    )

    assert "private: cannot be read" in printed


def test_what_a_filter_leaves_out_may_be_unreadable_and_nothing_else(tmp_path: Path) -> None:
    if problem := sandbox_problem():
        pytest.skip(f"the embedded engine cannot run here: {problem}")
    printed = as_ordinary_user(
        tmp_path,
        """
        import anyio
        from moonmind_ext.engine.choice import EngineChoice
        from moonmind_ext.engine.session import open_session
        from moonmind_ext.workspace.send import *
        root = Path.cwd() / "workspace"
        root.mkdir()
        (root / "private").write_text("x")
        (root / "private").chmod(0)
        (root / "open").write_text("x")

        async def main():
            async with open_session(EngineChoice.EMBEDDED, environment=os.environ) as session:
                for pattern in ("private", "other"):
                    chosen = WorkspaceFilter(exclude=[pattern])
                    try:
                        sent, _ = await send_workspace(session.client, root, chosen)
                        print(await sent.entries())
                    except WorkspaceError as error:
                        print(error)

        anyio.run(main)
        """,
    )

    first, second = printed.splitlines()
    assert first == "['open']"
    assert "cannot be read" in second
    assert "private" in second


def test_what_is_left_out_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "big").write_text("12345")
    (tmp_path / "a").write_text("1")

    assert measure(tmp_path, ["out"]) == Size(1, 1)
