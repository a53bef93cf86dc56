"""Directories that an engine has exported: walked and removed whatever their modes are.

Those modes are a command's, and an ordinary user is held up by them.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """List everything below a directory, without following a link.

    Directories come before what is in them, names in byte order. Those that their
    owner may not use freely are made so before they are looked into: they are
    copies, and ours.

    Yields
    ------
    tuple
        The path relative to `root`, and what `lstat` says.
    """
    todo = [""]
    while todo:
        directory = todo.pop()
        ensure_mode(root / directory, stat.S_IRWXU)
        names = sorted((entry.name for entry in (root / directory).iterdir()), key=os.fsencode)
        inner: list[str] = []
        for name in names:
            path = f"{directory}/{name}" if directory else name
            status = (root / path).lstat()
            yield path, status
            # It may have been removed by who looks at it.
            if stat.S_ISDIR(status.st_mode) and (root / path).is_dir():
                inner.append(path)
        todo.extend(reversed(inner))


def remove_tree(root: Path) -> None:
    """Remove a directory of ours with everything in it."""
    for _ in walk(root):
        # Only for the modes.
        pass
    shutil.rmtree(root)


def ensure_mode(path: Path, bits: int) -> None:
    """Add permissions to a file or directory that lacks some of them."""
    mode = stat.S_IMODE(path.lstat().st_mode)
    if mode & bits != bits:
        path.chmod(mode | bits)
