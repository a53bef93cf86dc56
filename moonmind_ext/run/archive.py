"""A tar archive that a container has made becomes files; nothing in it is believed.

Header by header, since `tarfile.open` takes an archive that is broken in the middle for
one that has ended there, and keeps all members in memory. Taken is what GNU tar and
busybox write of a directory, and no extension beyond their long names.
"""

# These functions touch every file of an archive, and pathlib would be half of their time.
# ruff: noqa: PTH101, PTH102

import errno
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_BLOCK_BYTES = 512
_CHUNK_BYTES = 1 << 20
_LONGEST_NAME = 4096
"""No system call takes a longer one."""

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
"""Not the archive's fault."""

_END = bytes(_BLOCK_BYTES)
_LONG = {tarfile.GNUTYPE_LONGNAME: "name", tarfile.GNUTYPE_LONGLINK: "linkname"}
"""Not members: what they hold is an attribute of the next one."""

_EMPTY = {tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE}


class ArchiveError(Exception):
    """An archive is not what `tar` writes of a directory, or cannot be unpacked here."""


def unpack(archive: Path, into: Path) -> None:
    """Unpack an archive as an engine exports a directory; blocking.

    Whoever runs this owns everything. Of times there are whole seconds, and the root
    stays as it is.

    Parameters
    ----------
    into
        An empty directory that nobody else writes to.

    Raises
    ------
    OSError
        When the disk is full or fails.
    ArchiveError
        When the archive is broken, names a path twice or outside of itself, or has
        anything but files, directories and links. What was unpacked by then is left.
    """
    directories = {"": os.fspath(into)}
    made: list[tuple[str, tarfile.TarInfo]] = []
    try:
        with archive.open("rb", buffering=_CHUNK_BYTES) as file:
            for member in _members(file):
                if not member.name and member.isdir():
                    continue
                place = _place(directories, member.name)
                # Each of these refuses to make what is already there.
                if member.isreg():
                    _write_file(file, member, place)
                elif member.isdir():
                    os.mkdir(place, stat.S_IRWXU)
                    directories[member.name] = place
                    made.append((place, member))
                elif member.issym():
                    os.symlink(member.linkname, place)  # noqa: PTH211
                    os.utime(place, (member.mtime, member.mtime), follow_symlinks=False)
                else:
                    _link(_place(directories, _relative(member.linkname)), place)
        # Innermost first, and last of all: what is made in a directory changes its time,
        # and one without write permission takes nothing more.
        for place, member in reversed(made):
            os.chmod(place, stat.S_IMODE(member.mode))
            os.utime(place, (member.mtime, member.mtime))
    except (OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        # Also of names and times that no system call takes.
        raise ArchiveError(f"cannot be unpacked: {error}") from error


def _place(directories: dict[str, str], path: str) -> str:
    """Say where a path goes, in a directory that was unpacked: never through a link."""
    parent, _, name = path.rpartition("/")
    folder = directories.get(parent)
    if folder is None or path.startswith("/") or name in {"", ".", ".."}:
        raise ArchiveError(f"has the path {path!r}")
    return f"{folder}/{name}"


def _write_file(file: BinaryIO, member: tarfile.TarInfo, place: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    target = os.open(place, flags, stat.S_IRUSR | stat.S_IWUSR)
    try:
        left = member.size
        while left:
            chunk = _read(file, min(left, _CHUNK_BYTES))
            left -= len(chunk)
            while chunk:
                chunk = chunk[os.write(target, chunk) :]
        os.fchmod(target, stat.S_IMODE(member.mode))
        os.utime(target, (member.mtime, member.mtime))
    finally:
        os.close(target)


def _link(source: str, place: str) -> None:
    if not stat.S_ISREG(os.lstat(source).st_mode):
        raise ArchiveError("has a hard link to what is no file")
    os.link(source, place, follow_symlinks=False)


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Read all headers; whoever takes a file's must read its content before the next."""
    long: dict[str, str] = {}
    while (block := _read(file, _BLOCK_BYTES)) != _END:
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ArchiveError(f"has a header that is broken: {error}") from error
        kind, size = member.type, member.size
        if kind in _LONG:
            if not 0 <= size <= _LONGEST_NAME or _LONG[kind] in long:
                raise ArchiveError("has a name that is too long")
            long[_LONG[kind]] = os.fsdecode(_read(file, size).partition(b"\0")[0])
        elif (kind == tarfile.REGTYPE and size >= 0) or (kind in _EMPTY and not size):
            for attribute, value in long.items():
                setattr(member, attribute, value)
            long.clear()
            name = member.name.removesuffix("/") if member.isdir() else member.name
            member.name = _relative(name)
            yield member
        else:
            raise ArchiveError(f"has a member of the type {kind!r} and {size} bytes")
        _read(file, -size % _BLOCK_BYTES)
    if long or _read(file, _BLOCK_BYTES) != _END:
        raise ArchiveError("has no end")


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ArchiveError("ends too early")
    return data


def _relative(name: str) -> str:
    """Take off what `tar` puts before a path in a directory that it was given as `.`."""
    return "" if name == "." else name.removeprefix("./")
