"""What a command changed in its workspace comes back: looked at, then moved.

All of it, or all but what is refused, each named. `.git` never comes back, and
nothing of the host is removed or overwritten that was not sent.
"""

import errno
import os
import stat
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from moonmind_ext.workspace.tree import remove_tree, walk
from pipelines.artifacts import (
    SETUID_CLEARED,
    has_setuid,
    in_git,
    readable,
    refuse_link,
    refuse_type,
)
from pipelines.concurrency import together
from pipelines.report import WrittenBack

if TYPE_CHECKING:
    import dagger

STAGING_PREFIX = ".moonmind-"
"""Of the directory in the workspace where changes arrive."""

CLEANUP_ATTEMPTS = 5

GIT_REFUSED = "is a git directory, which never comes back"
GIT_KEPT = "is a git directory, which is kept"
NOT_SENT_KEPT = "was not sent, so it is kept"
NOT_SENT_IN_THE_WAY = "would replace something on this host that was not sent"
NO_TEXT = "its name is no UTF-8, so which file was removed is not known; it is kept"
NOT_EXPORTED = "did not come out of the engine"

_REPLACEMENT = "\ufffd"
"""What a real engine lists in the place of bytes that are no UTF-8."""


async def write_back(
    after: "dagger.Directory", before: "dagger.Directory", workspace: Path
) -> tuple[WrittenBack, bool]:
    """Bring the changes of a workspace back into it.

    Parameters
    ----------
    after
        As the command left it.
    before
        As it was sent.
    workspace
        Where it came from.

    Returns
    -------
    tuple
        What was applied and what was refused, and whether there were commits or
        branches among the changes, which are lost.

    Raises
    ------
    dagger.DaggerError
        When the engine fails; then nothing was changed.
    OSError
        When there is no room for the changes.
    """
    changeset = after.changes(before)
    # In the workspace itself, so that each file can be moved into its place.
    folder = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=workspace))
    try:
        staging = folder / "changes"
        added, modified, removed, _ = await together(
            changeset.added_paths(),
            changeset.modified_paths(),
            changeset.removed_paths(),
            changeset.layer().filter(exclude=["**/.git"]).export(os.fspath(staging)),
        )
        # Once for all of them: half a second for 20,000 files, and a directory with a
        # name that is no UTF-8 could not be asked for.
        sent = await before.glob("**") if any(path.endswith("/") for path in removed) else removed
        changes = Changes(tuple(added), tuple(modified), tuple(removed), frozenset(sent))
        done = await anyio.to_thread.run_sync(apply_changes, staging, workspace, changes)
        return done, changes.commits()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(_remove_staging, folder)


def _remove_staging(folder: Path) -> None:
    """Remove it, also while an export that was given up goes on for a moment."""
    for _ in range(CLEANUP_ATTEMPTS):
        try:
            remove_tree(folder)
        except OSError:
            time.sleep(0.2)
        else:
            return


@dataclass(frozen=True, slots=True)
class Changes:
    """Paths relative to the workspace, as the engine lists them.

    Those of directories end with a slash; what is below a removed directory is not
    listed.

    Attributes
    ----------
    sent
        All that was sent, or as much of it as is below the removed directories.
    """

    added: tuple[str, ...]
    modified: tuple[str, ...]
    removed: tuple[str, ...]
    sent: Collection[str] = ()

    def commits(self) -> bool:
        """Whether commits or branches are among the changes, which do not come back."""
        marks = (".git/HEAD", ".git/packed-refs", ".git/refs/", ".git/logs/")
        return any(path.startswith(marks) for path in (*self.added, *self.modified))


def apply_changes(staging: Path, workspace: Path, changes: Changes) -> WrittenBack:
    """Move changes into a workspace; blocking.

    Parameters
    ----------
    staging
        Holds every added and modified path; on the workspace's own file system.
    workspace
        As it was sent; what else happened to it meanwhile is kept.
    changes
        What to apply.
    """
    applying = _Applying(staging, workspace)
    # First what goes: a directory may have become a file.
    applying.remove(changes.removed, changes.sent)
    applying.bring(changes.added, changes.modified)
    applying.set_modes()
    return applying.done


class _Applying:
    """Changes while they are applied.

    Attributes
    ----------
    done
        What came of them; a path that fails is refused and ends nothing.
    modes
        Of directories, to be set when nothing is moved into or out of them any more.
    """

    def __init__(self, staging: Path, workspace: Path) -> None:
        self.staging = staging
        self.workspace = workspace
        self.done = WrittenBack()
        self.modes: dict[str, int] = {}

    def remove(self, removed: Collection[str], sent: Collection[str]) -> None:
        """Remove what was sent; name what is kept because it was not."""
        for path in filter(_in_nested_git, removed):
            self._refuse(_git_top(path), GIT_KEPT)
        listed = {path for path in removed if not in_git(path)}
        below = {path for path in sent if not listed.isdisjoint(_parents(path))}
        gone = set[str]()
        # What is in a directory comes before it.
        for path in sorted(listed | below, reverse=True):
            if in_git(path) or _REPLACEMENT in path:
                continue
            with self._failures(path):
                if _refuse_parents(self.workspace, path) is None and self._remove_one(path):
                    gone.add(path)
        # One name for all of a directory that is gone.
        topmost = {path for path in gone if gone.isdisjoint(_parents(path))}
        self.done.removed.extend(readable(path) for path in sorted(topmost))
        known = {readable(path) for path in listed | below}
        for path in sorted(listed):
            if reason := _refuse_parents(self.workspace, path):
                self._refuse(path, reason)
            elif _REPLACEMENT in path:
                self._refuse(path, NO_TEXT)
            else:
                self._name_kept(path.rstrip("/"), known)

    def _remove_one(self, path: str) -> bool:
        """Remove a path, unless there is something else in its place by now."""
        target = self.workspace / path.rstrip("/")
        if not os.path.lexists(target):
            return False
        is_directory = _is_directory(target)
        if is_directory != path.endswith("/"):
            return False
        self._open(path.rstrip("/").rpartition("/")[0])
        if not is_directory:
            target.unlink()
            return True
        try:
            target.rmdir()
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            return False
        return True

    def _name_kept(self, top: str, known: Collection[str]) -> None:
        """Name what is left of a removed path, each thing once."""
        todo = [top]
        while todo:
            path = todo.pop()
            target = self.workspace / path
            with self._failures(path):
                if not os.path.lexists(target):
                    continue
                is_directory = _is_directory(target)
                shown = readable(f"{path}/" if is_directory else path)
                if in_git(path):
                    self._refuse(path, GIT_KEPT)
                elif shown not in known:
                    self._refuse(shown, NOT_SENT_KEPT)
                elif is_directory:
                    names = sorted(entry.name for entry in target.iterdir())
                    todo.extend(f"{path}/{name}" for name in names)
                elif _REPLACEMENT in shown:
                    self._refuse(shown, NO_TEXT)

    def bring(self, added: Iterable[str], modified: Iterable[str]) -> None:
        """Move what is new or different into its place."""
        listed = self._listed(added, modified)
        # By what has arrived, since only files have all the bytes of their names.
        for path, status in walk(self.staging):
            is_directory = stat.S_ISDIR(status.st_mode)
            shown = readable(f"{path}/" if is_directory else path)
            names = listed.get(shown)
            if names is None:
                continue
            with self._failures(shown):
                is_new = names is self.done.added
                reason = self._bring_one(path, status.st_mode, is_new=is_new)
                if reason is not None:
                    self._refuse(shown, reason)
                if reason in {None, SETUID_CLEARED}:
                    names.append(shown)
        came = {*self.done.added, *self.done.modified, *self.done.refused}
        for path in listed:
            if path not in came:
                self._refuse(path, NOT_EXPORTED)

    def _listed(self, added: Iterable[str], modified: Iterable[str]) -> dict[str, list[str]]:
        """Say for each path that may come back in which list it belongs."""
        listed: dict[str, list[str]] = {}
        for paths, names in ((modified, self.done.modified), (added, self.done.added)):
            for path in paths:
                if not in_git(path):
                    listed[readable(path)] = names
                elif _in_nested_git(path):
                    self._refuse(_git_top(path), GIT_REFUSED)
        return listed

    def _bring_one(self, path: str, mode: int, *, is_new: bool) -> str | None:
        """Move one path; say what was refused of it."""
        source, target = self.staging / path, self.workspace / path
        reason = refuse_type(mode) or _refuse_parents(self.workspace, path)
        if reason is None and stat.S_ISLNK(mode):
            reason = refuse_link(path, str(source.readlink()))
        if reason is not None:
            return reason
        there = os.path.lexists(target)
        if stat.S_ISDIR(mode):
            if not there:
                self._make_directory(path, stat.S_IMODE(mode))
            return None if _is_directory(target) else NOT_SENT_IN_THE_WAY
        if there and (is_new or _is_directory(target)):
            return NOT_SENT_IN_THE_WAY
        if has_setuid(mode):
            source.chmod(stat.S_IMODE(mode) & ~(stat.S_ISUID | stat.S_ISGID))
            reason = SETUID_CLEARED
        target.parent.mkdir(parents=True, exist_ok=True)
        self._open(path.rpartition("/")[0])
        source.replace(target)
        return reason

    def _make_directory(self, path: str, mode: int) -> None:
        target = self.workspace / path
        target.parent.mkdir(parents=True, exist_ok=True)
        self._open(path.rpartition("/")[0])
        target.mkdir(mode=stat.S_IRWXU)
        self.modes[path] = mode

    def _open(self, directory: str) -> None:
        """Make a directory of the workspace writable until `set_modes`."""
        target = self.workspace / directory
        if not os.access(target, os.W_OK | os.X_OK):
            mode = stat.S_IMODE(target.stat().st_mode)
            target.chmod(mode | stat.S_IRWXU)
            self.modes.setdefault(directory, mode)

    def set_modes(self) -> None:
        """Give directories the modes that they shall have."""
        for path, mode in sorted(self.modes.items(), reverse=True):
            target = self.workspace / path
            with self._failures(f"{path}/"):
                if _is_directory(target):
                    target.chmod(mode)

    def _refuse(self, path: str, reason: str) -> None:
        self.done.refused.setdefault(readable(path), reason)

    @contextmanager
    def _failures(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._refuse(path, f"failed on this host: {error.strerror or error}")


def _refuse_parents(workspace: Path, path: str) -> str | None:
    """Say why a path may lead out of the workspace; None where it does not."""
    if path.startswith("/") or ".." in path.split("/"):
        return "leads out of the workspace"
    for parent in _parents(path):
        target = workspace / parent.rstrip("/")
        if target.is_symlink():
            return "its directory is a symbolic link"
        if os.path.lexists(target) and not target.is_dir():
            return "its directory is no directory on this host"
    return None


def _parents(path: str) -> Iterator[str]:
    """List the directories that a path is in, outermost first, as an engine lists them."""
    at = path.find("/")
    while 0 <= at < len(path) - 1:
        yield path[: at + 1]
        at = path.find("/", at + 1)


def _in_nested_git(path: str) -> bool:
    """Whether a path is in a `.git` below the top; that of the workspace changes always."""
    return in_git(path) and _git_top(path) != ".git"


def _git_top(path: str) -> str:
    parts = path.rstrip("/").split("/")
    return "/".join(parts[: parts.index(".git") + 1])


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
