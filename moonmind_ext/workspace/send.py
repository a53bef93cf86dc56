"""A directory of this host becomes a directory of the engine."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moonmind_ext.workspace.bases import Bases, Source, send_whole
from moonmind_ext.workspace.errors import WorkspaceError
from moonmind_ext.workspace.manifest import Stamps
from moonmind_ext.workspace.source import NOWHERE, Standing
from pipelines.payload import WorkspaceFilter

if TYPE_CHECKING:
    import dagger


@dataclass(frozen=True, slots=True)
class Size:
    """How much a workspace is, and what.

    Attributes
    ----------
    files, bytes
        Files that are not directories, and their bytes; None where a filter chose.
    uploaded_bytes
        What of it was sent; None where the engine decided that, which does not say.
    stamps
        Of all that was there, whatever a filter chose of it.
    """

    files: int | None
    bytes: int | None
    uploaded_bytes: int | None = None
    stamps: Stamps = field(default_factory=dict, repr=False, compare=False)


async def send_workspace(
    client: "dagger.Client",
    root: Path,
    chosen: WorkspaceFilter,
    *,
    leave_out: Sequence[Path] = (),
    bases: Bases | None = None,
    standing: Standing = NOWHERE,
) -> "tuple[dagger.Directory, Size]":
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
    bases
        What was sent before in this session; None sends the whole.
    standing
        Workspaces of one repository have most in common. And where the whole is sent,
        what somebody works on goes by itself: the next session finds the rest as it was.

    Raises
    ------
    WorkspaceError
        When something in it cannot be read, or changes all the time.
    dagger.DaggerError
        When the engine fails.
    """
    import dagger

    left_out = _relative(root, leave_out)

    def host_directory(path: Path, without: Sequence[str] = ()) -> dagger.Directory:
        # Without `no_cache` a second look at the same path in one session gives what
        # the first one saw.
        return client.host().directory(
            os.fspath(path),
            include=list(chosen.include),
            # The last pattern that matches decides: `!` in a payload takes nothing of
            # ours back.
            exclude=[*chosen.exclude, *map(escape_pattern, left_out), *without],
            gitignore=chosen.gitignore,
            no_cache=True,
        )

    filtered = bool(chosen.include or chosen.exclude or chosen.gitignore)
    source = Source(
        root=root,
        left_out=frozenset(left_out),
        host_directory=host_directory,
        touched=standing.touched,
        is_clone=standing.is_clone,
        filtered=filtered,
        includes=bool(chosen.include),
        gitignore=chosen.gitignore,
    )
    try:
        if bases is None:
            sent, _ = await send_whole(source, digests=False)
        else:
            sent = await bases.send(
                f"{standing.source.repository}\n{chosen.model_dump_json()}", source
            )
    except dagger.QueryError as error:
        if "permission denied" in str(error).lower():
            raise WorkspaceError(f"{root}: something in it cannot be read: {error}") from error
        raise
    if filtered:
        return sent.directory, Size(None, None, sent.uploaded_bytes, sent.stamps)
    files = [stamp for stamp in sent.stamps.values() if not stamp.is_directory]
    total = sum(stamp.size for stamp in files)
    return sent.directory, Size(len(files), total, sent.uploaded_bytes, sent.stamps)


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
