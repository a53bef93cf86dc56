"""A directory of this host becomes a directory of the engine.

It is sent as a whole. The engine keeps what it has of the same path, so sending
it again costs what changed and a look at every file.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from pipelines.payload import WorkspaceFilter

if TYPE_CHECKING:
    import dagger


class WorkspaceError(Exception):
    """The workspace cannot be read; the message names the path."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much a workspace is: files that are not directories, and their bytes."""

    files: int
    bytes: int


def measure(root: Path) -> Size:
    """Count a workspace; blocking.

    Raises
    ------
    WorkspaceError
        When something in it cannot be read: better now than half sent.
    """
    files = size = 0
    todo = [os.fspath(root)]
    while todo:
        directory = todo.pop()
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        todo.append(entry.path)
                        continue
                    if stat.S_ISREG(status.st_mode) and not os.access(entry.path, os.R_OK):
                        raise WorkspaceError(f"{entry.path}: cannot be read (permission denied)")
                    files += 1
                    size += status.st_size
        except OSError as error:
            raise WorkspaceError(f"{error.filename}: {error.strerror}") from error
    return Size(files, size)


async def send_workspace(
    client: "dagger.Client", root: Path, chosen: WorkspaceFilter
) -> "tuple[dagger.Directory, Size | None]":
    """Send a workspace.

    Parameters
    ----------
    root
        Absolute.
    chosen
        What of it goes into the container, in Dagger's patterns.

    Returns
    -------
    tuple
        The directory, sent, and its size; None where a filter chose.

    Raises
    ------
    WorkspaceError
        When something in it cannot be read.
    dagger.DaggerError
        When the engine fails.
    """
    filtered = bool(chosen.include or chosen.exclude or chosen.gitignore)
    size = None if filtered else await anyio.to_thread.run_sync(measure, root)
    # Without `no_cache` a second look at the same path in one session gives what
    # the first one saw.
    directory = client.host().directory(
        os.fspath(root),
        include=list(chosen.include),
        exclude=list(chosen.exclude),
        gitignore=chosen.gitignore,
        no_cache=True,
    )
    return await directory.sync(), size
