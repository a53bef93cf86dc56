import posixpath
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.artifacts import (
    has_setuid,
    in_git,
    readable,
    refuse_link,
    refuse_name,
    refuse_type,
)


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("a", "b"),
        ("a", "./b/c"),
        ("dir/a", "../b"),
        ("x/y/z", "../../w"),
        ("a", "dangling/never/mind"),
        ("a", "..b"),
    ],
)
def test_links_that_stay_inside_are_kept(path: str, target: str) -> None:
    assert refuse_link(path, target) is None


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("a", "/etc/passwd"),
        ("a", ".."),
        ("a", "../x"),
        ("dir/a", "../../x"),
        # Through a link `b -> .` this would leave, though its text does not.
        ("dir/a", "b/../../x"),
        ("a", "b/.."),
    ],
)
def test_links_that_may_leave_are_refused(path: str, target: str) -> None:
    assert refuse_link(path, target) is not None


names = st.sampled_from(["a", "b", ".", "..", "...", ""])


@given(st.lists(names.filter(lambda n: n.strip(".")), min_size=1, max_size=4), st.lists(names))
def test_no_kept_link_leads_out_by_its_text(path: list[str], target: list[str]) -> None:
    link, text = "/".join(path), "/".join(target)
    if refuse_link(link, text) is None:
        end = posixpath.normpath(posixpath.join("/root", posixpath.dirname(link), text))
        assert end == "/root" or end.startswith("/root/")


def test_only_files_directories_and_links_are_kept() -> None:
    for kept in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
        assert refuse_type(kept | 0o644) is None
    for refused in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
        assert refuse_type(refused | 0o644) is not None


def test_names_that_a_run_writes_itself_are_not_the_commands() -> None:
    assert refuse_name("metadata/run.json", stat.S_IFREG) is not None
    assert refuse_name("logs", stat.S_IFLNK) is not None
    assert refuse_name("logs", stat.S_IFDIR) is None
    assert refuse_name("logs/mine.log", stat.S_IFREG) is None


def test_setuid_matters_on_files_only() -> None:
    assert has_setuid(stat.S_IFREG | stat.S_ISUID)
    assert has_setuid(stat.S_IFREG | stat.S_ISGID)
    assert not has_setuid(stat.S_IFDIR | stat.S_ISGID)


def test_a_git_directory_is_one_at_any_depth() -> None:
    assert in_git(".git/")
    assert in_git("vendor/lib/.git/config")
    assert not in_git(".gitignore")
    assert not in_git("a.git/x")


@given(st.binary(max_size=20))
def test_every_file_name_can_be_shown(name: bytes) -> None:
    readable(name.decode("utf-8", "surrogateescape")).encode("utf-8")
