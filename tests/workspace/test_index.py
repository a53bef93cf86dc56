import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moonmind_ext.workspace.index import vouched
from moonmind_ext.workspace.manifest import look, read


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
    # The machine's own configuration is not part of a test.
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(
        ["git", *identity, "-C", folder, *arguments],
        check=True,
        capture_output=True,
        env=environment,
    )


def let_a_moment_pass() -> None:
    """What is written after this has another time than what was written before."""
    time.sleep(0.03)


def commit(folder: Path, files: dict[str, str], *options: str) -> Path:
    """Make a repository of some files, with an index that is newer than they are."""
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "--quiet", "-b", "main", *options)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    let_a_moment_pass()
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "files")
    return folder


def believed(folder: Path) -> set[str]:
    return set(vouched(folder, look(folder)))


FILES = {"a": "one", "src/b": "two"}


def test_files_that_nobody_has_touched_are_believed(tmp_path: Path) -> None:
    assert believed(commit(tmp_path, FILES)) == {"a", "src/b"}


def test_content_is_the_same_in_another_checkout_if_git_says_so(tmp_path: Path) -> None:
    one = commit(tmp_path / "one", FILES)
    two = commit(tmp_path / "two", {"a": "one", "src/b": "TWO"})

    first, second = (vouched(folder, look(folder)) for folder in (one, two))

    assert first["a"] == second["a"]
    assert first["src/b"] != second["src/b"]


def overwrite(path: Path) -> None:
    """With as many bytes, and the times it had."""
    status = path.stat()
    path.write_text(path.read_text().swapcase())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_text(path.read_text())
    other.rename(path)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("src/b")


def assume(path: Path) -> None:
    git(path.parent, "update-index", "--assume-unchanged", path.name)
    overwrite(path)


def skip(path: Path) -> None:
    git(path.parent, "update-index", "--skip-worktree", path.name)
    overwrite(path)


def announce(path: Path) -> None:
    git(path.parent, "rm", "--quiet", "--cached", path.name)
    git(path.parent, "add", "--intent-to-add", path.name)


def conflict(path: Path) -> None:
    folder = path.parent
    for branch in ("left", "right"):
        git(folder, "switch", "--quiet", "-c", branch, "main")
        path.write_text(branch)
        git(folder, "commit", "--quiet", "-a", "-m", branch)
    with pytest.raises(subprocess.CalledProcessError):
        git(folder, "merge", "left")


@pytest.mark.parametrize(
    "act", [overwrite, replace, Path.touch, Path.unlink, link, assume, skip, announce, conflict]
)
def test_a_file_that_may_be_another_is_not_believed(
    tmp_path: Path, act: Callable[[Path], None]
) -> None:
    folder = commit(tmp_path, FILES)
    let_a_moment_pass()

    act(folder / "a")

    assert believed(folder) == {"src/b"}


@pytest.mark.parametrize(("later_ns", "is_believed"), [(-1, False), (0, False), (1, True)])
def test_a_file_may_have_changed_in_the_moment_in_which_the_index_was_written(
    tmp_path: Path, later_ns: int, is_believed: bool
) -> None:
    folder = commit(tmp_path, {"a": "one"})
    written_ns = (folder / "a").stat().st_ctime_ns + later_ns

    os.utime(folder / ".git" / "index", ns=(written_ns, written_ns))

    assert believed(folder) == ({"a"} if is_believed else set())


@pytest.mark.parametrize(
    "line",
    [
        *("* text", "* text=auto", "*.x eol=crlf", "* crlf", "*.bin filter=lfs -text", "* ident"),
        *("* working-tree-encoding=UTF-16", "[attr]mine eol=crlf", '"with blank" diff eol=lf'),
        *(
            "* !text",
            "\t* unknown",
            "*.x diff=x\r\n*.y text",
            "*\rtext\reol=crlf",
            "*.c\r eol=crlf",
        ),
    ],
)
@pytest.mark.parametrize("place", [".gitattributes", "src/.gitattributes", ".git/info/attributes"])
def test_where_git_may_convert_nothing_is_believed(tmp_path: Path, line: str, place: str) -> None:
    folder = commit(tmp_path, FILES)
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_bytes(f"# why\n\n{line}\n".encode())

    assert believed(folder) == set()


def test_attributes_that_convert_nothing_do_no_harm(tmp_path: Path) -> None:
    lines = "# text\n*.lock -diff linguist-generated=true\n*.png binary\n/tests export-ignore\n"
    folder = commit(tmp_path, {**FILES, ".gitattributes": lines})

    assert believed(folder) == {*FILES, ".gitattributes"}


def test_attributes_that_are_not_there_any_more_may_have_converted(tmp_path: Path) -> None:
    folder = commit(tmp_path, {**FILES, ".gitattributes": "* text\n"})
    (folder / ".gitattributes").unlink()

    assert believed(folder) == set()


def test_attributes_that_are_no_file_are_not_opened(tmp_path: Path) -> None:
    folder = commit(tmp_path, FILES)
    (folder / ".gitattributes").symlink_to("/dev/zero")

    assert believed(folder) == set()


@pytest.mark.parametrize(
    ("key", "value"),
    [("core.autocrlf", "input"), ("core.eol", "crlf"), ("core.attributesFile", "/nowhere")],
)
@pytest.mark.parametrize("whose", ["the repository's", "the user's"])
def test_a_configuration_that_converts_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str, whose: str
) -> None:
    folder = commit(tmp_path / "w", FILES)
    users = tmp_path / "gitconfig"
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(users))
    file = folder / ".git" / "config" if whose == "the repository's" else users
    git(tmp_path, "config", "--file", str(file), key, value)

    assert believed(folder) == set()


def test_the_users_attributes_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = commit(tmp_path / "w", FILES)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "git").mkdir(parents=True)
    assert believed(folder) == set(FILES)

    (tmp_path / "home" / "git" / "attributes").write_text("* text\n")

    assert believed(folder) == set()


def test_a_user_without_a_home_reads_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = commit(tmp_path, FILES)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 3_999_999_999)

    assert believed(folder) == set()


def short(index: Path) -> None:
    index.write_bytes(index.read_bytes()[:-100])


def flipped(index: Path) -> None:
    content = bytearray(index.read_bytes())
    content[60] ^= 1
    index.write_bytes(content)


def empty(index: Path) -> None:
    index.write_bytes(b"")


def endless(index: Path) -> None:
    index.unlink()
    index.symlink_to("/dev/zero")


def pipe(index: Path) -> None:
    index.unlink()
    os.mkfifo(index)


def version_4(index: Path) -> None:
    git(index.parent.parent, "update-index", "--index-version=4")


def split(index: Path) -> None:
    git(index.parent.parent, "update-index", "--split-index")


@pytest.mark.parametrize(
    "spoil", [Path.unlink, short, flipped, empty, endless, pipe, version_4, split]
)
def test_an_index_of_another_kind_says_nothing(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = commit(tmp_path, FILES)

    spoil(folder / ".git" / "index")

    assert believed(folder) == set()


def test_a_repository_of_another_kind_says_nothing(tmp_path: Path) -> None:
    longer = commit(tmp_path / "longer", FILES, "--object-format=sha256")
    git(commit(tmp_path / "main", FILES), "worktree", "add", str(tmp_path / "tree"))
    (tmp_path / "plain").mkdir()

    for folder in (longer, tmp_path / "tree", tmp_path / "plain"):
        assert believed(folder) == set()


def test_extended_entries_are_read_over(tmp_path: Path) -> None:
    # They make the index one of version 3.
    folder = commit(tmp_path, {**FILES, "long" * 50: "x", "é/ü": "x", "last": "x"})
    git(folder, "update-index", "--skip-worktree", "a")

    assert believed(folder) == {"src/b", "long" * 50, "é/ü", "last"}


NAMES = ["a", "b", "dir/a", "dir/b", "ünïcödé", "new\nline", "deep/er/" + "long" * 30]
CONTENTS = ["", "1", "2", "11", "x" * 5000]
trees = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(CONTENTS), min_size=1)
edits = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.sampled_from([*CONTENTS, "gone", "add", "reset"]),
    ),
    max_size=6,
)


@given(trees=st.tuples(trees, trees), work=st.tuples(edits, edits))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_told_to_be_the_same_is_the_same(
    trees: tuple[dict[str, str], dict[str, str]],
    work: tuple[list[tuple[str, str]], list[tuple[str, str]]],
) -> None:
    with TemporaryDirectory() as place:
        manifests = []
        for number, (tree, edit) in enumerate(zip(trees, work, strict=True)):
            folder = commit(Path(place, str(number)), tree)
            for name, what in edit:
                change(folder, name, what)
            stamps = look(folder)
            manifests.append(read(folder, stamps, vouched(folder, stamps)))
        for path in manifests[0].keys() & manifests[1].keys():
            if not path.startswith(".git/") and manifests[0][path] == manifests[1][path]:
                one, two = (Path(place, str(number), path) for number in range(2))
                assert one.is_dir() or one.read_bytes() == two.read_bytes()


def change(folder: Path, name: str, what: str) -> None:
    """Do what somebody does in a checkout; without a pause, so that times may be the same."""
    path = folder / name
    if what == "add":
        git(folder, "add", "--all")
    elif what == "reset":
        git(folder, "reset", "--quiet", "--hard")
    elif what == "gone":
        path.unlink(missing_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(what)
