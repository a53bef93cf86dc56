import stat
from collections.abc import Iterable

from moonmind_ext.workspace.delta import APART_BYTES, APART_FILES, MAX_APART, set_apart
from moonmind_ext.workspace.manifest import Stamp, Stamps


def stamps(
    paths: Iterable[str] = (), *, directories: Iterable[str] = (), size: int = 100
) -> Stamps:
    """A large workspace, with these paths in it."""
    modes = {
        **{f"file{number}": stat.S_IFREG for number in range(APART_FILES)},
        **dict.fromkeys(paths, stat.S_IFREG),
        **dict.fromkeys(directories, stat.S_IFDIR),
    }
    return {path: Stamp(mode, size, 1, 1, 1) for path, mode in modes.items()}


def test_files_that_somebody_works_on_go_by_themselves() -> None:
    workspace = stamps(["src/a", "b"], directories=["src"])

    assert set_apart(workspace, ["src/a", "b", "gone", "src"]) == ("b", "src/a")


def test_a_directory_that_is_new_stands_for_what_is_in_it() -> None:
    workspace = stamps(["new/a", "new/b/c", "newer"], directories=["new", "new/b"])

    assert set_apart(workspace, ["new/"]) == ("new/a", "new/b/c")


def test_what_git_changes_all_the_time_goes_with_them() -> None:
    changing = [".git/HEAD", ".git/index", ".git/logs/HEAD", ".git/refs/heads/main"]
    large = [".git/objects/01/23", ".git/lfs/objects/4", ".git/modules/sub/objects/5"]

    assert set_apart(stamps([*changing, *large]), []) == tuple(changing)


def test_a_small_workspace_goes_in_one_piece() -> None:
    assert set_apart({"a": Stamp(stat.S_IFREG, 1, 1, 1, 1)}, ["a"]) == ()


def test_no_more_goes_by_itself_than_is_soon_copied() -> None:
    sizes = {"huge": 100 * APART_BYTES, "large": APART_BYTES - 10, "small": 5, "smaller": 4}
    workspace = {
        **stamps(),
        **{path: Stamp(stat.S_IFREG, size, 1, 1, 1) for path, size in sizes.items()},
    }
    many = [f"new{number}" for number in range(APART_FILES)]

    assert set_apart(workspace, sizes) == ("large", "small", "smaller")
    assert len(set_apart(stamps(many), many)) == MAX_APART


def test_a_name_that_is_a_pattern_goes_with_the_rest() -> None:
    names = ["a*", "[b]", "c?", "!d", " e", "f\\g", "h\ni", "plain"]

    assert set_apart(stamps(names), names) == ("plain",)
