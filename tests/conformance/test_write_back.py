import base64
import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings

from moonmind_ext.engine.session import EngineSession
from moonmind_ext.run import export
from moonmind_ext.workspace.journal import Operation, Staging, Step
from moonmind_ext.workspace.send import send_workspace
from pipelines.artifacts import refuse_link
from pipelines.concurrency import together
from pipelines.payload import WorkspaceFilter
from pipelines.plan import DEFAULT_WORKDIR
from pipelines.report import WrittenBack
from tests.conformance.support import Result, Task, Watcher, sh
from tests.conformance.test_delta_workspaces import Nodes, examples, trees, write
from tests.engines import Engine
from tests.workspace.desk import listing


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


@pytest.mark.parametrize("archive_files", [1, export.ARCHIVE_FILES], ids=["packed", "as files"])
async def test_changes_come_back_exactly(
    task: Task, monkeypatch: pytest.MonkeyPatch, archive_files: int
) -> None:
    monkeypatch.setattr(export, "ARCHIVE_FILES", archive_files)
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


async def test_thousands_of_changes_come_back(task: Task) -> None:
    # Exported one by one, they make a real engine wait for ever more often than not.
    script = """
        filler=$(printf '%010000d' 0); mkdir many; i=0
        while [ $i -lt 8000 ]; do echo $filler > many/$i; i=$((i+1)); done; rm gone
    """
    result = await task(*sh(script), files={"gone": "x", "kept": "x"}, writeBack="changes")

    assert written_back(result).refused == {}
    assert len(list((result.workspace / "many").iterdir())) == 8000
    assert {path.name for path in result.workspace.iterdir()} == {"many", "kept"}


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
    for name in (b"gone\xe9", b"gone\xe8", b"edit\xe9"):
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
    assert not (workspace / os.fsdecode(b"gone\xe9")).exists()
    assert (workspace / os.fsdecode(b"gone\xe8")).exists()
    assert (back.removed, back.refused) == (["gone\ufffd"], {})


async def test_what_was_only_touched_is_no_change(task: Task) -> None:
    files = {"a": "a", "sub/b": "b", "sub/mode/c": "c", ".git/HEAD": "ref: refs/heads/main\n"}
    script = """
        touch a sub sub/b .git/HEAD; echo x > sub/x; rm sub/x; chmod 644 a; cp -a sub/b b2; mv b2 sub/b
        chmod 700 sub/mode
    """
    result = await task(*sh(script), files=files, writeBack="changes")

    back = written_back(result)
    assert (back.added, back.modified, back.removed) == ([], ["sub/mode/"], [])
    assert back.refused == {}
    assert (result.workspace / "sub" / "mode").stat().st_mode & 0o777 == 0o700
    assert not any("commits" in warning for warning in result.report.warnings)


async def test_work_on_the_host_is_not_undone_by_a_command_that_only_touches(
    task: Task, tmp_path: Path
) -> None:
    workspace, watcher = tmp_path / "ws", Watcher()

    async def work() -> None:
        await watcher.printed.wait()
        for name in ("touched", "edited"):
            (workspace / name).write_text("of the host")

    result, _ = await together(
        task(
            *sh("echo begun; sleep 2; touch touched; echo of the command > edited"),
            workspace=workspace,
            watcher=watcher,
            files={"touched": "old", "edited": "old"},
            writeBack="changes",
        ),
        work(),
    )

    assert (workspace / "touched").read_text() == "of the host"
    assert (workspace / "edited").read_text() == "of the command\n"
    assert written_back(result).modified == ["edited"]


@pytest.mark.parametrize("image", ["base", "not-root"])
async def test_a_directory_that_was_closed_keeps_what_it_had(task: Task, image: str) -> None:
    files = {"closed/a": "a", "closed/b": "b", "open/c": "c"}
    script = "rm closed/a open/c; echo new > closed/new; chmod 0 closed"
    result = await task(*sh(script), image=image, files=files, writeBack="changes")

    back = written_back(result)
    (result.workspace / "closed").chmod(0o700)
    names = {path.name for path in (result.workspace / "closed").iterdir()}
    assert names == {"a", "b", "new"}
    assert back.removed == ["open/c"]
    assert set(back.refused) == {"closed/"}


TAMPER = """
    out=/.moonmind/out
    for name in secret other/secret; do printf '%s\\0' "./$name" >> $out/more; done
    cat $out/before >> $out/more; cat $out/more > $out/before; rm -r gone; echo evil > other/secret
"""


async def test_a_command_that_lies_about_what_was_sent_removes_nothing_else(task: Task) -> None:
    files = {"secret": "s", "other/secret": "s", "other/sent": "x", "gone": "g"}
    fields = {"workspace": {"exclude": ["**/secret"]}}
    result = await task(*sh(TAMPER), files=files, writeBack="changes", fields=fields)

    assert (result.workspace / "secret").read_text() == "s"
    assert (result.workspace / "other" / "secret").read_text() == "s"
    assert not (result.workspace / "gone").exists()
    assert written_back(result).removed == ["gone"]
    assert "other/secret" in written_back(result).refused


@pytest.mark.parametrize("put", ["ln -s /etc/passwd", "mkdir", "mkfifo", "touch", "true"])
async def test_a_command_that_spoils_the_list_only_keeps_its_own_removed_files(
    task: Task, put: str
) -> None:
    script = f"rm -r /.moonmind/out/before a; {put} /.moonmind/out/before; echo new > b"
    result = await task(*sh(script), files={"a": "a", "b": "b"}, writeBack="changes")

    back = written_back(result)
    assert (back.modified, back.removed, set(back.refused)) == (["b"], [], {"./"})
    assert (result.workspace / "a").exists()


async def test_what_a_killed_run_has_left_is_brought_to_its_end_first(
    task: Task, tmp_path: Path
) -> None:
    workspace = tmp_path / "ws"
    workspace.mkdir()
    for name in ("half", "done"):
        staging = Staging.make(workspace)
        staging.changes.mkdir()
        (staging.changes / name).write_text("of the killed run")
        if name == "done":
            staging.commit([Step(Operation.MOVE, name)])
        # As the kernel does it for a process that is killed.
        os.close(staging._lock)

    result = await task(*sh("ls -a; cat done"), workspace=workspace, files={})

    assert result.log == b".\n..\ndone\nof the killed run"
    assert [path.name for path in workspace.iterdir()] == ["done"]
    assert any("an earlier run was killed" in warning for warning in result.report.warnings)


async def test_cache_volumes_in_the_workspace_hide_nothing_that_was_removed(task: Task) -> None:
    files = {"cache/sent": "x", "a": "a"}
    volumes = [{"name": "moonmind-hides", "target": f"{DEFAULT_WORKDIR}/hides/repo/cache"}]
    result = await task(
        *sh("rm -f cache/sent a; ls"),
        files=files,
        job_id="hides",
        writeBack="changes",
        fields={"cacheVolumes": volumes},
    )

    assert (result.workspace / "cache" / "sent").read_text() == "x"
    assert result.log == b"cache\n"
    assert written_back(result).removed == ["a"]


def commands(before: Nodes, after: Nodes) -> str:
    """Write a shell script that makes one tree of another, and touches what stays."""
    lines: list[str] = []
    files = io.BytesIO()
    with TemporaryDirectory() as folder, tarfile.open(fileobj=files, mode="w:gz") as archive:
        write(after, Path(folder, "after"))

        def visit(old: Nodes, new: Nodes, inside: str) -> None:
            lines.extend(f"rm -r {quote(inside + name)}" for name in old.keys() - new.keys())
            for name, node in new.items():
                path = inside + name
                if name in old and old[name][0] == node[0] == "directory":
                    visit(old[name][2], node[2], f"{path}/")
                    lines.append(f"chmod {node[1]:o} {quote(path)}")
                elif name in old and old[name] == node:
                    lines.append(f"touch -h {quote(path)} 2>/dev/null")
                else:
                    lines.append(f"rm -rf {quote(path)}")
                    archive.add(Path(folder, "after", path), path)

        visit(before, after, "./")
    text = base64.b64encode(files.getvalue()).decode()
    extract = f"echo {text} | base64 -d | EXTRACT_UNSAFE_SYMLINKS=1 tar xzpf -"
    # Modes last: they may close directories.
    lines.sort(key=lambda line: not line.startswith("rm"))
    first = sum(line.startswith("rm") for line in lines)
    return "\n".join([*lines[:first], extract, *lines[first:], "true"])


@given(before=trees, after=trees)
@settings(examples, max_examples=40)
def test_the_workspace_becomes_what_the_container_has(
    in_session: Callable[..., Any], task: Task, before: Nodes, after: Nodes
) -> None:
    async def work(session: EngineSession) -> None:
        with TemporaryDirectory() as folder:
            workspace = Path(folder, "w")
            write(before, workspace)
            write(after, Path(folder, "after"))
            old, wanted = listing(workspace), listing(Path(folder, "after"))
            script = commands(before, after)
            result = await task(
                *sh(script), session=session, workspace=workspace, files={}, writeBack="changes"
            )
            assert result.report.exit_code == 0, result.log

            # A link that is refused leaves what it should have replaced.
            refused = set()
            for path, (mode, target) in [*wanted.items()]:
                same = old.get(path) == (mode, target)
                if stat.S_ISLNK(mode) and not same and refuse_link(path, os.fsdecode(target)):
                    refused.add(path)
                    del wanted[path]
                    if path in old and not stat.S_ISDIR(old[path][0]):
                        wanted[path] = old[path]
            assert listing(workspace) == wanted
            back = written_back(result)
            assert set(back.refused) == refused
            shown = {path: f"{path}/" if stat.S_ISDIR(wanted[path][0]) else path for path in wanted}
            came = wanted.keys() - refused
            assert set(back.added) == {
                shown[path]
                for path in came
                if path not in old or stat.S_ISDIR(old[path][0]) != stat.S_ISDIR(wanted[path][0])
            }
            assert set(back.modified) == {
                shown[path]
                for path in came
                if shown[path] not in back.added and old[path] != wanted[path]
            }

    in_session(work)


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
