"""A directory of this host becomes a directory of the engine.

It is sent as a whole. The engine keeps what it has of the same path, so sending
it again costs what changed and a look at every file.
"""

import os
import stat
from collections.abc import Collection, Sequence
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


def measure(root: Path, leave_out: Collection[str] = ()) -> Size:
    """Count a workspace; blocking.

    Parameters
    ----------
    leave_out
        Paths relative to `root` that do not count.

    Raises
    ------
    WorkspaceError
        When something in it cannot be read: better now than half sent.
    """
    files = size = 0
    todo = [os.fspath(root)]
    skipped = {os.fspath(root / path) for path in leave_out}
    while todo:
        directory = todo.pop()
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.path in skipped:
                        continue
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
    client: "dagger.Client", root: Path, chosen: WorkspaceFilter, *, leave_out: Sequence[Path] = ()
) -> "tuple[dagger.Directory, Size | None]":
    """Send a workspace.

    Something that cannot be read is found beforehand where no filter chooses. Where
    one does, only the engine knows what it takes: then it is found while sending, and
    what the filter leaves out does no harm.

    Parameters
    ----------
    root
        Absolute.
    chosen
        What of it goes into the container, in Dagger's patterns.
    leave_out
        Absolute paths that do not go along, whatever is chosen: our own, like the
        output directory. Those that are not below `root` do not matter.

    Returns
    -------
    tuple
        The directory, sent, and its size; None where a filter chose. How much of it
        travelled, and was not there before, the engine does not say.

    Raises
    ------
    WorkspaceError
        When something in it cannot be read.
    dagger.DaggerError
        When the engine fails.
    """
    import dagger

    left_out = _relative(root, leave_out)
    filtered = bool(chosen.include or chosen.exclude or chosen.gitignore)
    size = None if filtered else await anyio.to_thread.run_sync(measure, root, left_out)
    # Without `no_cache` a second look at the same path in one session gives what
    # the first one saw.
    directory = client.host().directory(
        os.fspath(root),
        include=list(chosen.include),
        # The last pattern that matches decides: `!` in a payload takes nothing of ours back.
        exclude=[*chosen.exclude, *map(escape_pattern, left_out)],
        gitignore=chosen.gitignore,
        no_cache=True,
    )
    try:
        return await directory.sync(), size
    except dagger.QueryError as error:
        if "permission denied" in str(error).lower():
            raise WorkspaceError(f"{root}: something in it cannot be read: {error}") from error
        raise


def escape_pattern(path: str) -> str:
    """Write a relative path as a pattern of Dagger's that matches it alone.

    Blanks become a class of their own, since they are cut off at the ends of a
    pattern. What is no printable text does not reach the engine at all, so any other
    character in its place matches too.
    """

    def escape(character: str) -> str:
        if character == " ":
            return "[ ]"
        if not character.isprintable():
            return "?"
        return f"\\{character}" if character in "*?[\\!^" else character

    return "".join(map(escape, path))


def _relative(root: Path, paths: Sequence[Path]) -> list[str]:
    """Give those of the paths that are below a directory, relative to it."""
    real = Path(os.path.realpath(root))
    found = (Path(os.path.realpath(path)) for path in paths)
    return [
        os.fspath(path.relative_to(real))
        for path in found
        if path != real and path.is_relative_to(real)
    ]
