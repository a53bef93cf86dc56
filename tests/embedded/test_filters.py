"""Patterns, as Dagger and git have them."""

import pytest

from moonmind_ext.embedded import filters
from moonmind_ext.embedded import tree as trees
from moonmind_ext.embedded.filters import Filter
from moonmind_ext.embedded.tree import Entry, Tree

PATHS = (
    "a.py",
    "sub/b.py",
    "sub/deep/c.py",
    "sub/deep/c.txt",
    "build/out.o",
    "src/build/x",
    ".hidden",
)


def taken(wanted: Filter, ignore_files: dict[str, str] | None = None) -> list[str]:
    tree: Tree = {"": trees.directory()}
    for path in (*PATHS, *(ignore_files or {})):
        tree = trees.put(tree, path, {"": Entry(0o100644)})
    kept = filters.apply(tree, wanted, ignore_files or {})
    return sorted(path for path in kept if kept[path].is_file and not path.endswith(".gitignore"))


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        (("sub",), ["sub/b.py", "sub/deep/c.py", "sub/deep/c.txt"]),
        (("sub/",), ["sub/b.py", "sub/deep/c.py", "sub/deep/c.txt"]),
        (("*.py",), ["a.py"]),
        (("**/*.py",), ["a.py", "sub/b.py", "sub/deep/c.py"]),
        (("**/c.?xt",), ["sub/deep/c.txt"]),
        (("sub/**", "!sub/deep"), ["sub/b.py"]),
        (("[ab].py",), ["a.py"]),
    ],
)
def test_include_takes_what_matches_and_all_below_it(
    include: tuple[str, ...], expected: list[str]
) -> None:
    assert taken(Filter(include=include)) == expected


def test_exclude_leaves_out_what_matches_and_all_below_it() -> None:
    assert taken(Filter(exclude=("sub", "**/build"))) == [".hidden", "a.py"]


def test_an_exception_takes_a_file_out_of_an_excluded_directory() -> None:
    assert "sub/b.py" in taken(Filter(exclude=("sub", "!sub/b.py")))
    assert "sub/deep/c.py" not in taken(Filter(exclude=("sub", "!sub/b.py")))


def test_a_gitignore_pattern_without_a_slash_counts_at_any_depth() -> None:
    found = taken(Filter(gitignore=True), {".gitignore": "# comment\nbuild/\n*.txt\n"})
    assert found == [".hidden", "a.py", "sub/b.py", "sub/deep/c.py"]


def test_a_gitignore_pattern_with_a_slash_is_anchored() -> None:
    found = taken(Filter(gitignore=True), {".gitignore": "/build\n"})
    assert "src/build/x" in found
    assert "build/out.o" not in found


def test_a_later_gitignore_line_takes_back_an_earlier_one() -> None:
    assert "a.py" in taken(Filter(gitignore=True), {".gitignore": "*.py\n!a.py\n"})


def test_an_inner_gitignore_counts_for_its_own_directory() -> None:
    found = taken(Filter(gitignore=True), {"sub/.gitignore": "*.py\n"})
    assert "a.py" in found
    assert "sub/b.py" not in found


def test_without_gitignore_the_files_are_not_looked_at() -> None:
    assert "a.py" in taken(Filter(exclude=("sub",)), {".gitignore": "*.py\n"})
