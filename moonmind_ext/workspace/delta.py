"""The difference between two workspaces, and what an engine has to be told of it. Pure."""

import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moonmind_ext.workspace.manifest import Manifest, Stamps

MAX_SHARE = 0.25
"""Of a workspace, by files and by bytes: beyond it, the next base is due. Sending a
quarter costs a quarter, job after job."""

FREE_FILES = 200
"""May always be sent as a difference, however small the workspace is."""

FREE_BYTES = 8 << 20
"""The same for their size: sent in a moment."""

MAX_REMOVED = 1000
"""Paths to be taken out of a base: each is a pattern that the engine goes through."""

APART_FILES = 2000
"""Of a workspace. Sending one of less again costs no more than sending it in two parts."""

MAX_APART = 500
APART_BYTES = 32 << 20
"""Of files that go by themselves: they are copied and sent each time, changed or not."""

_GIT_FILES = {
    f".git/{name}" for name in ("index", "HEAD", "ORIG_HEAD", "FETCH_HEAD", "packed-refs")
}
_GIT_DIRECTORIES = (".git/refs/", ".git/logs/")

_PLAIN = re.compile(r"[\w./+@ ,=~:;#%&()'$-]+")
"""Names that are patterns of themselves alone: the engine takes what it is to remove as
patterns, and knows no way to escape one."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What turns one workspace into another.

    Attributes
    ----------
    changed
        Paths to bring, parents before what is in them: new, different in content or
        mode, or of another type.
    removed_files, removed_directories
        Paths to take out before that; nothing below a directory that goes.
    """

    changed: tuple[str, ...]
    removed_files: tuple[str, ...]
    removed_directories: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the two are the same."""
        return not (self.changed or self.removed_files or self.removed_directories)

    @property
    def is_expressible(self) -> bool:
        """Whether an engine can be told of it without taking out something else too."""
        removed = (*self.removed_files, *self.removed_directories)
        # The root itself is not brought.
        return (
            "" not in self.changed and len(removed) <= MAX_REMOVED and all(map(_is_plain, removed))
        )


def compare(before: Manifest, after: Manifest) -> Delta:
    """Say what turns a workspace into another."""
    changed = [path for path, node in after.items() if before.get(path) != node]
    gone = [
        path
        for path, node in before.items()
        if path not in after or stat.S_IFMT(after[path].mode) != stat.S_IFMT(node.mode)
    ]
    gone_set = set(gone)
    topmost = [path for path in gone if gone_set.isdisjoint(parents(path))]
    return Delta(
        changed=tuple(sorted(changed)),
        removed_files=tuple(p for p in topmost if not stat.S_ISDIR(before[p].mode)),
        removed_directories=tuple(p for p in topmost if stat.S_ISDIR(before[p].mode)),
    )


def set_apart(stamps: Stamps, touched: Iterable[str]) -> tuple[str, ...]:
    """Choose the files that are likely to be others the next time.

    Parameters
    ----------
    stamps
        Of a workspace.
    touched
        Relative paths that somebody works on; one that ends with a slash stands for
        what is below it. What git itself changes all the time is added.

    Returns
    -------
    tuple
        Relative paths, the smallest files first as far as they may go; none where the
        workspace is small.
    """
    if len(stamps) < APART_FILES:
        return ()
    named = set(touched)
    below = (*(path for path in named if path.endswith("/")), *_GIT_DIRECTORIES)
    found = [
        (stamp.size, path)
        for path, stamp in stamps.items()
        if (path in named or path in _GIT_FILES or path.startswith(below))
        and stamp.is_file
        and _is_plain(path)
    ]
    chosen, left = [], APART_BYTES
    for size, path in sorted(found)[:MAX_APART]:
        left -= size
        if left < 0:
            break
        chosen.append(path)
    return tuple(sorted(chosen))


def _is_plain(path: str) -> bool:
    return _PLAIN.fullmatch(path) is not None and path == path.strip()


def parents(path: str) -> Iterator[str]:
    """List the directories that a path is in, outermost first, without the root."""
    at = path.find("/")
    while at >= 0:
        yield path[:at]
        at = path.find("/", at + 1)


def is_small(count: int, size: int, *, files: int, size_of_all: int) -> bool:
    """Whether so much is better sent as a difference than as a new base.

    Parameters
    ----------
    count, size
        Files of the difference, and their bytes.
    files, size_of_all
        The same of the whole workspace.
    """
    few = count <= max(FREE_FILES, MAX_SHARE * files)
    return few and size <= max(FREE_BYTES, MAX_SHARE * size_of_all)
