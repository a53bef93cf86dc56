"""A workspace that is sent as a difference is the same as one that is sent whole."""

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from moonmind_ext.engine.session import EngineSession
from moonmind_ext.workspace import delta
from moonmind_ext.workspace.bases import Bases
from moonmind_ext.workspace.send import Size, send_workspace
from moonmind_ext.workspace.source import Standing
from pipelines.concurrency import together
from pipelines.payload import WorkspaceFilter
from pipelines.report import Source
from tests.engines import Engine
from tests.workspace.desk import listing

EVERYTHING = WorkspaceFilter()

Node: TypeAlias = tuple[str, int, Any]
Nodes: TypeAlias = dict[str, Node]

# Few, so that they meet: the same name in two trees, as a file and as a directory.
NAMES = [
    *("a", "b", "src", "two words", " blank", "ünïcödé", "long" * 60, "-dash", ".hidden"),
    *("w*", "[set]", "q?", "!not", "back\\slash", "new\nline", "quote's", "a.txt"),
    *(".gitignore", ".gitattributes", ".dockerignore"),
]
# By name, since hypothesis shows what it chose.
CONTENTS = {
    "empty": b"",
    "one": b"1",
    "two": b"2",
    "texts": b"*.txt\n",
    "src": b"/src\n!a.txt\n",
    "long": b"x" * 70_000,
    "binary": bytes(range(256)),
}
LINKS = ["a", "src/b", "../outside", "/etc/hostname", "double//slash", "dangling", "w*"]

files = st.tuples(
    st.just("file"), st.sampled_from([0o644, 0o755, 0o600]), st.sampled_from(sorted(CONTENTS))
)
links = st.tuples(st.just("link"), st.just(0), st.sampled_from(LINKS))
nodes: st.SearchStrategy[Node] = st.recursive(
    files | links,
    lambda inner: st.tuples(
        st.just("directory"),
        st.sampled_from([0o755, 0o700, 0o1777]),
        st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    ),
    max_leaves=12,
)
trees = st.dictionaries(st.sampled_from(NAMES), nodes, max_size=8)
patterns = st.sampled_from(["src", "**/*.txt", "a*", "!a.txt", "*/b", "x*", ".git*"])
filters = st.builds(
    WorkspaceFilter,
    include=st.lists(patterns.filter(lambda text: text[0] != "!"), max_size=2),
    exclude=st.lists(patterns, max_size=2),
    gitignore=st.booleans(),
)


def write(tree: Nodes, folder: Path) -> None:
    folder.mkdir()
    for name, (kind, mode, content) in tree.items():
        path = folder / name
        if kind == "directory":
            write(content, path)
            path.chmod(mode)
        elif kind == "link":
            path.symlink_to(content)
        else:
            path.write_bytes(CONTENTS[content])
            path.chmod(mode)


class Desk:
    """A session, and what was sent in it before."""

    def __init__(self, session: EngineSession, folder: Path) -> None:
        self.session = session
        self.folder = folder
        self.bases = Bases()

    async def send(
        self,
        root: Path,
        chosen: WorkspaceFilter = EVERYTHING,
        *,
        whole: bool = False,
        touched: tuple[str, ...] = (),
    ) -> tuple[dict[str, tuple[int, bytes]], Size]:
        """Send a workspace, and see what arrived."""
        bases = None if whole else self.bases
        client = self.session.client
        standing = Standing(Source(repository="acme/w"), touched, is_clone=True)
        directory, size = await send_workspace(client, root, chosen, bases=bases, standing=standing)
        with TemporaryDirectory(dir=self.folder) as out:
            await directory.export(f"{out}/tree")
            return listing(Path(out, "tree")), size


@pytest.fixture
def call(in_session: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Run something on a desk whose session stays open."""

    async def open_desk(session: EngineSession) -> Desk:
        return Desk(session, tmp_path)

    async def at_desk(
        _: EngineSession, work: Callable[..., Awaitable[Any]], *arguments: Any
    ) -> Any:
        return await work(desk, *arguments)

    desk = in_session(open_desk)
    return partial(in_session, at_desk)


def ignores_by_files(tree: Nodes) -> bool:
    """Whether every `.gitignore` is a file."""
    return (
        all(
            ignores_by_files(content) if kind == "directory" else True
            for kind, _, content in tree.values()
        )
        and tree.get(".gitignore", ("file",))[0] == "file"
    )


examples = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
    ],
)


@given(first=trees, then=st.lists(trees, min_size=1, max_size=3))
@examples
def test_what_arrives_is_what_is_on_disk(
    call: Callable[..., Any], first: Nodes, then: list[Nodes]
) -> None:
    async def work(desk: Desk) -> None:
        desk.bases = Bases()
        for tree in (first, *then):
            with TemporaryDirectory(dir=desk.folder) as folder:
                root = Path(folder, "w")
                write(tree, root)
                arrived, _ = await desk.send(root)
                assert arrived == listing(root)

    call(work)


@given(first=trees, then=trees, chosen=filters)
@examples
def test_a_filter_takes_the_same_of_a_difference(
    call: Callable[..., Any], first: Nodes, then: Nodes, chosen: WorkspaceFilter
) -> None:
    # Of what is no file of that name a real engine wants nothing to do.
    assume(not chosen.gitignore or (ignores_by_files(first) and ignores_by_files(then)))

    async def work(desk: Desk) -> None:
        desk.bases = Bases()
        with TemporaryDirectory(dir=desk.folder) as folder:
            roots = Path(folder, "first"), Path(folder, "then")
            for tree, root in zip((first, then), roots, strict=True):
                write(tree, root)
                arrived, _ = await desk.send(root, chosen)
            whole, _ = await desk.send(root, chosen, whole=True)
            assert arrived == whole

    call(work)


paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)


@given(tree=trees, touched=st.lists(paths, max_size=8), chosen=filters)
@examples
def test_what_is_worked_on_goes_by_itself_and_makes_no_difference(
    call: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tree: Nodes,
    touched: list[str],
    chosen: WorkspaceFilter,
) -> None:
    assume(not chosen.gitignore or ignores_by_files(tree))
    monkeypatch.setattr(delta, "APART_FILES", 0)

    async def work(desk: Desk) -> None:
        with TemporaryDirectory(dir=desk.folder) as folder:
            root = Path(folder, "w")
            write(tree, root)
            apart, _ = await desk.send(root, chosen, whole=True, touched=(*tree, *touched))
            whole, _ = await desk.send(root, chosen, whole=True)
            assert apart == whole

    call(work)


def git(folder: Path, *arguments: str) -> None:
    names = [
        "-c",
        "user.name=T",
        "-c",
        "user.email=t@example.org",
        "-c",
        "protocol.file.allow=always",
    ]
    subprocess.run(["git", *names, *arguments], cwd=folder, check=True, capture_output=True)


def make_repository(folder: Path) -> None:
    """A repository with what makes checkouts differ from what git has stored."""
    inner = folder.parent / "inner"
    for path in (folder, inner):
        path.mkdir()
        git(path, "init", "--quiet", "--initial-branch=main")
    (inner / "file").write_text("a submodule's")
    git(inner, "add", "--all")
    git(inner, "commit", "--quiet", "--message=inner")
    (folder / ".gitattributes").write_text("*.crlf text eol=crlf\n*.id ident\n*.bin filter=lfs\n")
    (folder / "lines.crlf").write_text("one\ntwo\n")
    (folder / "version.id").write_text("$Id$\n")
    (folder / "big.bin").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456789\n"
    )
    for number in range(300):
        path = folder / f"d{number % 10}" / f"f{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"file {number}\n" * 50)
    git(folder, "submodule", "--quiet", "add", str(inner), "sub")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=one")


def clone(origin: Path, target: Path) -> Path:
    git(origin.parent, "clone", "--quiet", "--recurse-submodules", str(origin), str(target))
    return target


async def test_a_fresh_clone_costs_what_changed_since_the_last(
    engine: Engine, tmp_path: Path
) -> None:
    origin = tmp_path / "origin"
    make_repository(origin)
    async with engine.session() as session:
        desk = Desk(session, tmp_path)
        first = clone(origin, tmp_path / "first")
        arrived, size = await desk.send(first)
        assert arrived == listing(first)
        assert size.uploaded_bytes is None
        for number in range(5):
            (origin / f"d{number}" / f"f{number}.txt").write_text("changed\n")
        (origin / "d9" / "f9.txt").unlink()
        (origin / "d8" / "f8.txt").chmod(0o755)
        git(origin, "commit", "--quiet", "--all", "--message=two")
        second = clone(origin, tmp_path / "second")
        arrived, size = await desk.send(second)
        assert arrived == listing(second)
        # Git's index and its logs, and the few files: not the 300.
        assert size.uploaded_bytes is not None
        assert size.bytes is not None
        assert size.uploaded_bytes < size.bytes / 3


async def test_a_directory_with_a_repository_of_its_own_is_sent_as_it_is(
    engine: Engine, tmp_path: Path
) -> None:
    root = tmp_path / "w"
    root.mkdir()
    async with engine.session() as session:
        desk = Desk(session, tmp_path)
        await desk.send(root)
        (root / "nested").mkdir()
        git(root / "nested", "init", "--quiet")
        (root / "nested" / "file").write_text("x")
        arrived, _ = await desk.send(root)
    assert arrived == listing(root)


async def test_content_counts_where_size_and_time_are_the_same(
    engine: Engine, tmp_path: Path
) -> None:
    root = tmp_path / "w"
    root.mkdir()
    file = root / "file"
    async with engine.session() as session:
        desk = Desk(session, tmp_path)
        for content in ("one", "two", "three"):
            file.write_text(content)
            os.utime(file, ns=(0, 0))
            arrived, _ = await desk.send(root)
            assert arrived == listing(root)


async def test_two_jobs_at_once_share_a_base(engine: Engine, tmp_path: Path) -> None:
    roots = [tmp_path / "one", tmp_path / "two", tmp_path / "three"]
    for root in roots:
        root.mkdir()
        for number in range(50):
            (root / f"f{number}").write_text("the same")
        (root / "name").write_text(root.name)
    async with engine.session() as session:
        desk = Desk(session, tmp_path)
        answers = await together(*map(desk.send, roots))
    for root, (arrived, _) in zip(roots, answers, strict=True):
        assert arrived == listing(root)
    # One of them was the base; of the others only what differs has travelled.
    assert sorted(size.uploaded_bytes or 0 for _, size in answers) == [0, 3, 5]


async def test_a_file_that_changes_while_it_is_sent_never_arrives_half(
    engine: Engine, tmp_path: Path
) -> None:
    root = tmp_path / "w"
    root.mkdir()
    for number in range(200):
        (root / f"still{number}").write_text("x" * 1000)
    letters = "ABCDEFGH"
    script = (
        "import sys, time\n"
        f"for n in range(100_000):\n"
        f"    letter = '{letters}'[n % {len(letters)}]\n"
        "    with open(sys.argv[1], 'w') as f: f.write(letter * 3_000_000)\n"
        "    time.sleep(0.2)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(root / "busy")]) as writer:
        try:
            async with engine.session() as session:
                desk = Desk(session, tmp_path)
                for whole in (True, False, False, False):
                    arrived, _ = await desk.send(root, whole=whole)
                    content = arrived["busy"][1]
                    assert len(content) in {0, 3_000_000}
                    assert len(set(content)) <= 1
        finally:
            writer.kill()
