"""Directories as values, without a disk."""

import stat

from hypothesis import given
from hypothesis import strategies as st

from moonmind_ext.embedded import tree as trees
from moonmind_ext.embedded.tree import Entry, Tree

EMPTY: Tree = {"": trees.directory()}


def file(content: str = "x", permissions: int = 0o644) -> Entry:
    return Entry(stat.S_IFREG | permissions, content, len(content))


def link(target: str) -> Entry:
    return Entry(stat.S_IFLNK | 0o777, target)


def make(**files: Entry) -> Tree:
    tree = EMPTY
    for path, entry in files.items():
        tree = trees.put(tree, path.replace("__", "/"), {"": entry})
    return tree


def test_laying_a_tree_over_another_makes_the_way_to_it() -> None:
    tree = trees.put(EMPTY, "/a/b", make(c=file()))
    assert set(tree) == {"", "a", "a/b", "a/b/c"}


def test_laying_a_tree_over_another_merges_directories_and_replaces_files() -> None:
    tree = trees.put(make(a__old=file(), a__both=file("1")), "a", make(both=file("2"), new=file()))
    assert set(tree) == {"", "a", "a/old", "a/both", "a/new"}
    assert tree["a/both"].content == "2"


def test_a_file_in_the_place_of_a_directory_takes_what_was_in_it_away() -> None:
    assert set(trees.put(make(a__b__c=file()), "a", {"": file()})) == {"", "a"}


def test_a_directory_in_the_place_of_a_file_is_one() -> None:
    assert set(trees.put(make(a=file()), "a", make(b=file()))) == {"", "a", "a/b"}


def test_a_link_among_the_parents_is_followed() -> None:
    tree = trees.put(make(real__x=file(), short=link("real")), "short/y", {"": file()})
    assert "real/y" in tree
    assert tree["short"].is_link


def test_links_are_followed_inside_the_tree_only() -> None:
    tree = make(
        etc__passwd=file(), up=link("../../etc/passwd"), down=link("/etc"), loop=link("loop")
    )
    assert trees.resolve(tree, "up") == "etc/passwd"
    assert trees.resolve(tree, "down/passwd") == "etc/passwd"
    assert trees.resolve(tree, "loop") is None
    assert trees.resolve(tree, "loop", follow_last=False) == "loop"
    assert trees.resolve(tree, "../../etc/passwd") == "etc/passwd"


def test_changes_are_reported_as_a_real_engine_reports_them() -> None:
    before = make(a=file(), mode=file(), gone__z=file(), f2d=file(), d2f__k=file(), sub__x=file())
    after = make(
        a=file("2"),
        mode=file(permissions=0o700),
        f2d__q=file(),
        d2f=file(),
        sub__x=file(),
        new__n=file(),
    )
    found = trees.changes(before, after)
    assert found.added == ["d2f", "f2d/", "f2d/q", "new/", "new/n"]
    assert found.modified == ["a", "mode"]
    assert found.removed == ["d2f/", "f2d", "gone/"]


def test_a_layer_has_what_is_new_or_different_with_its_parents() -> None:
    layer = trees.layer(
        make(a=file(), sub__x=file(), sub__y=file()),
        make(a=file(), sub__x=file("2"), sub__y=file()),
    )
    assert set(layer) == {"", "sub", "sub/x"}


def test_times_are_no_part_of_a_digest() -> None:
    assert trees.digest({"": Entry(1, mtime_ns=1)}) == trees.digest({"": Entry(1, mtime_ns=2)})


names = st.text("ab", min_size=1, max_size=2)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
random_trees = st.dictionaries(paths, st.sampled_from("123"), max_size=6).map(
    lambda files: make(
        **{path.replace("/", "__"): file(content) for path, content in files.items()}
    )
)


@given(random_trees, random_trees)
def test_a_tree_with_its_changes_applied_is_the_other_tree(before: Tree, after: Tree) -> None:
    found = trees.changes(before, after)
    removed = trees.without(before, (path.rstrip("/") for path in found.removed))
    again = trees.put(removed, "/", trees.layer(before, after))
    assert trees.digest(again) == trees.digest(after)


@given(random_trees, paths)
def test_what_is_taken_out_is_gone_with_all_that_was_in_it(tree: Tree, path: str) -> None:
    rest = trees.without(tree, [path])
    assert not [p for p in rest if p == path or trees.inside(p, path)]
    assert set(rest) | {p for p in tree if p == path or trees.inside(p, path)} == set(tree)
