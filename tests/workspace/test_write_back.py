import os
import stat
from pathlib import Path
from typing import Any

import pytest

from moonmind_ext.workspace.write_back import Changes, apply_changes, write_back
from tests.workspace.support import as_ordinary_user


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
    (workspace / "vendor" / "file").write_text("x")
    sent = ("vendor/", "vendor/file", "vendor/lib/", "vendor/lib/.git/")
    done = apply_changes(staging, workspace, Changes((), (), ("vendor/",), sent))

    assert (workspace / "vendor" / "lib" / ".git").is_dir()
    assert done.removed == ["vendor/file"]
    assert done.refused == {"vendor/lib/.git": "is a git directory, which is kept"}


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


def test_of_a_removed_directory_only_what_was_sent_goes(workspace: Path, staging: Path) -> None:
    (workspace / "data" / "sub" / "new").mkdir(parents=True)
    (workspace / "data" / "empty").mkdir()
    for name in ("a", "keep.bin", "sub/b", "sub/new/c"):
        (workspace / "data" / name).write_text("x")
    sent = ("data/", "data/a", "data/empty/", "data/sub/", "data/sub/b", "other")

    done = apply_changes(staging, workspace, Changes((), (), ("data/",), sent))

    left = sorted(str(path.relative_to(workspace)) for path in workspace.rglob("*"))
    assert left == ["data", "data/keep.bin", "data/sub", "data/sub/new", "data/sub/new/c"]
    assert done.removed == ["data/a", "data/empty/", "data/sub/b"]
    assert set(done.refused) == {"data/keep.bin", "data/sub/new/"}
    assert "not sent" in done.refused["data/keep.bin"]


def test_a_removed_directory_goes_as_one(workspace: Path, staging: Path) -> None:
    (workspace / "data" / "sub").mkdir(parents=True)
    (workspace / "data" / "sub" / "b").write_text("x")
    sent = ("data/", "data/sub/", "data/sub/b")

    done = apply_changes(staging, workspace, Changes((), (), ("data/",), sent))

    assert list(workspace.iterdir()) == []
    assert done.removed == ["data/"]
    assert done.refused == {}


def test_what_took_the_place_of_something_sent_is_kept(
    workspace: Path, staging: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b").write_text("x")
    (workspace / "data").mkdir()
    (workspace / "data" / "sub").symlink_to(outside)
    (workspace / "file").mkdir()
    (workspace / "file" / "inner").write_text("x")
    sent = ("data/", "data/sub/", "data/sub/b", "file")

    done = apply_changes(staging, workspace, Changes((), (), ("data/", "file"), sent))

    assert (outside / "b").exists()
    assert (workspace / "file" / "inner").exists()
    assert set(done.refused) == {"data/sub", "file/"}
    assert done.removed == []


def test_what_was_not_sent_is_not_overwritten(workspace: Path, staging: Path) -> None:
    (workspace / "file").write_text("of the host")
    (staging / "file").write_text("of the command")
    (workspace / "dir").write_text("of the host")
    (staging / "dir").mkdir()
    (staging / "dir" / "inner").write_text("of the command")
    (workspace / "edited").mkdir()
    (staging / "edited").write_text("of the command")

    changes = Changes(("dir/", "dir/inner", "file"), ("edited",), ())
    done = apply_changes(staging, workspace, changes)

    assert (workspace / "file").read_text() == "of the host"
    assert (workspace / "dir").read_text() == "of the host"
    assert (workspace / "edited").is_dir()
    assert set(done.refused) == {"dir/", "dir/inner", "edited", "file"}
    assert (done.added, done.modified) == ([], [])


def test_what_fails_is_named_and_the_rest_comes(
    workspace: Path, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (staging / name).write_text("new")
    for name in ("old-a", "old-b"):
        (workspace / name).write_text("old")

    def fail_for_a(original: Any) -> Any:
        def call(self: Path, *arguments: Any) -> Any:
            if self.name in {"a", "old-a"}:
                raise PermissionError(13, "Permission denied")
            return original(self, *arguments)

        return call

    monkeypatch.setattr(Path, "replace", fail_for_a(Path.replace))
    monkeypatch.setattr(Path, "unlink", fail_for_a(Path.unlink))
    done = apply_changes(staging, workspace, Changes(("a", "b"), (), ("old-a", "old-b")))

    assert (done.added, done.removed) == (["b"], ["old-b"])
    assert set(done.refused) == {"a", "old-a"}
    assert "Permission denied" in done.refused["a"]


def test_an_ordinary_user_is_not_held_up_by_modes(tmp_path: Path) -> None:
    printed = as_ordinary_user(
        tmp_path,
        "moonmind_ext.workspace.write_back",
        """
        workspace, staging = Path("workspace"), Path("staging")
        for folder in ("workspace/closed/inner", "workspace/kept", "staging/new/deep"):
            Path(folder).mkdir(parents=True)
        for name in ("workspace/closed/inner/f", "staging/new/deep/f", "staging/new/g"):
            Path(name).write_text("x")
        Path("workspace/kept/gone").write_text("x")
        for folder in ("workspace/closed/inner", "workspace/closed", "workspace/kept"):
            Path(folder).chmod(0o555)
        Path("staging/new/deep").chmod(0)
        Path("staging/new").chmod(0o555)
        sent = ("closed/", "closed/inner/", "closed/inner/f", "kept/gone")
        added = ("new/", "new/deep/", "new/deep/f", "new/g")
        done = apply_changes(staging, workspace, Changes(added, (), ("closed/", "kept/gone"), sent))
        print(done.model_dump())
        print([oct(Path("workspace", p).stat().st_mode) for p in ("kept", "new", "new/deep")])
        print(Path("workspace/closed").exists(), Path("workspace/new/g").read_text())
        """,
    )

    assert "'refused': {}" in printed
    assert "['0o40555', '0o40555', '0o40000']" in printed
    assert "False x" in printed


def test_a_name_that_is_no_utf8_comes_back_and_never_takes_another_along(
    workspace: Path, staging: Path
) -> None:
    name = os.fsdecode(b"caf\xe9")
    (staging / name).write_text("new")
    gone = os.fsdecode(b"gone\xe9")
    (workspace / gone).write_text("x")

    # As a real engine lists them.
    changes = Changes(("caf\ufffd",), (), ("gone\ufffd",))
    done = apply_changes(staging, workspace, changes)

    assert (workspace / name).read_text() == "new"
    assert (workspace / gone).exists()
    assert done.added == ["caf\ufffd"]
    assert set(done.refused) == {"gone\ufffd"}


def test_every_nested_git_directory_is_named_once(workspace: Path, staging: Path) -> None:
    added = (".git/index", "new/", "new/.git/", "new/.git/config", "new/.git/hooks/")
    (staging / "new").mkdir()

    done = apply_changes(staging, workspace, Changes(added, ("sub/.git",), ("old/.git/",)))

    assert done.added == ["new/"]
    assert done.refused == {
        "new/.git": "is a git directory, which never comes back",
        "sub/.git": "is a git directory, which never comes back",
        "old/.git": "is a git directory, which is kept",
    }


async def test_nothing_is_left_in_the_workspace_when_the_engine_fails(workspace: Path) -> None:
    class Failing:
        """Everything that is asked of a directory, until its export fails."""

        def changes(self, before: object) -> "Failing":
            return self

        def layer(self) -> "Failing":
            return self

        def filter(self, exclude: list[str]) -> "Failing":
            return self

        async def added_paths(self) -> list[str]:
            return []

        modified_paths = removed_paths = added_paths

        async def export(self, path: str) -> str:
            (Path(path) / "odd" / "inner").mkdir(parents=True)
            (Path(path) / "odd").chmod(0)
            raise RuntimeError("gone")

    after: Any = Failing()
    with pytest.raises(RuntimeError, match="gone"):
        await write_back(after, after, workspace)

    assert list(workspace.iterdir()) == []
