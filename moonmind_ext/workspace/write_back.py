"""What a command changed in its workspace comes back: looked at, then moved.

All of it, or all but what is refused, each named. `.git` never comes back.
"""

import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipelines.artifacts import (
    SETUID_CLEARED,
    has_setuid,
    in_git,
    readable,
    refuse_link,
    refuse_type,
)
from pipelines.report import WrittenBack


@dataclass(frozen=True, slots=True)
class Changes:
    """Paths relative to the workspace, as the engine lists them.

    Those of directories end with a slash; what is below a removed directory is not
    listed.
    """

    added: tuple[str, ...]
    modified: tuple[str, ...]
    removed: tuple[str, ...]

    def commits(self) -> bool:
        """Whether commits or branches are among the changes, which do not come back."""
        marks = (".git/HEAD", ".git/packed-refs", ".git/refs/", ".git/logs/")
        return any(path.startswith(marks) for path in (*self.added, *self.modified))

    def without_git(self) -> "Changes":
        """Give what may come back at all."""

        def keep(paths: Iterable[str]) -> tuple[str, ...]:
            return tuple(path for path in paths if not in_git(path))

        return Changes(keep(self.added), keep(self.modified), keep(self.removed))


def apply_changes(staging: Path, workspace: Path, changes: Changes) -> WrittenBack:
    """Move changes into a workspace; blocking.

    Parameters
    ----------
    staging
        Holds every added and modified path and nothing else that matters; on the
        workspace's own file system.
    workspace
        As it was sent.
    changes
        What to apply; nothing in a `.git`.
    """
    done = WrittenBack()
    # First what goes: a directory may have become a file.
    for path in changes.removed:
        target = workspace / path.rstrip("/")
        if reason := _refuse_parents(workspace, path):
            done.refused[readable(path)] = reason
        elif target.is_dir() and not target.is_symlink():
            if _remove_tree(target):
                done.removed.append(readable(path))
            else:
                done.refused[readable(path)] = "holds a .git, which is kept"
        elif os.path.lexists(target):
            target.unlink()
            done.removed.append(readable(path))
    # Directories come before what is in them.
    for paths, listed in ((changes.added, done.added), (changes.modified, done.modified)):
        for path in sorted(paths):
            if reason := _move(staging, workspace, path.rstrip("/")):
                done.refused[readable(path)] = reason
                if reason != SETUID_CLEARED:
                    continue
            listed.append(readable(path))
    return done


def _move(staging: Path, workspace: Path, path: str) -> str | None:
    """Move one path; say what was refused of it."""
    source, target = staging / path, workspace / path
    mode = source.lstat().st_mode
    reason = refuse_type(mode) or _refuse_parents(workspace, path)
    if reason is None and stat.S_ISLNK(mode):
        reason = refuse_link(path, str(source.readlink()))
    if reason is not None:
        return reason
    if stat.S_ISDIR(mode):
        if not target.is_dir() or target.is_symlink():
            target.unlink(missing_ok=True)
            target.mkdir(parents=True)
        target.chmod(stat.S_IMODE(mode))
        return None
    if has_setuid(mode):
        source.chmod(stat.S_IMODE(mode) & ~(stat.S_ISUID | stat.S_ISGID))
        reason = SETUID_CLEARED
    if target.is_dir() and not target.is_symlink() and not _remove_tree(target):
        return "would replace a directory that holds a .git"
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
    return reason


def _refuse_parents(workspace: Path, path: str) -> str | None:
    """Say why a path may lead out of the workspace; None where it does not."""
    parts = path.rstrip("/").split("/")
    if path.startswith("/") or ".." in parts:
        return "leads out of the workspace"
    for depth in range(1, len(parts)):
        if (workspace / "/".join(parts[:depth])).is_symlink():
            return "its directory is a symbolic link"
    return None


def _remove_tree(directory: Path) -> bool:
    """Remove a directory, unless there is a `.git` somewhere in it."""
    if any(".git" in (*names, *files) for _, names, files in os.walk(directory)):
        return False
    shutil.rmtree(directory)
    return True
