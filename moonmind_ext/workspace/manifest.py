"""What is in a workspace, by content: read so that a change meanwhile is noticed.

Times say nothing: a fresh clone has new ones everywhere, and a build tool may put
old ones back. So files are compared by what is in them.
"""

import errno
import hashlib
import os
import stat
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

from moonmind_ext.workspace.errors import WorkspaceError

THREADS = 2
"""That read big files."""

BIG_BYTES = 1 << 20
"""From here on hashing takes so long that a thread of its own pays."""

CHUNK_BYTES = 1 << 20

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
"""A file of a workspace may have become a link or a pipe since it was looked at."""

TICK_NS = 20_000_000
"""Nanoseconds. The kernel stamps files with a clock that moves in steps of 4 to 10 ms:
a file that was stamped so short a time before it was looked at may have changed again
within the same step."""


COPY_ATTEMPTS = 50
"""Of a file that somebody writes to: a second, with the pauses between."""


class Stamp(NamedTuple):
    """What the file system says of a path without reading it."""

    mode: int
    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        """Take it from what `lstat` says."""
        return cls(
            status.st_mode, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
        )

    @property
    def is_directory(self) -> bool:
        """Whether there is something below it."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it has bytes of its own."""
        return stat.S_ISREG(self.mode)

    @property
    def is_special(self) -> bool:
        """Whether it is neither file nor directory nor link."""
        return not (self.is_directory or self.is_file or stat.S_ISLNK(self.mode))


Stamps = Mapping[str, Stamp]
"""By relative path; the root is `""`. Bytes that are no UTF-8 are surrogates."""


class Node(NamedTuple):
    """What is at a path.

    Attributes
    ----------
    mode
        Type and permissions, as `st_mode`.
    content
        SHA-256 of a file, or what git has in its place (`index.vouched`), which is
        shorter; the target of a link; nothing for a directory.
    """

    mode: int
    content: bytes


Manifest = Mapping[str, Node]
"""By relative path, as in `Stamps`."""


def look(
    root: Path, left_out: Collection[str] = (), *, all_readable: bool = True
) -> dict[str, Stamp]:
    """Stamp everything in a directory without reading it; blocking.

    Parameters
    ----------
    left_out
        Relative paths that do not count, nor what is below them.
    all_readable
        Whether what cannot be read is an error, rather than nothing.

    Raises
    ------
    WorkspaceError
        When something cannot be read: better now than half sent.
    """
    try:
        found = {"": Stamp.of(root.stat())}
        todo = [""]
        while todo:
            directory = todo.pop()
            if not all_readable and not os.access(root / directory, os.R_OK | os.X_OK):
                continue
            with os.scandir(root / directory) as entries:
                for entry in entries:
                    path = f"{directory}/{entry.name}" if directory else entry.name
                    if path in left_out:
                        continue
                    stamp = found[path] = Stamp.of(entry.stat(follow_symlinks=False))
                    if stamp.is_directory:
                        todo.append(path)
                    elif all_readable and not _is_readable(entry.path, stamp):
                        raise WorkspaceError(f"{entry.path}: cannot be read (permission denied)")
    except OSError as error:
        raise WorkspaceError(f"{error.filename}: {error.strerror}") from error
    return found


def _is_readable(place: str, stamp: Stamp) -> bool:
    # Of most files the mode tells.
    for_all = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
    return not stamp.is_file or stamp.mode & for_all == for_all or os.access(place, os.R_OK)


def changed_between(before: Stamps, after: Stamps, began_ns: int) -> set[str]:
    """Say which paths may have changed between two looks, or are gone or new.

    Parameters
    ----------
    began_ns
        When the first look began, in nanoseconds of `time.time_ns`.
    """
    fresh = began_ns - TICK_NS
    return {
        path
        for path in before.keys() | after.keys()
        if (stamp := before.get(path)) is None
        or stamp != after.get(path)
        or (stamp.is_file and stamp.ctime_ns >= fresh)
    }


def read(
    root: Path, stamps: Stamps, known: Mapping[str, bytes], *, all_readable: bool = True
) -> dict[str, Node]:
    """Read everything that was stamped; blocking.

    What is not there any more is left out.

    Parameters
    ----------
    known
        The content of files that need not be read.
    all_readable
        Whether a file that cannot be read is an error, rather than empty.

    Raises
    ------
    WorkspaceError
        When a file cannot be read.
    """

    def read_one(path: str) -> Node | None:
        if (content := known.get(path)) is not None:
            return Node(stamps[path].mode, content)
        return _read_node(f"{root}/{path}", stamps[path], all_readable)

    big = [
        path
        for path, stamp in stamps.items()
        if stamp.size > BIG_BYTES and stamp.is_file and path not in known
    ]
    with ThreadPoolExecutor(THREADS) as threads:
        # While the big ones are hashed outside of the interpreter, the small ones are
        # read here: between threads they would only pass the interpreter around.
        reading = dict(zip(big, [threads.submit(read_one, path) for path in big], strict=True))
        nodes = {path: read_one(path) for path in stamps if path not in reading}
        nodes |= {path: future.result() for path, future in reading.items()}
    return {path: node for path, node in nodes.items() if node is not None}


def _read_node(place: str, stamp: Stamp, all_readable: bool) -> Node | None:
    """Read one file or link; None when it is not there any more, or is something else."""
    try:
        if stamp.is_file:
            return Node(stamp.mode, _digest(place, stamp.size))
        if stat.S_ISLNK(stamp.mode):
            # Not as a path, which would write it in another way.
            return Node(stamp.mode, os.fsencode(os.readlink(place)))  # noqa: PTH115
    except OSError as error:
        # EINVAL: no link any more; ELOOP: one now.
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.ELOOP}:
            return None
        if error.errno == errno.EACCES and not all_readable:
            return Node(stamp.mode, b"")
        raise WorkspaceError(f"{place}: cannot be read ({error.strerror})") from error
    return Node(stamp.mode, b"")


def _digest(place: str, size: int) -> bytes:
    # A small file is read in one go.
    descriptor = os.open(place, _READ)
    try:
        hashed = hashlib.sha256()
        while chunk := os.read(descriptor, min(size + 1, CHUNK_BYTES)):
            hashed.update(chunk)
            if len(chunk) == size:
                break
        return hashed.digest()
    finally:
        os.close(descriptor)


def copy(source: Path, target: Path) -> bytes:
    """Copy a file as it was at one time, never half; gives its SHA-256; blocking.

    Raises
    ------
    WorkspaceError
        When it cannot be read, or changes all the time.
    FileNotFoundError
        When it is not there any more.
    """
    for _ in range(COPY_ATTEMPTS):
        began = time.time_ns()
        before = Stamp.of(source.lstat())
        hashed = hashlib.sha256()
        with _open_file(source) as from_, target.open("wb") as to:
            while chunk := from_.read(CHUNK_BYTES):
                hashed.update(chunk)
                to.write(chunk)
        after = Stamp.of(source.lstat())
        if not changed_between({"": before}, {"": after}, began):
            target.chmod(stat.S_IMODE(after.mode))
            os.utime(target, ns=(after.mtime_ns, after.mtime_ns))
            return hashed.digest()
        time.sleep(TICK_NS / 1e9)
    raise WorkspaceError(f"{source}: changes while it is read")


def _open_file(source: Path) -> BinaryIO:
    """Open a file, and nothing that has taken its place: no link, no pipe to wait for."""
    try:
        descriptor = os.open(source, _READ)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileNotFoundError(errno.ENOENT, "is a link now", str(source)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, "is no file any more", str(source))
    return os.fdopen(descriptor, "rb")
