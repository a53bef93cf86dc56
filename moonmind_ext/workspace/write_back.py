"""What a command changed in its workspace comes back: looked at, then moved.

All of it, or all but what is refused, each named. `.git` never comes back, and
nothing of the host is removed or overwritten that was not sent.

It costs what changed: the engine's difference of two directories is the layer that
the command wrote, and what is not in there is found in two lists of names. The files
of the whole tree are compared nowhere.
"""

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from moonmind_ext.workspace.changes import (
    Arrived,
    Sides,
    apply_changes,
    doubtful,
    is_same_content,
    list_arrived,
    nested_git,
)
from moonmind_ext.workspace.journal import GIT_REFUSED, Staging
from moonmind_ext.workspace.manifest import Stamps
from moonmind_ext.workspace.names import Names, read_names
from moonmind_ext.workspace.tree import walk
from pipelines.artifacts import readable
from pipelines.concurrency import together
from pipelines.report import WrittenBack

if TYPE_CHECKING:
    import dagger

COMMITS = (".git/HEAD", ".git/packed-refs", ".git/refs", ".git/logs")
"""What commits and branches change; `git status` changes the index only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A workspace in the engine that a command has changed.

    Attributes
    ----------
    before, after
        As it was sent, and as the command left it.
    names
        The lists of the container before and after the command; hostile.
    stamps
        Of everything that was on this host when it was sent.
    is_whole
        Whether just that was sent, rather than what a filter chose of it.
    list_sent
        Lists `before` once more, out of the command's reach, for where a filter chose.
    bring
        Exports a directory to where nothing is.
    """

    before: "dagger.Directory"
    after: "dagger.Directory"
    names: "dagger.Directory"
    stamps: Stamps
    is_whole: bool
    list_sent: "Callable[[], Awaitable[dagger.Directory]]"
    bring: "Callable[[dagger.Directory, Path], Awaitable[None]]"


async def write_back(changed: Changed, workspace: Path) -> tuple[WrittenBack, bool]:
    """Bring the changes of a workspace back into it.

    Parameters
    ----------
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
    # In no thread, whose result would be lost if this was cancelled meanwhile.
    staging = Staging.make(workspace)
    try:
        layer = changed.before.diff(changed.after)
        names, marks = staging.folder / "names", staging.folder / "git"
        git, *_ = await together(
            layer.glob("**/.git"),
            changed.bring(layer.filter(exclude=["**/.git"]), staging.changes),
            layer.filter(include=list(COMMITS)).export(os.fspath(marks)),
            changed.names.export(os.fspath(names)),
        )
        before, after, arrived = await anyio.to_thread.run_sync(_look, staging, names)
        sides = await _sides(changed, (before, after), names, has_arrived=bool(arrived))
        doubts = await anyio.to_thread.run_sync(doubtful, arrived, workspace, sides)
        unchanged = {path for path in doubts if await _is_unchanged(changed, path)}

        def apply() -> WrittenBack:
            return apply_changes(staging, arrived, sides, unchanged=unchanged)

        done = await anyio.to_thread.run_sync(apply)
        for path in nested_git(git):
            done.refused.setdefault(readable(path), GIT_REFUSED)
        return done, await anyio.to_thread.run_sync(_has_commits, marks, workspace)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(staging.close)


def _look(staging: Staging, names: Path) -> tuple[Names, Names, Arrived]:
    return (
        read_names(names / "before"),
        read_names(names / "after"),
        list_arrived(staging.changes),
    )


async def _sides(
    changed: Changed, names: tuple[Names, Names], folder: Path, *, has_arrived: bool
) -> Sides:
    """Say what was sent; where a filter chose, only if it matters."""

    def was_stamped(path: str, is_directory: bool) -> bool:
        stamp = changed.stamps.get(path)
        return stamp is not None and not stamp.is_special and stamp.is_directory == is_directory

    before, after = names
    sides = Sides(stamps=changed.stamps, was_sent=was_stamped, before=before, after=after)
    if changed.is_whole or not (has_arrived or sides.removed()):
        return sides
    listing = await changed.list_sent()
    await listing.export(os.fspath(folder / "sent"))
    sent = await anyio.to_thread.run_sync(read_names, folder / "sent" / "names")

    def was_listed(path: str, is_directory: bool) -> bool:
        return was_stamped(path, is_directory) and sent.directories.get(path) == is_directory

    return Sides(stamps=changed.stamps, was_sent=was_listed, before=before, after=after)


async def _is_unchanged(changed: Changed, path: str) -> bool:
    """Ask the engine whether a file is as it was sent: on this host it is not."""
    if readable(path) != path:
        # An engine cannot be asked for it.
        return False
    before, after = await together(
        changed.before.file(path).digest(exclude_metadata=True),
        changed.after.file(path).digest(exclude_metadata=True),
    )
    return bool(before == after)


def _has_commits(marks: Path, workspace: Path) -> bool:
    """Whether something of git's has arrived that is not the same on this host; blocking."""
    return any(
        (marks / path).is_file() and not is_same_content(marks / path, workspace / path)
        for path, _ in (walk(marks) if marks.is_dir() else ())
    )
