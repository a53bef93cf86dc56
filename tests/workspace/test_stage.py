import os
import stat
from pathlib import Path

import pytest

from moonmind_ext.workspace.manifest import copy
from moonmind_ext.workspace.stage import stage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workspace with a file in a directory."""
    (tmp_path / "w" / "d").mkdir(parents=True)
    (tmp_path / "w" / "d" / "f").write_text("text")
    return tmp_path / "w"


def test_files_come_with_their_directories_modes_and_times(root: Path, tmp_path: Path) -> None:
    (root / "d" / "f").chmod(0o741)
    (root / "d" / "l").symlink_to("f")
    (root / "d").chmod(0o711)
    for path, time in (("d/f", 1_000), ("d/l", 2_000), ("d", 3_000)):
        os.utime(root / path, ns=(time, time), follow_symlinks=False)

    nodes = stage(root, tmp_path / "s", ["d/f", "d/l"])

    assert set(nodes) == {"", "d", "d/f", "d/l"}
    for path in ("d", "d/f", "d/l"):
        source, copied = ((folder / path).lstat() for folder in (root, tmp_path / "s"))
        assert (copied.st_mode, copied.st_mtime_ns) == (source.st_mode, source.st_mtime_ns)


def test_what_is_behind_a_directory_that_became_a_link_stays_as_it_is(
    root: Path, tmp_path: Path
) -> None:
    (root / "d").rename(tmp_path / "real")
    (root / "d").symlink_to(tmp_path / "real")

    nodes = stage(root, tmp_path / "s", ["d/f", "d/deeper/g"])

    assert set(nodes) == {"", "d"}
    assert stat.S_ISLNK(nodes["d"].mode)
    assert (tmp_path / "real" / "f").read_text() == "text"


def test_what_is_behind_a_directory_that_became_a_file_is_left_out(
    root: Path, tmp_path: Path
) -> None:
    (root / "d" / "f").unlink()
    (root / "d").rmdir()
    (root / "d").write_text("now a file")

    assert set(stage(root, tmp_path / "s", ["d/f"])) == {"", "d"}


def test_a_link_and_a_pipe_in_the_place_of_a_file_are_not_opened(
    root: Path, tmp_path: Path
) -> None:
    (root / "link").symlink_to("d/f")
    os.mkfifo(root / "pipe")

    for name in ("link", "pipe"):
        with pytest.raises(FileNotFoundError):
            copy(root / name, tmp_path / "copy")
