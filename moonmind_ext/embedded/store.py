"""The bytes of files, by content, and the way between trees and a disk."""

# These functions touch every file of a workspace, and pathlib would be half of their time.
# ruff: noqa: PTH101, PTH102, PTH104, PTH105, PTH106, PTH108, PTH110, PTH112, PTH115, PTH123, PTH208, PTH211

import hashlib
import io
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path

from moonmind_ext.embedded.filters import EVERYTHING, GITIGNORE, Filter, Selection
from moonmind_ext.embedded.tree import Entry, Tree, select

_CHUNK_BYTES = 1 << 20
_SETTLED_NS = 20_000_000
"""A time stamp younger than this may be shared with a write still to come: clocks
of file systems tick every 4 or 10 ms."""

Stamp = tuple[int, int, int, int, int]
"""Mode, size, inode, mtime and ctime: what cannot all stay the same when a file is written."""

Known = Mapping[str, tuple[Stamp, Entry]]
"""What a directory held when it was last looked at."""

NOTHING: Known = {}


def stamp(status: os.stat_result) -> Stamp:
    """Take the marks of a file's state."""
    return (
        status.st_mode,
        status.st_size,
        status.st_ino,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


class Store:
    """Immutable files below one directory, named by the SHA-256 of their content.

    All methods block.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._temporary = count()
        folder.mkdir()

    def path(self, content: str) -> str:
        """Say where the bytes are."""
        return f"{self._folder}/{content}"

    def add_bytes(self, data: bytes) -> str:
        """Keep bytes; give their digest."""
        content = hashlib.sha256(data).hexdigest()
        path = self.path(content)
        if not os.path.exists(path):
            temporary = self._temporary_path()
            with open(temporary, "xb") as file:
                file.write(data)
            os.replace(temporary, path)
        return content

    def add_file(self, path: str, *, ours: bool = False) -> tuple[str, int]:
        """Keep the bytes of a regular file; give their digest and number.

        Parameters
        ----------
        ours
            Whether the file may be taken instead of copied.
        """
        # It may have become a link or a pipe since it was looked at.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(path, flags), "rb") as file:
            if ours:
                content = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
                if not os.path.exists(self.path(content)):
                    os.fchmod(file.fileno(), 0o600)
                    os.replace(path, self.path(content))
                return content, size
            head = file.read(_CHUNK_BYTES)
            if len(head) < _CHUNK_BYTES:
                return self.add_bytes(head), len(head)
            return self._add_stream(head, file)

    def _add_stream(self, head: bytes, rest: io.BufferedReader) -> tuple[str, int]:
        """Hash while copying: what is read twice may differ."""
        total, size = hashlib.sha256(), 0
        temporary = self._temporary_path()
        chunk = head
        with open(temporary, "xb") as file:
            while chunk:
                total.update(chunk)
                size += len(chunk)
                file.write(chunk)
                chunk = rest.read(_CHUNK_BYTES)
        content = total.hexdigest()
        os.replace(temporary, self.path(content))
        return content, size

    def _temporary_path(self) -> str:
        return f"{self._folder}/new-{next(self._temporary)}"

    def read(
        self,
        root: str,
        wanted: Filter = EVERYTHING,
        *,
        known: Known = NOTHING,
        known_since_ns: int = 0,
        ours: bool = False,
    ) -> tuple[Tree, Known]:
        """Take in a directory, or a single file.

        Parameters
        ----------
        known, known_since_ns
            What was there before, and when that was certain: files whose marks are
            the same since then are not read.
        ours
            Whether nobody else has the directory: files may be taken instead of
            copied, and what its owner has closed to himself is opened.

        Returns
        -------
        tuple
            The tree, and what to give as `known` the next time.

        Raises
        ------
        OSError
            When something cannot be read.
        """
        selection = Selection(wanted)
        seen: dict[str, tuple[Stamp, Entry]] = {}
        tree: dict[str, Entry] = {}
        taken: list[str] = []
        for path, status in _walk(root, selection, ours=ours):
            is_directory = stat.S_ISDIR(status.st_mode)
            if selection.takes(path, is_directory=is_directory):
                taken.append(path)
            elif not is_directory:
                continue
            marks = stamp(status)
            before = known.get(path)
            settled = status.st_ctime_ns + _SETTLED_NS < known_since_ns
            if before is not None and before[0] == marks and settled:
                entry = before[1]
            else:
                entry = self._entry(f"{root}/{path}" if path else root, status, ours=ours)
            tree[path] = entry
            if entry.is_file:
                seen[path] = (marks, entry)
        return tree if wanted.takes_all else select(tree, taken), seen

    def _entry(self, path: str, status: os.stat_result, *, ours: bool) -> Entry:
        content, size = "", 0
        if stat.S_ISREG(status.st_mode):
            if ours and not status.st_mode & stat.S_IRUSR:
                os.chmod(path, stat.S_IRUSR)
            content, size = self.add_file(path, ours=ours)
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            content = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        return Entry(status.st_mode, content, size, status.st_mtime_ns)

    def write(self, tree: Tree, target: str, *, mark: bool = False) -> Known:
        """Make a tree on the disk; what is already there is kept or replaced.

        Parameters
        ----------
        target
            Where the root goes; its parent must exist.
        mark
            Whether the marks of the new files are wanted.

        Returns
        -------
        Known
            Those of the new files, if wanted.

        Raises
        ------
        OSError
            When something cannot be made: a device by an ordinary user, a full disk.
        """
        marks: dict[str, tuple[Stamp, Entry]] = {}
        directories: list[tuple[str, Entry]] = []
        for path in sorted(tree):
            entry = tree[path]
            place = f"{target}/{path}" if path else target
            if entry.is_directory:
                # A directory that somebody else has made to export into stays as it is.
                if path or not os.path.isdir(target):
                    _make_directory(place)
                    directories.append((place, entry))
                continue
            _make_way(place)
            if entry.is_file:
                status = self._write_file(entry, place)
                if mark:
                    marks[path] = (stamp(status), entry)
                continue
            if entry.is_link:
                os.symlink(entry.content, place)
            elif stat.S_ISSOCK(entry.mode):
                continue  # Nobody listens at the end of a copied socket.
            else:
                device = os.makedev(*map(int, entry.content.split(":"))) if entry.content else 0
                os.mknod(place, entry.mode, device)
                os.chmod(place, stat.S_IMODE(entry.mode))
            os.utime(place, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)
        # Innermost first, and last of all: what is made in a directory changes its time,
        # and one without write permission takes nothing more.
        for place, entry in reversed(directories):
            os.chmod(place, stat.S_IMODE(entry.mode))
            os.utime(place, ns=(entry.mtime_ns, entry.mtime_ns))
        return marks

    def _write_file(self, entry: Entry, place: str) -> os.stat_result:
        target = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if entry.size:
                source = os.open(self.path(entry.content), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    _copy(source, target, entry.size)
                finally:
                    os.close(source)
            os.fchmod(target, stat.S_IMODE(entry.mode))
            os.utime(target, ns=(entry.mtime_ns, entry.mtime_ns))
            return os.fstat(target)
        finally:
            os.close(target)


def _copy(source: int, target: int, size: int) -> None:
    """Copy bytes; on file systems that can, only the way to them."""
    left = size
    with suppress(OSError):  # Between some file systems it cannot.
        while left and (done := os.copy_file_range(source, target, left)):
            left -= done
    if left:
        with open(source, "rb", closefd=False) as a, open(target, "wb", closefd=False) as b:
            shutil.copyfileobj(a, b, _CHUNK_BYTES)


def _walk(root: str, selection: Selection, *, ours: bool) -> Iterator[tuple[str, os.stat_result]]:
    """List a directory, parents before what is in them, links never followed."""
    status = os.lstat(root)
    yield "", status
    todo = [("", status)] if stat.S_ISDIR(status.st_mode) else []
    while todo:
        inner, status = todo.pop()
        place = f"{root}/{inner}" if inner else root
        if ours and status.st_mode & stat.S_IRWXU != stat.S_IRWXU:
            os.chmod(place, stat.S_IRWXU)
        names = sorted(os.listdir(place))
        if GITIGNORE in names and selection.reads_ignore_files:
            with suppress(OSError), open(f"{place}/{GITIGNORE}", errors="replace") as file:
                selection.add_ignore_file(inner, file.read())
        for name in names:
            path = f"{inner}/{name}" if inner else name
            try:
                status = os.lstat(f"{root}/{path}")
            except FileNotFoundError:
                continue  # On a living host things go away.
            if not stat.S_ISDIR(status.st_mode):
                yield path, status
            elif not selection.prunes(path):
                yield path, status
                todo.append((path, status))


def _make_directory(place: str) -> None:
    try:
        os.mkdir(place, 0o700)
    except FileExistsError:
        if stat.S_ISDIR(os.lstat(place).st_mode):
            os.chmod(place, 0o700)
            return
        os.unlink(place)
        os.mkdir(place, 0o700)


def _make_way(place: str) -> None:
    try:
        status = os.lstat(place)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(status.st_mode):
        remove(place)
    else:
        os.unlink(place)


def remove(root: str) -> None:
    """Remove a directory whatever its modes and its depth.

    Blocking; does nothing where nothing is. Commands leave directories without
    permissions, and nested deeper than a path can be long: each is moved up to the
    top before its turn comes.
    """
    if not os.path.lexists(root):
        return
    moved = count()
    todo = [root]
    emptied = []
    while todo:
        directory = todo.pop()
        os.chmod(directory, 0o700)
        emptied.append(directory)
        for entry in list(os.scandir(directory)):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
            elif directory == root:
                todo.append(entry.path)
            else:
                os.chmod(entry.path, 0o700)
                up = f"{root}/.removing-{next(moved)}"
                os.rename(entry.path, up)
                todo.append(up)
    for directory in reversed(emptied):
        os.rmdir(directory)
