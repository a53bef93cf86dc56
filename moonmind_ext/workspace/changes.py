"""What a command changed becomes steps: compared with what was sent, and decided on.

What has arrived holds more than what changed: files that were only touched, the
directories that something was removed from. And while the command ran, somebody may
have worked in the workspace. Nothing of the host is removed or overwritten that was
not sent.
"""

import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from moonmind_ext.workspace.delta import parents
from moonmind_ext.workspace.journal import (
    NOT_EMPTY,
    NOT_SENT_IN_THE_WAY,
    Operation,
    Staging,
    Step,
    identify,
    is_directory,
    refuse_move,
    refuse_parents,
    refuse_path,
)
from moonmind_ext.workspace.manifest import CHUNK_BYTES, Stamp, Stamps
from moonmind_ext.workspace.names import Names
from moonmind_ext.workspace.tree import walk
from pipelines.artifacts import SETUID_CLEARED, has_setuid, in_git, readable
from pipelines.report import WrittenBack

GIT_KEPT = "is a git directory, which is kept"
NOT_SENT_KEPT = "was not sent, so it is kept"
NOT_KNOWN = "what was removed in it is not known; it is kept"

PERMISSIONS = 0o1777
"""Of a directory. That new files are of its group (setgid) is the host's business."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """What was sent, and what the command has left of it.

    Attributes
    ----------
    stamps
        Of everything that was on this host when it was sent.
    was_sent
        Whether a path was sent as a directory, or as something else. Not by what the
        container says, which the command may have told it.
    before, after
        The names in the container before the command and after it.
    """

    stamps: Stamps
    was_sent: Callable[[str, bool], bool]
    before: Names
    after: Names

    def removed(self) -> dict[str, bool]:
        """Give the paths that are gone or changed their type: by path, whether directories."""
        return {
            path: was_directory
            for path, was_directory in self.before.directories.items()
            if self.after.directories.get(path) != was_directory and not self._is_closed(path)
        }

    def not_known(self) -> Iterator[str]:
        """Name the directories of which is not known what was removed in them."""
        for path in sorted(self.before.closed | self.after.closed):
            inside = f"{path}/" if path else ""
            if not path or any(name.startswith(inside) for name in self.before.directories):
                yield f"{path}/" if path else "./"

    def _is_closed(self, path: str) -> bool:
        closed = self.after.closed
        return bool(closed) and not closed.isdisjoint(("", *parents(path)))


Arrived: TypeAlias = Mapping[str, int]
"""What has arrived, by path the mode; directories before what is in them."""


def list_arrived(changes: Path) -> Arrived:
    """List what has arrived; blocking."""
    return {path: status.st_mode for path, status in walk(changes)} if changes.is_dir() else {}


def doubtful(arrived: Arrived, workspace: Path, sides: Sides) -> list[str]:
    """Name the files that somebody has changed on this host since they were sent; blocking.

    So it does not tell whether the command has changed what is in them too.
    """
    return [
        path
        for path, mode in arrived.items()
        if stat.S_ISREG(mode)
        and sides.was_sent(path, False)
        and sides.stamps[path].mode == mode
        and sides.stamps.get(path) != _stamp(workspace / path)
    ]


def apply_changes(
    staging: Staging, arrived: Arrived, sides: Sides, *, unchanged: Collection[str] = ()
) -> WrittenBack:
    """Bring changes into a workspace, all that are not refused; blocking.

    Parameters
    ----------
    staging
        Holds what has arrived, and perhaps some that did not change.
    unchanged
        Paths that have arrived all the same, where this host does not tell.
    """
    plan = _Plan(staging, sides)
    plan.remove()
    plan.bring(arrived, unchanged)
    steps = plan.steps()
    if steps:
        staging.commit(steps)
        problems = staging.run(steps)
        plan.note([(steps[number], problem) for number, problem in problems.items()])
    return plan.done


class _Plan:
    """The steps, found by looking at the workspace as it will be by then.

    Attributes
    ----------
    done
        What is refused, and what will have been done when all steps are.
    gone, made
        Paths that will be removed, and whether they are directories; and directories
        that will be made.
    opened, modes
        Directories that must be writable meanwhile, and that get another mode in the
        end; what that shall be.
    """

    def __init__(self, staging: Staging, sides: Sides) -> None:
        self.workspace = staging.workspace
        self.changes = staging.changes
        self.sides = sides
        self.done = WrittenBack()
        self.removals: list[Step] = []
        self.arrivals: list[Step] = []
        self.gone: dict[str, bool] = {}
        self.made: set[str] = set()
        self.opened: dict[str, int] = {}
        self.modes: dict[str, int] = {}

    def steps(self) -> list[Step]:
        """Give them in their order; of directories the outer first, at the end the inner."""
        modes = {**self.opened, **self.modes}
        return [
            *(Step(Operation.OPEN, path) for path in sorted(self.opened)),
            # First what goes: a directory may have become a file.
            *self.removals,
            *self.arrivals,
            *(Step(Operation.MODE, path, modes[path]) for path in sorted(modes, reverse=True)),
        ]

    def note(self, problems: Collection[tuple[Step, str]]) -> None:
        """Take what could not be done from what will have been."""
        paths = {step.path for step, _ in problems}
        for step, problem in problems:
            # What is left in it has a reason of its own.
            if problem != NOT_EMPTY or not any(p.startswith(f"{step.path}/") for p in paths):
                is_file = step.operation in {Operation.UNLINK, Operation.MOVE}
                self._refuse(_shown(step.path, is_directory=not is_file), problem)
        lost = {
            readable(step.path)
            for step, _ in problems
            if step.operation in {Operation.MKDIR, Operation.MOVE}
        }
        for names in (self.done.added, self.done.modified):
            names[:] = [name for name in names if name.rstrip("/") not in lost]
        for step, _ in problems:
            if step.operation in {Operation.UNLINK, Operation.RMDIR}:
                self.gone.pop(step.path, None)
        self._name_removed()

    def remove(self) -> None:
        """Remove what was sent; name what is kept because it was not."""
        listed = self.sides.removed()
        # What is in a directory comes before it.
        for path in sorted(listed, reverse=True):
            with self._failures(path):
                self._remove_one(path, was_directory=listed[path])
        for path in sorted(listed):
            if listed.keys().isdisjoint(parents(path)):
                self._name_kept(path, listed)
        for path in self.sides.not_known():
            self._refuse(path, NOT_KNOWN)
        self._name_removed()

    def _remove_one(self, path: str, *, was_directory: bool) -> None:
        """Remove a path, unless there is something else in its place by now."""
        if in_git(path) or not self.sides.was_sent(path, was_directory):
            return
        reason = refuse_path(path) or refuse_parents(self.workspace, path)
        if reason is not None:
            self._refuse(path, reason)
            return
        target = self.workspace / path
        was = identify(target)
        if was is None or stat.S_ISDIR(was[0]) != was_directory:
            return
        if not was_directory:
            self.removals.append(Step(Operation.UNLINK, path, was=was))
        elif all(f"{path}/{inner.name}" in self.gone for inner in target.iterdir()):
            self.removals.append(Step(Operation.RMDIR, path))
        else:
            return
        self.gone[path] = was_directory
        self._open_parent(path)

    def _name_kept(self, top: str, listed: Mapping[str, bool]) -> None:
        """Name what is left of a removed path, each thing once."""
        todo = [top]
        while todo:
            path = todo.pop()
            target = self.workspace / path
            with self._failures(path):
                if (
                    path in self.gone
                    or refuse_parents(self.workspace, path)
                    or not os.path.lexists(target)
                ):
                    continue
                there = is_directory(target)
                if in_git(path):
                    if _git_top(path) != ".git":
                        self._refuse(_git_top(path), GIT_KEPT)
                elif listed.get(path) != there or not self.sides.was_sent(path, there):
                    self._refuse(_shown(path, is_directory=there), NOT_SENT_KEPT)
                elif there:
                    todo.extend(sorted(f"{path}/{inner.name}" for inner in target.iterdir()))

    def _name_removed(self) -> None:
        """Name what goes, and of a directory that goes only that."""
        self.done.removed[:] = [
            _shown(path, is_directory=self.gone[path])
            for path in sorted(self.gone)
            if self.gone.keys().isdisjoint(parents(path))
        ]

    def bring(self, arrived: Arrived, unchanged: Collection[str]) -> None:
        """Bring what is new or different into its place."""
        for path, mode in arrived.items():
            is_directory_ = stat.S_ISDIR(mode)
            with self._failures(_shown(path, is_directory=is_directory_)):
                if is_directory_:
                    self._bring_directory(path, arrived)
                elif path not in unchanged:
                    self._bring_file(path, arrived)

    def _bring_directory(self, path: str, arrived: Arrived) -> None:
        """Make a directory that is new, or give one that is there its mode."""
        shown = _shown(path, is_directory=True)
        was_sent = self.sides.was_sent(path, True)
        reason = refuse_path(path) or self._refuse_parents(path)
        there = None if reason else self._there(path)
        if reason is None and there is not None and not stat.S_ISDIR(there):
            reason = NOT_SENT_IN_THE_WAY
        if reason is not None:
            # That something was only removed from it is no reason to speak of it.
            if not was_sent:
                self._refuse(shown, reason)
        elif not was_sent:
            self.done.added.append(shown)
            if there is None:
                self._make_directory(path, arrived)
        elif there is not None:
            sent, mode = self.sides.stamps[path].mode, arrived[path]
            if (sent ^ mode) & PERMISSIONS:
                self.done.modified.append(shown)
                self.modes[path] = stat.S_IMODE(there) & ~PERMISSIONS | mode & PERMISSIONS

    def _bring_file(self, path: str, arrived: Arrived) -> None:
        """Move a file or link, if it is a change."""
        shown, mode = readable(path), arrived[path]
        source, target = self.changes / path, self.workspace / path
        was_sent = self.sides.was_sent(path, False)
        reason = refuse_path(path) or self._refuse_parents(path)
        there = None if reason else self._there(path)
        if was_sent and there is not None and _is_same(source, target):
            return
        link = os.readlink(source) if stat.S_ISLNK(mode) else None  # noqa: PTH115
        reason = reason or refuse_move(path, mode, link)
        if reason is None and there is not None and (not was_sent or stat.S_ISDIR(there)):
            reason = NOT_SENT_IN_THE_WAY
        if reason is not None:
            self._refuse(shown, reason)
            return
        if has_setuid(mode):
            self._refuse(shown, SETUID_CLEARED)
        (self.done.modified if was_sent else self.done.added).append(shown)
        self._make_parents(path, arrived)
        self._open_parent(path)
        was = None if there is None else identify(target)
        self.arrivals.append(Step(Operation.MOVE, path, was=was))

    def _make_parents(self, path: str, arrived: Arrived) -> None:
        """Make the directories that a path is in: they may have been removed on this host."""
        for parent in parents(path):
            if self._there(parent) is None:
                self._make_directory(parent, arrived)

    def _make_directory(self, path: str, arrived: Arrived) -> None:
        self._make_parents(path, arrived)
        self._open_parent(path)
        self.arrivals.append(Step(Operation.MKDIR, path))
        self.made.add(path)
        self.modes[path] = stat.S_IMODE(arrived[path])

    def _open_parent(self, path: str) -> None:
        """Have the directory that a path is in be writable while the steps are done."""
        parent = path.rpartition("/")[0]
        # Whether it can write to the workspace itself, a run asks at its start.
        if not parent or parent in self.made:
            return
        target = self.workspace / parent
        if not os.access(target, os.W_OK | os.X_OK):
            self.opened[parent] = stat.S_IMODE(target.lstat().st_mode)

    def _there(self, path: str) -> int | None:
        """Give the mode of what will be at a path before anything is moved there."""
        if path in self.made:
            return stat.S_IFDIR
        if any(parent in self.gone or parent in self.made for parent in (path, *parents(path))):
            return None
        try:
            return (self.workspace / path).lstat().st_mode
        except FileNotFoundError:
            return None

    def _refuse_parents(self, path: str) -> str | None:
        """Say why a path will lead out of the workspace by then."""
        existing = ""
        for parent in parents(path):
            if parent in self.gone or parent in self.made:
                break
            existing = f"{parent}/"
        return refuse_parents(self.workspace, f"{existing}.")

    def _refuse(self, path: str, reason: str) -> None:
        self.done.refused.setdefault(readable(path), reason)

    @contextmanager
    def _failures(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._refuse(path, f"failed on this host: {error.strerror or error}")


def nested_git(paths: Iterable[str]) -> list[str]:
    """Choose the `.git` below the top; that of the workspace changes always."""
    tops = (_git_top(path) for path in paths if in_git(path))
    return [top for top in tops if top != ".git"]


def is_same_content(one: Path, other: Path) -> bool:
    """Whether two paths are files with the same bytes; blocking."""
    try:
        status, other_status = one.lstat(), other.lstat()
        if not (stat.S_ISREG(status.st_mode) and stat.S_ISREG(other_status.st_mode)):
            return False
        if status.st_size != other_status.st_size:
            return False
        with one.open("rb") as left, other.open("rb") as right:
            while chunk := left.read(CHUNK_BYTES):
                if chunk != right.read(CHUNK_BYTES):
                    return False
    except OSError:
        # It may not be read, or is gone.
        return False
    return True


def _is_same(one: Path, other: Path) -> bool:
    """Whether two files or links are the same in type, mode and content."""
    mode = one.lstat().st_mode
    if mode != other.lstat().st_mode:
        return False
    if stat.S_ISLNK(mode):
        return os.readlink(one) == os.readlink(other)  # noqa: PTH115
    return is_same_content(one, other)


def _stamp(path: Path) -> Stamp | None:
    try:
        return Stamp.of(path.lstat())
    except OSError:
        return None


def _shown(path: str, *, is_directory: bool) -> str:
    return readable(f"{path}/" if is_directory else path)


def _git_top(path: str) -> str:
    parts = path.rstrip("/").split("/")
    return "/".join(parts[: parts.index(".git") + 1])
