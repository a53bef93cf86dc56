import os
import stat
from pathlib import Path

import pytest

from moonmind_ext.workspace.write_back import Changes, apply_changes


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    return folder


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    folder = tmp_path / "staging"
    folder.mkdir()
    return folder


def test_nothing_is_written_through_a_link_of_the_workspace(
    workspace: Path, staging: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (workspace / "link").symlink_to(outside)
    (staging / "link").mkdir()
    (staging / "link" / "file").write_text("evil")

    done = apply_changes(staging, workspace, Changes(("link/file",), (), ("link/other",)))

    assert list(outside.iterdir()) == []
    assert set(done.refused) == {"link/file", "link/other"}
    assert "symbolic link" in done.refused["link/file"]


@pytest.mark.parametrize("path", ["../evil", "/evil", "a/../../evil"])
def test_a_path_that_leads_out_is_refused(
    workspace: Path, staging: Path, tmp_path: Path, path: str
) -> None:
    done = apply_changes(staging, workspace, Changes((), (), (path,)))

    assert set(done.refused) == {path}


def test_a_link_of_the_workspace_that_became_a_directory_is_replaced(
    workspace: Path, staging: Path, tmp_path: Path
) -> None:
    (workspace / "link").symlink_to(tmp_path)
    (staging / "link").mkdir()
    (staging / "link" / "file").write_text("inside")

    done = apply_changes(staging, workspace, Changes(("link/", "link/file"), (), ("link",)))

    assert done.refused == {}
    assert not (workspace / "link").is_symlink()
    assert (workspace / "link" / "file").read_text() == "inside"


def test_a_removed_directory_that_holds_a_git_directory_stays(
    workspace: Path, staging: Path
) -> None:
    (workspace / "vendor" / "lib" / ".git").mkdir(parents=True)
    done = apply_changes(staging, workspace, Changes((), (), ("vendor/",)))

    assert (workspace / "vendor" / "lib" / ".git").is_dir()
    assert ".git" in done.refused["vendor/"]


def test_modes_and_links_arrive(workspace: Path, staging: Path) -> None:
    (staging / "run").write_text("x")
    (staging / "run").chmod(0o4755)
    (staging / "dir").mkdir(mode=0o750)
    (staging / "dir").chmod(0o750)
    (staging / "link").symlink_to("dir")

    done = apply_changes(staging, workspace, Changes(("dir/", "link", "run"), (), ()))

    assert stat.S_IMODE((workspace / "run").stat().st_mode) == 0o755
    assert stat.S_IMODE((workspace / "dir").stat().st_mode) == 0o750
    assert os.readlink(workspace / "link") == "dir"
    assert set(done.refused) == {"run"}
    assert done.added == ["dir/", "link", "run"]


def test_what_is_gone_already_is_no_failure(workspace: Path, staging: Path) -> None:
    done = apply_changes(staging, workspace, Changes((), (), ("never-there", "nor/this/")))

    assert done.removed == []
    assert done.refused == {}


def test_commits_are_told_from_an_index_that_was_only_refreshed() -> None:
    assert not Changes((".git/index",), (".git/index",), ()).commits()
    assert Changes((), (".git/refs/heads/main",), ()).commits()
    assert Changes((".git/refs/heads/new",), (), ()).commits()
