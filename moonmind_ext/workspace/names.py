"""What there is in a workspace, as `supervisor.sh` lists it inside the container.

The names are all bytes: what an engine's API says of a name that is no UTF-8 could be
another file's.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

MAX_BYTES = 256 << 20
"""Of a list: millions of names. The command may have put anything in its place."""

_ROOT = ""
_COMPLETE = b"//0"
_DIRECTORY, _CLOSED = 2, 3


@dataclass(frozen=True, slots=True)
class Names:
    """The paths in a workspace, without what is below a `.git`.

    Attributes
    ----------
    directories
        By path, whether it is one.
    closed
        Directories of which is not known what is in them; the workspace itself where the
        list is not whole.
    """

    directories: Mapping[str, bool] = field(default_factory=dict)
    closed: frozenset[str] = frozenset({_ROOT})


def read_names(path: Path) -> Names:
    """Read a list; blocking."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            return Names()
        return parse_names(path.read_bytes())
    except OSError:
        return Names()


def parse_names(data: bytes) -> Names:
    """Read a list: a directory's name stands there twice, or three times if it is closed."""
    *names, last, rest = (b"", *data.split(b"\0"))
    if rest:
        return Names()
    directories: dict[str, bool] = {}
    closed = set() if last == _COMPLETE else {_ROOT}
    for name, same in groupby(names[1:]):
        path = os.fsdecode(name.removeprefix(b"./"))
        times = sum(1 for _ in same)
        if times >= _CLOSED:
            closed.add(_ROOT if path == "." else path)
        if path != ".":
            directories[path] = times >= _DIRECTORY
    return Names(directories, frozenset(closed))
