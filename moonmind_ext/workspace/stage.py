"""Files that have changed, copied to where an engine takes them from."""

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from moonmind_ext.workspace.delta import parents
from moonmind_ext.workspace.manifest import Node, copy


def stage(root: Path, staging: Path, paths: Iterable[str]) -> dict[str, Node]:
    """Copy paths of a workspace, with the directories that they are in; blocking.

    What is not there any more is left out, and so is what is below a directory that has
    become something else: through a link, a copy would lead back to where it came from.
    """
    wanted = {"", *paths}
    wanted.update(parent for path in paths for parent in parents(path))
    nodes: dict[str, Node] = {}
    # Parents come before what is in them.
    for path in sorted(wanted):
        parent = nodes.get(path.rpartition("/")[0])
        if path and (parent is None or not stat.S_ISDIR(parent.mode)):
            continue
        try:
            node = _stage_one(root / path, staging / path)
        except (FileNotFoundError, NotADirectoryError):
            # It has gone since.
            continue
        if node is not None:
            nodes[path] = node
    for path, node in reversed(nodes.items()):
        if stat.S_ISDIR(node.mode):
            # Only now: some may not be written into, and what is made in one changes its time.
            (staging / path).chmod(stat.S_IMODE(node.mode))
            with suppress(OSError):
                _keep_time((root / path).lstat(), staging / path)
    return nodes


def _stage_one(source: Path, target: Path) -> Node | None:
    status = source.lstat()
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        target.mkdir(mode=stat.S_IRWXU)
        return Node(mode, b"")
    if stat.S_ISLNK(mode):
        # Not as a path, which would write it in another way.
        link = os.readlink(source)  # noqa: PTH115
        target.symlink_to(link)
        _keep_time(status, target)
        return Node(mode, os.fsencode(link))
    if stat.S_ISREG(mode):
        return Node(mode, copy(source, target))
    return None


def _keep_time(status: os.stat_result, target: Path) -> None:
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
