"""Changes to a workspace that a crash cannot leave half done.

Everything arrives in a directory in the workspace and is looked at there. Then a
journal is written of all the steps that put it into place; from then on they are only
ever completed, by this run or by the next. Before that, nothing has happened.

Each step may be done twice. What it removes or replaces must be what was there when
the journal was written, so nothing that came later is lost, nor anything to a journal
that came with a checkout. Each is checked again: it stays in the workspace, out of
`.git`, and goes through no link.
"""

import errno
import fcntl
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from moonmind_ext.workspace.delta import parents
from moonmind_ext.workspace.errors import WorkspaceError
from moonmind_ext.workspace.tree import ensure_mode, remove_tree
from pipelines.artifacts import has_setuid, in_git, refuse_link, refuse_type

OURS = ".moonmind-"
"""How names at the top of a workspace begin that are our own."""

PREFIX = f"{OURS}write-back-"
"""Of the directory in the workspace where changes arrive."""

JOURNAL = "journal"
CHANGES = "changes"

SYNC_EACH = 200
"""So many files are brought to the disk one by one, 0.3 to 2 ms each; for more of them
everything is, which other programs' files may make longer."""

CLEANUP_ATTEMPTS = 5

GIT_REFUSED = "is a git directory, which never comes back"
OURS_REFUSED = "is a name that runs themselves use"
LEADS_OUT = "leads out of the workspace"
NOT_SENT_IN_THE_WAY = "would replace something on this host that was not sent"
CHANGED_MEANWHILE = "was changed on this host meanwhile; it is kept"
NOT_EMPTY = "something is left in it; it is kept"

Identity: TypeAlias = tuple[int, int, int]
"""Type, size and time of a file. Not its inode, which not every file system keeps."""


class Operation(StrEnum):
    """What a step does.

    Attributes
    ----------
    OPEN
        Makes a directory of the workspace writable.
    UNLINK, RMDIR
        Remove; a directory only when it is empty.
    MKDIR
        Makes a directory, ours alone at first.
    MOVE
        Puts what has arrived into its place.
    MODE
        Gives a directory the mode that it shall have in the end.
    """

    OPEN = "open"
    UNLINK = "unlink"
    RMDIR = "rmdir"
    MKDIR = "mkdir"
    MOVE = "move"
    MODE = "mode"


class Step(NamedTuple):
    """One change of a workspace.

    Attributes
    ----------
    path
        Relative to the workspace.
    mode
        Of a directory.
    was
        What is removed or replaced; None for nothing.
    """

    operation: Operation
    path: str
    mode: int = 0
    was: Identity | None = None


@dataclass(slots=True)
class Staging:
    """A directory in a workspace where changes arrive, locked while we live.

    The lock is the kernel's, and gone with the process that holds it.

    Attributes
    ----------
    folder
        With `changes`, where they arrive; and other things of the one who made it.
    after_step
        Called after everything that changes the disk; for tests that end there.
    """

    workspace: Path
    folder: Path
    after_step: Callable[[], None]
    _lock: int
    _is_committed: bool = field(default=False, init=False)

    @classmethod
    def make(cls, workspace: Path, after_step: Callable[[], None] = lambda: None) -> "Staging":
        """Make one; blocking."""
        while True:
            # In the workspace itself, so that each file can be moved into its place.
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=workspace))
            after_step()
            # Another process may take it for one that was left, and remove it.
            with suppress(FileNotFoundError):
                lock = _lock(folder)
                if lock is not None:
                    after_step()
                    return cls(workspace, folder, after_step, lock)

    @property
    def changes(self) -> Path:
        """Where changes arrive."""
        return self.folder / CHANGES

    def commit(self, steps: Sequence[Step]) -> None:
        """Write the journal; blocking. From here on there is no way back."""
        self._sync_changes([step.path for step in steps if step.operation is Operation.MOVE])
        data = encode(steps)
        # Not in one piece, so that a test can end in the middle.
        for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
            view = memoryview(piece)
            while view:
                view = view[os.write(self._lock, view) :]
            self.after_step()
        self._is_committed = True
        os.fsync(self._lock)
        for directory in (self.folder, self.workspace):
            _sync(directory)

    def _sync_changes(self, paths: Sequence[str]) -> None:
        """Bring what has arrived to the disk: a journal of empty files is worth nothing."""
        if len(paths) > SYNC_EACH:
            os.sync()
            return
        folders = {parent for path in paths for parent in ("", *parents(path))}
        for path in (*paths, *folders):
            # A file that may not be read even by its owner has to do without.
            if not (self.changes / path).is_symlink():
                with suppress(PermissionError):
                    _sync(self.changes / path)

    def run(self, steps: Iterable[Step]) -> dict[int, str]:
        """Do the steps; say which were not done, and why; blocking."""
        problems: dict[int, str] = {}
        for number, step in enumerate(steps):
            try:
                problem = self._do(step)
            except OSError as error:
                problem = f"failed on this host: {error.strerror or error}"
            if problem is not None:
                problems[number] = problem
            self.after_step()
        # From here on it says nothing of what may be done in the workspace by then.
        os.ftruncate(self._lock, 0)
        self._is_committed = False
        self.after_step()
        return problems

    def read(self) -> list[Step] | None:
        """Read the journal; None when it is not complete."""
        with open(self._lock, "rb", closefd=False) as journal:
            journal.seek(0)
            digest, _, text = journal.read().partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            return None
        try:
            return [_parse_step(*fields) for fields in json.loads(text)]
        except (TypeError, ValueError):
            return None

    def close(self) -> None:
        """Remove the directory, unless the journal is still to be completed; blocking."""
        try:
            if not self._is_committed:
                self._remove()
        finally:
            os.close(self._lock)

    def _remove(self) -> None:
        """Remove it, also while an export that was given up goes on for a moment."""
        for _ in range(CLEANUP_ATTEMPTS):
            try:
                for inner in self.folder.iterdir():
                    if inner.is_dir() and not inner.is_symlink():
                        remove_tree(inner)
                    elif inner.name != JOURNAL:
                        inner.unlink()
                    self.after_step()
                # Last: it holds the lock.
                (self.folder / JOURNAL).unlink(missing_ok=True)
                self.after_step()
                self.folder.rmdir()
            except OSError:
                time.sleep(0.2)
            else:
                self.after_step()
                return

    def _do(self, step: Step) -> str | None:
        """Do one step, which may be done already; say why not."""
        reason = refuse_path(step.path) or refuse_parents(self.workspace, step.path)
        if reason is not None:
            return reason
        do: dict[Operation, Callable[[Step, Path], str | None]] = {
            Operation.OPEN: _open,
            Operation.UNLINK: _unlink,
            Operation.RMDIR: _rmdir,
            Operation.MKDIR: _mkdir,
            Operation.MOVE: self._move,
            Operation.MODE: _set_mode,
        }
        return do[step.operation](step, self.workspace / step.path)

    def _move(self, step: Step, target: Path) -> str | None:
        source = self.changes / step.path
        if refuse_parents(self.folder, f"{CHANGES}/{step.path}") or not os.path.lexists(source):
            # In its place already.
            return None
        mode = source.lstat().st_mode
        link = os.readlink(source) if stat.S_ISLNK(mode) else None  # noqa: PTH115
        reason = refuse_move(step.path, mode, link)
        if reason is not None:
            return reason
        was = identify(target)
        if was != step.was:
            return NOT_SENT_IN_THE_WAY if step.was is None else CHANGED_MEANWHILE
        if has_setuid(mode):
            source.chmod(stat.S_IMODE(mode) & ~(stat.S_ISUID | stat.S_ISGID))
        source.replace(target)
        return None


def encode(steps: Iterable[Step]) -> bytes:
    """Write steps as a journal has them: a digest says whether it is complete."""
    text = json.dumps([[*step] for step in steps]).encode()
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def _open(_: Step, target: Path) -> None:
    if is_directory(target):
        ensure_mode(target, stat.S_IRWXU)


def _unlink(step: Step, target: Path) -> str | None:
    was = identify(target)
    if was is None or stat.S_ISDIR(was[0]):
        # Done already, and a directory has come instead.
        return None
    if was != step.was:
        return CHANGED_MEANWHILE
    target.unlink()
    return None


def _rmdir(_: Step, target: Path) -> str | None:
    try:
        if is_directory(target):
            target.rmdir()
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        return NOT_EMPTY
    return None


def _mkdir(_: Step, target: Path) -> str | None:
    if os.path.lexists(target):
        return None if is_directory(target) else NOT_SENT_IN_THE_WAY
    target.mkdir(mode=stat.S_IRWXU)
    return None


def _set_mode(step: Step, target: Path) -> None:
    if is_directory(target):
        target.chmod(stat.S_IMODE(step.mode))


def recover(workspace: Path, after_step: Callable[[], None] = lambda: None) -> bool:
    """Put in order what a run that was killed has left in a workspace; blocking.

    What another process is just doing there is left alone.

    Returns
    -------
    bool
        Whether changes were brought to their end.

    Raises
    ------
    WorkspaceError
        When it cannot be put in order.
    """
    recovered = False
    for folder in left_in(workspace):
        try:
            lock = _lock(folder)
        except FileNotFoundError:
            # Removed by who had it.
            continue
        except OSError as error:
            raise _not_in_order(folder, error) from error
        if lock is None:
            continue
        staging = Staging(workspace, folder, after_step, lock)
        try:
            steps = staging.read()
            if steps is not None:
                staging.run(steps)
                recovered = True
        except OSError as error:
            raise _not_in_order(folder, error) from error
        finally:
            staging.close()
    return recovered


def left_in(workspace: Path) -> Iterator[Path]:
    """List the directories where changes arrive, ours and others'."""
    try:
        paths = sorted(workspace.iterdir())
    except OSError:
        # That it cannot be read is said where it is sent.
        return
    for path in paths:
        if path.name.startswith(PREFIX) and is_directory(path):
            yield path


def refuse_path(path: str) -> str | None:
    """Say why a path may not be changed, whatever is there; None where it may."""
    parts = path.split("/")
    if "\0" in path or not {"", ".", ".."}.isdisjoint(parts):
        return LEADS_OUT
    if in_git(path):
        return GIT_REFUSED
    return OURS_REFUSED if path.startswith(OURS) else None


def refuse_parents(workspace: Path, path: str) -> str | None:
    """Say why a path may lead out of the workspace; None where it does not."""
    for parent in parents(path):
        target = workspace / parent
        if target.is_symlink():
            return "its directory is a symbolic link"
        if os.path.lexists(target) and not target.is_dir():
            return "its directory is no directory on this host"
    return None


def refuse_move(path: str, mode: int, link: str | None) -> str | None:
    """Say why something that arrived may not be moved into its place; None where it may."""
    if stat.S_ISDIR(mode):
        return "is a directory"
    return refuse_type(mode) or (refuse_link(path, link) if link is not None else None)


def identify(path: Path) -> Identity | None:
    """Say what is at a path; None for nothing."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.S_IFMT(status.st_mode), status.st_size, status.st_mtime_ns


def is_directory(path: Path) -> bool:
    """Whether a path is one itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()


def _lock(folder: Path) -> int | None:
    """Open the journal of a directory and lock it; None when somebody has it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    lock = os.open(folder / JOURNAL, flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    # Removed by who had it, between our two steps.
    if not os.fstat(lock).st_nlink:
        os.close(lock)
        return None
    return lock


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse_step(operation: Any, path: Any, mode: Any, was: Any) -> Step:
    if not (isinstance(path, str) and isinstance(mode, int)):
        raise TypeError
    if was is not None:
        file_type, size, mtime_ns = was
        was = (file_type, size, mtime_ns)
    return Step(Operation(operation), path, mode, was)


def _not_in_order(folder: Path, error: OSError) -> WorkspaceError:
    return WorkspaceError(
        f"{folder}: was left by a run that was killed while it wrote back, and cannot be put in "
        f"order: {error.strerror}"
    )
