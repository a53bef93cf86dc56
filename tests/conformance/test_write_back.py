import os
from pathlib import Path

from moonmind_ext.workspace.send import send_workspace
from pipelines.payload import WorkspaceFilter
from pipelines.report import WrittenBack
from tests.conformance.support import Result, Task, sh
from tests.engines import Engine


def written_back(result: Result) -> WrittenBack:
    assert result.report.workspace is not None
    back = result.report.workspace.written_back
    assert back is not None
    return back


def tree(root: Path) -> dict[str, object]:
    """Everything below a directory: type, mode, and content or target."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        mode = oct(path.lstat().st_mode)
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("dir", mode)
        else:
            found[name] = (mode, path.read_bytes())
    return found


async def test_without_it_the_workspace_stays_as_it_was(task: Task, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    workspace.mkdir()
    (workspace / "a").write_text("a")
    before = tree(workspace)
    result = await task(*sh("echo b > a; echo c > c"), workspace=workspace, files={"a": "a"})

    assert tree(workspace) == before
    assert result.report.workspace is not None
    assert result.report.workspace.written_back is None


async def test_changes_come_back_exactly(task: Task) -> None:
    files = {
        "edit.txt": "old\n",
        "mode.sh": "#!/bin/sh\n",
        "gone.txt": "x",
        "tree/a": "a",
        "tree/sub/b": "b",
        "becomes-dir": "file",
        "becomes-file/inner": "dir",
        "becomes-link": "file",
        "same.txt": "same",
    }
    script = """
        echo new > edit.txt; chmod 755 mode.sh; rm gone.txt; rm -r tree
        rm becomes-dir; mkdir becomes-dir; echo i > becomes-dir/inner
        rm -r becomes-file; echo f > becomes-file
        rm becomes-link; ln -s same.txt becomes-link
        mkdir -p deep/er; echo d > deep/er/file; mkdir empty
    """
    result = await task(*sh(script), files=files, writeBack="changes")

    workspace = result.workspace
    assert written_back(result).refused == {}
    assert (workspace / "edit.txt").read_text() == "new\n"
    assert (workspace / "mode.sh").stat().st_mode & 0o777 == 0o755
    assert not (workspace / "gone.txt").exists()
    assert not (workspace / "tree").exists()
    assert (workspace / "becomes-dir" / "inner").read_text() == "i\n"
    assert (workspace / "becomes-file").read_text() == "f\n"
    assert os.readlink(workspace / "becomes-link") == "same.txt"
    assert (workspace / "deep" / "er" / "file").read_text() == "d\n"
    assert (workspace / "empty").is_dir()
    assert (workspace / "same.txt").read_text() == "same"
    assert [path.name for path in workspace.iterdir() if path.name.startswith(".moon")] == []


async def test_no_git_directory_comes_back_and_lost_commits_are_said(task: Task) -> None:
    files = {".git/HEAD": "ref: refs/heads/main\n", ".git/config": "[core]\n", "a": "a"}
    script = """
        echo '[core] fsmonitor = evil' > .git/config; mkdir -p .git/hooks .git/refs/heads
        echo evil > .git/hooks/post-checkout; echo 123 > .git/refs/heads/main
        mkdir -p vendor/.git; echo evil > vendor/.git/config; echo fine > vendor/file; echo b > a
    """
    result = await task(*sh(script), files=files, writeBack="changes")

    assert (result.workspace / ".git" / "config").read_text() == "[core]\n"
    assert not (result.workspace / ".git" / "hooks").exists()
    assert not (result.workspace / "vendor" / ".git").exists()
    assert (result.workspace / "vendor" / "file").read_text() == "fine\n"
    assert (result.workspace / "a").read_text() == "b\n"
    assert any("commits" in warning for warning in result.report.warnings)
    refused = written_back(result).refused
    assert refused == {"vendor/.git": "is a git directory, which never comes back"}


async def test_what_must_not_come_back_is_refused_by_name_and_the_rest_comes(
    task: Task,
) -> None:
    script = """
        ln -s /etc/passwd absolute; ln -s ../../outside escape; mkfifo pipe
        cp /bin/sh runner; chmod 4755 runner; echo fine > fine
    """
    result = await task(*sh(script), writeBack="changes")

    back = written_back(result)
    assert set(back.refused) == {"absolute", "escape", "pipe", "runner"}
    assert set(back.added) == {"fine", "runner"}
    assert (result.workspace / "fine").read_text() == "fine\n"
    assert (result.workspace / "runner").stat().st_mode & 0o7777 == 0o755
    for name in ("absolute", "escape", "pipe"):
        assert not os.path.lexists(result.workspace / name)


async def test_what_was_not_sent_is_not_taken_for_removed(task: Task) -> None:
    files = {"a": "a", "big/model.bin": "weights"}
    result = await task(
        *sh("echo b > a"),
        files=files,
        writeBack="changes",
        fields={"workspace": {"exclude": ["big"]}},
    )

    assert (result.workspace / "big" / "model.bin").read_text() == "weights"
    assert (result.workspace / "a").read_text() == "b\n"
    assert written_back(result).removed == []


async def test_changes_of_a_failed_command_come_back_too(task: Task) -> None:
    result = await task(*sh("echo half > half; exit 1"), writeBack="changes")

    assert (result.workspace / "half").read_text() == "half\n"


async def test_what_was_not_sent_stays_when_its_directory_is_removed(task: Task) -> None:
    result = await task(
        *sh("rm -r data"),
        files={"data/keep.bin": "weights", "data/a": "a", "data/[x] */b": "b"},
        writeBack="changes",
        fields={"workspace": {"exclude": ["data/keep.bin"]}},
    )

    back = written_back(result)
    assert (result.workspace / "data" / "keep.bin").read_text() == "weights"
    assert back.removed == ["data/[x] */", "data/a"]
    assert set(back.refused) == {"data/keep.bin"}
    assert os.listdir(result.workspace / "data") == ["keep.bin"]


async def test_directories_that_nobody_may_write_to_come_back(task: Task) -> None:
    script = "mkdir -p odd/zero; echo x > odd/zero/f; chmod 0 odd/zero; chmod 0555 odd"
    result = await task(*sh(script), writeBack="changes")

    assert written_back(result).refused == {}
    (result.workspace / "odd" / "zero").chmod(0o700)
    assert (result.workspace / "odd" / "zero" / "f").read_text() == "x\n"
    assert list(result.workspace.glob(".moonmind-*")) == []


async def test_names_that_are_no_utf8_spoil_nothing(task: Task, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    workspace.mkdir()
    for name in (b"gone\xe9", b"edit\xe9"):
        (workspace / os.fsdecode(name)).write_text("old\n")
    script = r"""
        name() { printf "$1\\351"; }
        echo new > "$(name new)"; mkdir "$(name dir)"; echo inner > "$(name dir)/f"
        echo edited > "$(name edit)"; rm "$(name gone)"; echo fine > fine
    """
    result = await task(*sh(script), workspace=workspace, files={}, writeBack="changes")

    back = written_back(result)
    assert (workspace / "fine").read_text() == "fine\n"
    assert (workspace / os.fsdecode(b"new\xe9")).read_text() == "new\n"
    assert (workspace / os.fsdecode(b"dir\xe9") / "f").read_text() == "inner\n"
    assert (workspace / os.fsdecode(b"edit\xe9")).read_text() == "edited\n"
    # A real engine does not say which file it was.
    assert back.removed == ["gone\ufffd"] or set(back.refused) == {"gone\ufffd"}


async def test_what_is_ours_is_not_sent(engine: Engine, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    ours = ["out[1] *", "!out", " out ", "back\\slash", "deep/er/{a,b}^?", "\u00e9", "line\nbreak"]
    others = ["out1 z", "!", "backslash", "deep/er/a", "deep/er/a^z"]
    for name in (*ours, *others):
        (workspace / name).mkdir(parents=True)
        (workspace / name / "file").write_text("x")
    async with engine.session() as session:
        sent, size = await send_workspace(
            session.client,
            workspace,
            WorkspaceFilter(),
            leave_out=[*(workspace / name for name in ours), tmp_path / "elsewhere", workspace],
        )
        files = {path for path in await sent.glob("**") if path.endswith("file")}
        chosen, _ = await send_workspace(
            session.client, workspace, WorkspaceFilter(exclude=["!*"]), leave_out=[workspace / "!"]
        )

        assert files == {f"{name}/file" for name in others}
        assert size is not None
        assert size.files == len(others)
        assert not await chosen.exists("!")
