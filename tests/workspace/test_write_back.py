import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonmind_ext.workspace.changes import Sides, apply_changes, doubtful, list_arrived
from moonmind_ext.workspace.journal import Operation, Staging, Step, encode, identify, recover
from moonmind_ext.workspace.names import Names, parse_names, read_names
from moonmind_ext.workspace.write_back import Changed, write_back
from pipelines.artifacts import refuse_link
from tests.workspace.desk import Desk, listing, names_of
from tests.workspace.support import as_ordinary_user

Fill: TypeAlias = Callable[..., Desk]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    return folder


@pytest.fixture
def fill(workspace: Path) -> Fill:
    """Fill the workspace with files, and copy it into a container."""

    def fill(*paths: str, left_out: tuple[str, ...] = ()) -> Desk:
        for path in paths:
            (workspace / path).parent.mkdir(parents=True, exist_ok=True)
            (workspace / path).write_text(f"old {path}", errors="surrogateescape")
        return Desk(workspace, left_out=left_out)

    return fill


def remove(*paths: Path) -> None:
    for path in paths:
        subprocess.run(["rm", "-r", str(path)], check=True)


def test_what_was_only_touched_is_no_change(fill: Fill, workspace: Path) -> None:
    (workspace / "link").symlink_to("/an/absolute/target")
    desk = fill("a", "sub/b")
    before = listing(workspace)

    done = desk.back()

    assert (done.added, done.modified, done.removed, done.refused) == ([], [], [], {})
    assert listing(workspace) == before


def test_nothing_is_written_through_a_link_of_the_workspace(
    fill: Fill, workspace: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "other").write_text("of the host")
    desk = fill("dir/other")
    (desk.container / "dir" / "file").write_text("evil")
    (desk.container / "dir" / "other").unlink()
    remove(workspace / "dir")
    (workspace / "dir").symlink_to(outside)

    done = desk.back()

    assert [path.name for path in outside.iterdir()] == ["other"]
    assert set(done.refused) == {"dir/file", "dir/other"}
    assert "symbolic link" in done.refused["dir/file"]


@pytest.mark.parametrize("path", ["../evil", "/evil", "a/../../evil", "a//b", "", ".", "a\0b"])
def test_a_path_that_leads_out_is_refused(workspace: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / "evil").write_text("of the host")
    names = Names({path: False}, frozenset())
    staging = Staging.make(workspace)
    sides = Sides(stamps={}, was_sent=lambda *_: True, before=names, after=Names({}, frozenset()))
    done = apply_changes(staging, {}, sides)
    staging.close()

    assert (tmp_path / "evil").exists()
    assert done.removed == []


def test_a_link_of_the_workspace_that_became_a_directory_is_replaced(
    fill: Fill, workspace: Path, tmp_path: Path
) -> None:
    (workspace / "link").symlink_to(tmp_path)
    desk = fill()
    (desk.container / "link").unlink()
    (desk.container / "link").mkdir()
    (desk.container / "link" / "file").write_text("inside")

    done = desk.back()

    assert done.refused == {}
    assert (done.removed, done.added) == (["link"], ["link/", "link/file"])
    assert not (workspace / "link").is_symlink()
    assert (workspace / "link" / "file").read_text() == "inside"


def test_a_removed_directory_that_holds_a_git_directory_stays(fill: Fill, workspace: Path) -> None:
    desk = fill("vendor/lib/.git/HEAD", "vendor/file")
    remove(desk.container / "vendor")

    done = desk.back()

    assert (workspace / "vendor" / "lib" / ".git" / "HEAD").exists()
    assert done.removed == ["vendor/file"]
    assert done.refused == {"vendor/lib/.git": "is a git directory, which is kept"}


def test_modes_and_links_arrive(fill: Fill, workspace: Path) -> None:
    (workspace / "group").mkdir()
    (workspace / "group").chmod(0o2755)
    desk = fill("private/file")
    (desk.container / "run").write_text("x")
    (desk.container / "run").chmod(0o4755)
    (desk.container / "dir").mkdir()
    (desk.container / "dir").chmod(0o750)
    (desk.container / "link").symlink_to("dir")
    (desk.container / "private").chmod(0o700)
    (desk.container / "group").chmod(0o700)

    done = desk.back()

    assert stat.S_IMODE((workspace / "run").stat().st_mode) == 0o755
    assert stat.S_IMODE((workspace / "dir").stat().st_mode) == 0o750
    assert stat.S_IMODE((workspace / "private").stat().st_mode) == 0o700
    # What the host's group is for is not the container's to say.
    assert stat.S_IMODE((workspace / "group").stat().st_mode) == 0o2700
    assert os.readlink(workspace / "link") == "dir"
    assert set(done.refused) == {"run"}
    assert done.added == ["dir/", "link", "run"]
    assert done.modified == ["group/", "private/"]


def test_what_is_gone_already_is_no_failure(fill: Fill, workspace: Path) -> None:
    desk = fill("a", "nor/this")
    remove(desk.container / "a", desk.container / "nor", workspace / "a", workspace / "nor")

    done = desk.back()

    assert done.removed == []
    assert done.refused == {}


def test_of_a_removed_directory_only_what_was_sent_goes(fill: Fill, workspace: Path) -> None:
    (workspace / "data" / "empty").mkdir(parents=True)
    desk = fill("data/a", "data/keep.bin", "data/sub/b", left_out=("data/keep.bin",))
    remove(desk.container / "data")
    (workspace / "data" / "sub" / "new").mkdir()
    (workspace / "data" / "sub" / "new" / "c").write_text("made meanwhile")

    done = desk.back()

    assert set(listing(workspace)) == {
        *("data", "data/keep.bin", "data/sub", "data/sub/new", "data/sub/new/c"),
    }
    assert done.removed == ["data/a", "data/empty/", "data/sub/b"]
    assert set(done.refused) == {"data/keep.bin", "data/sub/new/"}
    assert "not sent" in done.refused["data/keep.bin"]


def test_a_removed_directory_goes_as_one(fill: Fill, workspace: Path) -> None:
    desk = fill("data/sub/b")
    remove(desk.container / "data")

    done = desk.back()

    assert list(workspace.iterdir()) == []
    assert done.removed == ["data/"]
    assert done.refused == {}


def test_what_took_the_place_of_something_sent_is_kept(
    fill: Fill, workspace: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b").write_text("x")
    desk = fill("data/sub/b", "file")
    remove(desk.container / "data", desk.container / "file")
    remove(workspace / "data" / "sub", workspace / "file")
    (workspace / "data" / "sub").symlink_to(outside)
    (workspace / "file").mkdir()
    (workspace / "file" / "inner").write_text("x")

    done = desk.back()

    assert (outside / "b").exists()
    assert (workspace / "file" / "inner").exists()
    assert {"data/sub", "file/"} <= set(done.refused)
    assert done.removed == []


def test_what_was_not_sent_is_not_overwritten(fill: Fill, workspace: Path) -> None:
    desk = fill("file", "dir", "edited", left_out=("file", "dir"))
    (desk.container / "file").write_text("of the command")
    (desk.container / "dir").mkdir()
    (desk.container / "dir" / "inner").write_text("of the command")
    (desk.container / "edited").write_text("of the command")
    remove(workspace / "edited")
    (workspace / "edited").mkdir()

    done = desk.back()

    assert (workspace / "file").read_text() == "old file"
    assert (workspace / "dir").read_text() == "old dir"
    assert (workspace / "edited").is_dir()
    assert set(done.refused) == {"dir/", "dir/inner", "edited", "file"}
    assert (done.added, done.modified) == ([], [])


def test_work_on_the_host_is_not_undone_by_a_file_that_was_only_touched(
    fill: Fill, workspace: Path
) -> None:
    desk = fill("a", "b", "c")
    (desk.container / "b").write_text("of the command")
    (workspace / "a").write_text("worked on")
    (workspace / "b").write_text("worked on too")

    arrived = list_arrived(desk.container)
    assert doubtful(arrived, workspace, desk.sides(names_of(desk.container))) == ["a", "b"]
    # The engine is asked about these, and says it of the first.
    done = desk.back(unchanged=["a"])

    assert (workspace / "a").read_text() == "worked on"
    assert (workspace / "b").read_text() == "of the command"
    assert done.modified == ["b"]


def test_a_directory_that_was_removed_on_the_host_is_made_for_what_comes_into_it(
    fill: Fill, workspace: Path
) -> None:
    desk = fill("a/b/c", "other/d")
    (desk.container / "a" / "b" / "new").write_text("new")
    remove(workspace / "a", workspace / "other")

    done = desk.back(unchanged=["a/b/c", "other/d"])

    assert set(listing(workspace)) == {"a", "a/b", "a/b/new"}
    assert (done.added, done.modified) == (["a/b/new"], [])


def test_what_fails_is_named_and_the_rest_comes(
    fill: Fill, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = fill("old-a", "old-b", "dir/old-a")
    remove(*(desk.container / name for name in ("old-a", "old-b", "dir")))
    for name in ("a", "b"):
        (desk.container / name).write_text("new")

    def fail_for_a(original: Any) -> Any:
        def call(self: Path, *arguments: Any, **options: Any) -> Any:
            if self.parent != workspace.parent and self.name in {"a", "old-a"}:
                raise PermissionError(13, "Permission denied")
            return original(self, *arguments, **options)

        return call

    monkeypatch.setattr(Path, "replace", fail_for_a(Path.replace))
    monkeypatch.setattr(Path, "unlink", fail_for_a(Path.unlink))
    done = desk.back()

    assert (done.added, done.removed) == (["b"], ["old-b"])
    assert set(done.refused) == {"a", "old-a", "dir/old-a"}
    assert "Permission denied" in done.refused["a"]


def test_an_ordinary_user_is_not_held_up_by_modes(tmp_path: Path) -> None:
    printed = as_ordinary_user(
        tmp_path,
        "tests.workspace.desk",
        """
        for folder in ("workspace/closed/inner", "workspace/kept"):
            Path(folder).mkdir(parents=True)
        for name in ("closed/inner/f", "kept/gone", "kept/edited"):
            Path("workspace", name).write_text("x")
        for folder in ("closed/inner", "closed", "kept"):
            Path("workspace", folder).chmod(0o555)
        desk = Desk(Path("workspace").absolute())
        for folder in ("closed", "closed/inner", "kept"):
            (desk.container / folder).chmod(0o755)
        shutil.rmtree(desk.container / "closed")
        (desk.container / "kept/gone").unlink()
        (desk.container / "kept/edited").write_text("y")
        (desk.container / "kept").chmod(0o555)
        (desk.container / "new/deep").mkdir(parents=True)
        for name in ("new/deep/f", "new/g"):
            (desk.container / name).write_text("x")
        (desk.container / "new").chmod(0o555)
        print(desk.back().model_dump())
        print([oct(Path("workspace", p).stat().st_mode) for p in ("kept", "new", "new/deep")])
        print(Path("workspace/closed").exists(), Path("workspace/new/g").read_text())
        """,
    )

    assert "'refused': {}" in printed
    assert "['0o40555', '0o40555', '0o40755']" in printed
    assert "False x" in printed


def test_names_that_are_no_utf8_are_names_like_others(fill: Fill, workspace: Path) -> None:
    gone, other, new = (os.fsdecode(name) for name in (b"gone\xe9", b"gone\xe8", b"caf\xe9"))
    desk = fill(gone, other)
    (desk.container / new).write_text("new")
    (desk.container / gone).unlink()

    done = desk.back()

    assert set(listing(workspace)) == {new, other}
    assert (done.added, done.removed, done.refused) == (["caf\ufffd"], ["gone\ufffd"], {})


def test_a_command_cannot_bring_a_journal(fill: Fill, workspace: Path) -> None:
    desk = fill()
    evil = desk.container / ".moonmind-write-back-evil"
    evil.mkdir()
    (evil / "journal").write_text("evil")

    done = desk.back()

    assert list(workspace.iterdir()) == []
    assert "runs themselves use" in done.refused[".moonmind-write-back-evil/"]


def test_a_directory_that_cannot_be_looked_into_keeps_what_it_had(
    fill: Fill, workspace: Path
) -> None:
    desk = fill("closed/a", "closed/sub/b", "open/c", "open/d")
    remove(desk.container / "closed" / "a", desk.container / "open" / "d")
    after = Names({"closed": True, "open": True, "open/c": False}, frozenset({"closed"}))

    done = desk.back(after=after)

    assert set(listing(workspace)) == {
        *("closed", "closed/a", "closed/sub", "closed/sub/b", "open", "open/c"),
    }
    assert done.removed == ["open/d"]
    assert set(done.refused) == {"closed/"}


def test_of_a_list_that_is_not_whole_nothing_is_removed(tmp_path: Path) -> None:
    whole = b".\0.\0./a\0./d\0./d\0./d/b\0//0\0"
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")

    assert parse_names(whole) == Names({"a": False, "d": True, "d/b": False}, frozenset())
    assert parse_names(b".\0.\0./d\0./d\0./d\0//0\0").closed == {"d"}
    for cut in range(len(whole)):
        assert parse_names(whole[:cut]).closed == {""}
    assert parse_names(whole.replace(b"//0", b"//1")).closed == {""}
    for name in ("link", "pipe", "missing", "."):
        assert read_names(tmp_path / name) == Names({}, frozenset({""}))


@pytest.mark.parametrize("user", ["root", "ordinary"])
def test_a_write_back_that_is_killed_anywhere_is_undone_or_completed(
    tmp_path: Path, user: str
) -> None:
    if user == "root" and os.getuid():
        pytest.skip("is not root")
    # Forks, so it needs a process that has no threads.
    if user == "root":
        subprocess.run(
            [sys.executable, "-c", "from tests.workspace.kills import *; kill_everywhere(Path())"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
            check=True,
        )
    else:
        as_ordinary_user(tmp_path, "tests.workspace.kills", "kill_everywhere(Path())")

    assert int((tmp_path / "steps").read_text()) > 30


def commit(workspace: Path, files: dict[str, str], steps: list[Step]) -> Staging:
    """What a run that is killed leaves when nothing has been moved yet."""
    staging = Staging.make(workspace)
    for path, content in files.items():
        (staging.changes / path).parent.mkdir(parents=True, exist_ok=True)
        (staging.changes / path).write_text(content)
    staging.commit(steps)
    return staging


def test_what_another_process_is_just_writing_back_is_left_alone(workspace: Path) -> None:
    staging = commit(workspace, {"a": "new"}, [Step(Operation.MOVE, "a")])
    script = (
        f"from moonmind_ext.workspace.journal import *\nprint(recover(Path({str(workspace)!r})))"
    )

    def recover_elsewhere() -> str:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert recover_elsewhere() == "False"
    assert not (workspace / "a").exists()
    os.close(staging._lock)
    assert recover_elsewhere() == "True"
    assert (workspace / "a").read_text() == "new"
    assert [path.name for path in workspace.iterdir()] == ["a"]


def test_a_journal_leads_nowhere_else(workspace: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "dir").mkdir(parents=True)
    (outside / "file").write_text("of the host")
    (workspace / ".git").mkdir()
    (workspace / "link").symlink_to(outside)
    identity = identify(outside / "file")
    names = ("../outside/file", f"{outside}/file", "link/file", ".git/config")
    staging = commit(workspace, {"link/file": "evil", ".git/config": "evil", "ok": "ok"}, [])
    tampered = encode(
        [
            *(Step(Operation.UNLINK, name, was=identity) for name in names),
            *(Step(Operation.MOVE, name, was=identity) for name in names),
            *(Step(Operation.MKDIR, f"{name}-new") for name in names),
            *(Step(Operation.MODE, name, 0o777) for name in ("../outside/dir", "link/dir")),
            *(Step(Operation.RMDIR, name) for name in ("../outside/dir", "link/dir", ".git", "")),
            Step(Operation.MOVE, "absolute"),
            Step(Operation.MOVE, "through/file"),
            Step(Operation.MOVE, "folder"),
            Step(Operation.MOVE, "ok"),
        ]
    )
    (staging.folder / "journal").write_bytes(tampered)
    (staging.changes / "absolute").symlink_to("/etc/passwd")
    (staging.changes / "through").symlink_to(outside)
    (staging.changes / "folder" / ".git").mkdir(parents=True)
    os.close(staging._lock)
    before = listing(outside)

    recover(workspace)

    assert listing(outside) == before
    assert set(listing(workspace)) == {".git", "link", "ok"}


def test_what_came_after_the_crash_is_kept(workspace: Path) -> None:
    for name in ("gone", "edited"):
        (workspace / name).write_text("old")
    steps = [
        Step(Operation.UNLINK, "gone", was=identify(workspace / "gone")),
        Step(Operation.MOVE, "edited", was=identify(workspace / "edited")),
        Step(Operation.MOVE, "new"),
    ]
    staging = commit(workspace, {"edited": "command's", "new": "command's"}, steps)
    os.close(staging._lock)
    for name in ("gone", "edited", "new"):
        (workspace / name).write_text("user's own")

    assert recover(workspace)

    assert {path.read_text() for path in workspace.iterdir()} == {"user's own"}


@pytest.mark.parametrize("content", [b"", b"abc", b"0" * 64 + b"\n[]", b"\0" * 100, b"\xff\n\xff"])
def test_a_journal_that_is_not_complete_changes_nothing(workspace: Path, content: bytes) -> None:
    (workspace / "a").write_text("a")
    staging = commit(workspace, {"b": "new"}, [Step(Operation.MOVE, "b")])
    (staging.folder / "journal").write_bytes(content)
    os.close(staging._lock)

    assert not recover(workspace)
    assert set(listing(workspace)) == {"a"}


# Few, so that they meet: the same name in two trees, as a file and as a directory.
NAMES = ["a", "b", "src", "two words", "new\nline", "w*", os.fsdecode(b"caf\xe9"), ".moonmind"]
files = st.tuples(
    st.just("file"), st.sampled_from([0o644, 0o755, 0o600]), st.sampled_from(["", "1", "2"])
)
links = st.tuples(st.just("link"), st.just(0), st.sampled_from(["a", "src/b", "../x", "/etc"]))
nodes: st.SearchStrategy[Any] = st.recursive(
    files | links,
    lambda inner: st.tuples(
        st.just("directory"),
        st.sampled_from([0o755, 0o700, 0o1777, 0o555]),
        st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    ),
    max_leaves=10,
)
trees = st.dictionaries(st.sampled_from(NAMES), nodes, max_size=6)


def write(tree: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    for name, (kind, mode, content) in tree.items():
        path = folder / name
        if kind == "directory":
            write(content, path)
            path.chmod(mode)
        elif kind == "link":
            path.symlink_to(content)
        else:
            path.write_text(content)
            path.chmod(mode)


@given(before=trees, after=trees)
@settings(max_examples=200, deadline=None)
def test_the_workspace_becomes_what_the_container_has(before: Any, after: Any) -> None:
    with TemporaryDirectory() as folder:
        workspace = Path(folder, "workspace")
        write(before, workspace)
        desk = Desk(workspace)
        remove(desk.container)
        write(after, desk.container)
        old, wanted = listing(workspace), listing(desk.container)
        done = desk.back()

        # A link that is refused leaves what it should have replaced.
        for path, (mode, target) in [*wanted.items()]:
            if stat.S_ISLNK(mode) and refuse_link(path, os.fsdecode(target)):
                kept = old.get(path, (stat.S_IFDIR, b""))
                if stat.S_ISDIR(kept[0]):
                    del wanted[path]
                else:
                    wanted[path] = kept
        assert listing(workspace) == wanted
        assert all("symbolic link" in reason for reason in done.refused.values())
        assert list(workspace.glob(".moonmind-*")) == []


async def test_nothing_is_left_in_the_workspace_when_the_engine_fails(workspace: Path) -> None:
    class Failing:
        """Everything that is asked of a directory, until its export fails."""

        def diff(self, other: object) -> "Failing":
            return self

        def filter(self, **_: list[str]) -> "Failing":
            return self

        async def glob(self, pattern: str) -> list[str]:
            return []

        async def export(self, path: str) -> str:
            (Path(path) / "odd" / "inner").mkdir(parents=True)
            (Path(path) / "odd").chmod(0)
            raise RuntimeError("gone")

    async def export(directory: Any, target: Path) -> None:
        await directory.export(str(target))

    failing: Any = Failing()
    changed = Changed(
        before=failing,
        after=failing,
        names=failing,
        stamps={},
        is_whole=True,
        list_sent=failing.export,
        bring=export,
    )
    with pytest.raises(RuntimeError, match="gone"):
        await write_back(changed, workspace)

    assert list(workspace.iterdir()) == []
