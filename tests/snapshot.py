"""What is in a directory, as far as an archive keeps it."""

import os
import stat
from pathlib import Path

Snapshot = dict[bytes, tuple[int, int, int, bytes]]


def snapshot(root: Path) -> Snapshot:
    """All that an archive keeps: modes, whole seconds, numbers of links, contents."""
    found: Snapshot = {}
    for folder, directories, files in os.walk(os.fsencode(root)):
        for name in (*directories, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            content = b""
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = Path(os.fsdecode(path)).read_bytes()
            found[os.path.relpath(path, os.fsencode(root))] = (
                status.st_mode,
                int(status.st_mtime),
                status.st_nlink,
                content,
            )
    return found
