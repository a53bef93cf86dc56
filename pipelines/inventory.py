"""What a command left, looked at inside the engine, where no host file system is.

The rules are those of `artifacts.py`, as on a host; here something refused never
leaves the engine.
"""

import posixpath
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePosixPath

import dagger

from pipelines.artifacts import Gate, readable
from pipelines.concurrency import together
from pipelines.container_task import Image, engine_failures
from pipelines.payload import ArtifactRules
from pipelines.report import Artifact, Artifacts

_PLACE = "/.moonmind/place"
_OUT = "/.moonmind/listing"
_SCRIPT = "/.moonmind/listing.sh"


@dataclass(frozen=True, slots=True)
class Entry:
    """Something in a directory.

    Attributes
    ----------
    path
        Relative to the directory.
    mode
        As `lstat` has it.
    target
        Of a symbolic link.
    sha256
        Of a regular file.
    """

    path: str
    mode: int
    size: int
    target: str = ""
    sha256: str = ""


async def list_entries(
    client: dagger.Client, image: Image, directory: dagger.Directory
) -> list[Entry]:
    """List everything below a directory, with targets and digests.

    Raises
    ------
    EngineFailedError
        When the engine fails.
    """
    script = resources.files("pipelines").joinpath("listing.sh").read_text("utf-8")
    with engine_failures("listing what the command left"):
        out = (
            image.container.with_user("root")
            .with_mounted_directory(_PLACE, directory)
            .with_mounted_directory(_OUT, client.directory())
            .with_mounted_file(_SCRIPT, client.file("listing.sh", script))
            .with_exec([*image.shell, _SCRIPT, _PLACE, _OUT, image.busybox])
            .directory(_OUT)
        )
        names = ("names", "stats", "links", "digests")
        listing = await together(*(out.file(name).contents() for name in names))
    return ordered(parse_listing(*listing))


def parse_listing(names: str, stats: str, links: str, digests: str) -> Iterator[Entry]:
    """Read what `listing.sh` wrote."""
    paths = [name.removeprefix("./") for name in names.split("\0") if name]
    described = [line.split() for line in stats.splitlines()]
    modes = {path: int(mode, 16) for path, (mode, _) in zip(paths, described, strict=True)}
    files = [path for path in paths if stat.S_ISREG(modes[path])]
    files.sort(key=lambda path: "\n" in path)
    # GNU's sha256sum puts a backslash before the line of a name that it had to escape.
    sums = [line.lstrip("\\")[:64] for line in digests.splitlines()]
    of_files = dict(zip(files, sums, strict=True))
    of_links = dict(
        zip(
            [path for path in paths if stat.S_ISLNK(modes[path])],
            links.split("\0")[:-1],
            strict=True,
        )
    )
    for path, (_, size) in zip(paths, described, strict=True):
        yield Entry(path, modes[path], int(size), of_links.get(path, ""), of_files.get(path, ""))


def judge(entries: Iterable[Entry], rules: ArtifactRules) -> Artifacts:
    """Say which artifacts stay, and of the others why not.

    Parameters
    ----------
    entries
        In the order in which the limits count them.
    """
    found = Artifacts()
    gate = Gate(max_bytes=rules.max_bytes, max_files=rules.max_files)
    for entry in entries:
        if any(str(parent) in found.refused for parent in PurePosixPath(entry.path).parents):
            continue
        reason = gate.refuse(entry.path, entry.mode, entry.size, entry.target)
        if reason is not None:
            found.refused[readable(entry.path)] = reason
        elif stat.S_ISREG(entry.mode):
            found.files.append(
                Artifact(path=readable(entry.path), bytes=entry.size, sha256=entry.sha256)
            )
    return found


def without(directory: dagger.Directory, paths: Iterable[str]) -> dagger.Directory:
    """Take out entries by their names, which to Dagger are patterns."""
    patterns = [re.sub(r"[!*?\[\]\\]", r"\\\g<0>", path) for path in paths]
    # Blanks at the ends are dropped from a pattern, and what was not UTF-8 in a name
    # has arrived as U+FFFD.
    patterns = [re.sub(r"[\s\ufffd]", "?", pattern) for pattern in patterns]
    return directory.filter(exclude=patterns) if patterns else directory


def ordered(entries: Iterable[Entry]) -> list[Entry]:
    """Sort as a host lists them: a directory's own entries, then what is in its directories."""

    def place(entry: Entry) -> tuple[list[bytes], bytes]:
        folder, name = posixpath.split(entry.path)
        return [part.encode() for part in folder.split("/") if part], name.encode()

    return sorted(entries, key=place)
