import os
import subprocess
import sys
from pathlib import Path

import pytest

from moonmind_ext.workspace.send import Size, WorkspaceError, measure
from moonmind_ext.workspace.source import read_source


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
    (tmp_path / "private").write_text("x")
    (tmp_path / "private").chmod(0)
    tmp_path.chmod(0o755)
    script = (
        "import os, sys; from moonmind_ext.workspace.send import *\n"
        # Root may read everything.
        "os.getuid() or os.setuid(65534)\n"
        "try: measure(Path(sys.argv[1]))\n"
        "except WorkspaceError as error: print(error)"
    )
    for folder in (*tmp_path.parents[:2], tmp_path):
        folder.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False
    )

    assert "private: cannot be read" in result.stdout, result.stderr


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
    subprocess.run(["git", *identity, "-C", folder, *arguments], check=True, capture_output=True)


async def test_a_source_says_commit_branch_and_state(tmp_path: Path) -> None:
    git(tmp_path, "init", "-b", "main")
    (tmp_path / "a").write_text("a")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first")

    clean = await read_source(tmp_path, "acme/widgets")
    (tmp_path / "a").write_text("b")
    dirty = await read_source(tmp_path, "acme/widgets")

    assert clean.branch == "main"
    assert clean.commit is not None
    assert len(clean.commit) == 40
    assert clean.dirty is False
    assert dirty.dirty is True


async def test_a_directory_that_is_no_repository_has_no_commit(tmp_path: Path) -> None:
    source = await read_source(tmp_path, "acme/widgets")

    assert (source.commit, source.branch, source.dirty) == (None, None, None)


async def test_a_workspaces_own_configuration_runs_nothing(tmp_path: Path) -> None:
    git(tmp_path, "init", "-b", "main")
    (tmp_path / "a").write_text("a")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first")
    trap = tmp_path / "trap.sh"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/trapped\n")
    trap.chmod(0o755)
    git(tmp_path, "config", "core.fsmonitor", str(trap))

    await read_source(tmp_path, "acme/widgets")

    assert not (tmp_path / "trapped").exists()
