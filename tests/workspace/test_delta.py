import stat
from collections.abc import Iterable

from moonmind_ext.workspace.delta import APART_FILES, FREE_FILES, set_apart
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


def test_what_git_changes_all_the_time_goes_with_them() -> None:
    paths = [".git/index", ".git/logs/HEAD", ".git/objects/pack/a.pack", ".git/objects/01/23"]

    assert set_apart(stamps(paths), []) == (".git/index", ".git/logs/HEAD")


def test_a_small_workspace_goes_in_one_piece() -> None:
    assert set_apart({"a": Stamp(stat.S_IFREG, 1, 1, 1, 1)}, ["a"]) == ()


def test_too_much_to_go_by_itself_goes_with_the_rest() -> None:
    many = [f"new{number}" for number in range(APART_FILES)]
    workspace = stamps(many)

    assert set_apart(workspace, many[:FREE_FILES]) == tuple(sorted(many[:FREE_FILES]))
    assert set_apart(workspace, many) == ()


def test_a_name_that_is_a_pattern_goes_with_the_rest() -> None:
    names = ["a*", "[b]", "c?", "!d", " e", "f\\g", "h\ni", "plain"]

    assert set_apart(stamps(names), names) == ("plain",)
