"""What a container's own file system is: layers, and below them the host's root.

Layers are directories in the format of overlayfs, so that the kernel can stack
them. This module looks into such a stack without the kernel, since `exists` and
`file` must not cost a mount.
"""

# Directories have thousands of names, and only the names are wanted.
# ruff: noqa: PTH208

import os
import shutil
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moonmind_ext.embedded.store import Store
from moonmind_ext.embedded.tree import MAX_LINKS, Entry, Tree, parents, relative

HIDDEN = frozenset({"tmp", "var/tmp", "run", "home", "root", "media"})
"""Of the host's root, what a task does not see: it gets an empty one of its own.
Tasks must not find each other's leftovers there, nor the user's keys."""

_OPAQUE = "user.overlay.opaque"
_EMPTY_MODES = {"tmp": 0o1777, "var/tmp": 0o1777, "root": 0o700}


@dataclass(frozen=True, slots=True)
class Root:
    """A stack of layers.

    Attributes
    ----------
    layers
        Topmost first; immutable once they are here.
    host
        Whether the host's root is the lowest; else there is nothing below.
    """

    layers: tuple[Path, ...] = ()
    host: bool = False

    def find(self, path: str, *, follow_last: bool = True) -> "Found | None":
        """Find where a path leads, following symbolic links inside the root."""
        top = Found("", tuple(self._bottoms()))
        todo = relative(path).split("/")[::-1]
        trail = [top]
        links = 0
        while todo:
            name = todo.pop()
            if name in {"", "."}:
                continue
            if name == "..":
                trail = trail[:-1] or [top]
                continue
            found = self._step(trail[-1], name)
            if found is None:
                return None
            if stat.S_ISLNK(found.status.st_mode) and (todo or follow_last):
                links += 1
                if links > MAX_LINKS:
                    return None
                target = str(found.places[0].readlink())
                if target.startswith("/"):
                    trail = [top]
                todo.extend(target.split("/")[::-1])
                continue
            trail.append(found)
        return trail[-1]

    def place(self, path: str) -> str:
        """Follow the links among the parents of a path that need not exist."""
        head, _, name = relative(path).rpartition("/")
        missing = [name]
        while (found := self.find(head)) is None:
            head, _, name = head.rpartition("/")
            missing.insert(0, name)
        return "/".join(filter(None, [found.path, *missing]))

    def read(self, found: "Found", store: Store) -> Tree:
        """Take in a directory or a file of the root; blocking."""
        if not stat.S_ISDIR(found.status.st_mode):
            return store.read(str(found.places[0]))[0]
        tree: dict[str, Entry] = {}
        todo = [("", found)]
        while todo:
            path, found = todo.pop()
            mode, mtime = found.status.st_mode, found.status.st_mtime_ns
            tree[path] = Entry(mode, mtime_ns=mtime)
            for name in {name for place in found.places for name in os.listdir(place)}:
                inner = self._step(found, name)
                if inner is None:
                    continue
                key = f"{path}/{name}" if path else name
                if stat.S_ISDIR(inner.status.st_mode):
                    todo.append((key, inner))
                else:
                    tree[key] = store.read(str(inner.places[0]))[0][""]
        return tree

    def with_layer(self, layer: Path) -> "Root":
        """Put a layer on top."""
        return Root((layer, *self.layers), self.host)

    def _bottoms(self) -> Iterable[Path]:
        yield from self.layers
        if self.host:
            yield Path("/")

    def _step(self, parent: "Found", name: str) -> "Found | None":
        """Find a name in a directory, through its layers from the top."""
        path = f"{parent.path}/{name}" if parent.path else name
        places: list[Path] = []
        for directory in parent.places:
            place = directory / name
            if self.host and directory == Path("/", parent.path) and path in HIDDEN:
                break
            try:
                status = place.lstat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            if is_whiteout(status):
                break
            if not stat.S_ISDIR(status.st_mode):
                if not places:
                    places.append(place)
                break
            places.append(place)
            if is_opaque(place):
                break
        return Found(path, tuple(places)) if places else None


@dataclass(frozen=True, slots=True)
class Found:
    """A node of a root.

    Attributes
    ----------
    path
        Without links, relative to the root.
    places
        Where it really is; of a directory, in every layer that has a part of it,
        topmost first.
    """

    path: str
    places: tuple[Path, ...]

    @property
    def status(self) -> os.stat_result:
        """What `lstat` says."""
        return self.places[0].lstat()


def is_whiteout(status: os.stat_result) -> bool:
    """Whether a node of a layer says that there is nothing, whatever is below."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(directory: Path) -> bool:
    """Whether a directory of a layer hides what is below it."""
    try:
        return os.getxattr(directory, _OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        return False


def make_layer(layer: Path) -> None:
    """Make an empty layer."""
    layer.mkdir()
    layer.chmod(0o755)  # The umask may have taken more; `/` is open.


def make_directories(root: Root, layer: Path, path: str) -> None:
    """Make a directory in a layer, and the way to it, with the modes that the root has.

    Parameters
    ----------
    path
        As `Root.place` gives it.
    """
    for directory in (*parents(path), path):
        place = layer / directory
        if directory and not place.is_dir():
            found = root.find(directory)
            whiteout = os.path.lexists(place)
            if whiteout:
                place.unlink()
            place.mkdir()
            if whiteout:
                os.setxattr(place, _OPAQUE, b"y")
            place.chmod(stat.S_IMODE(found.status.st_mode) if found else 0o755)


def make_base(layer: Path) -> None:
    """Make the layer that hides parts of the host's root."""
    make_layer(layer)
    for path in sorted(HIDDEN):
        place = layer / path
        place.mkdir(parents=True)
        place.chmod(_EMPTY_MODES.get(path, 0o755))
        with suppress(OSError):  # Then the kernel cannot stack layers here either.
            os.setxattr(place, _OPAQUE, b"y")


def flatten(layers: Iterable[Path], target: Path, copy: Callable[[Path, Path], object]) -> None:
    """Make one layer of several; blocking.

    Parameters
    ----------
    layers
        Topmost first.
    target
        An empty layer.
    copy
        Brings what is no directory to its new place.
    """
    todo = [(tuple(layers), target)]
    while todo:
        places, directory = todo.pop()
        for name in {name for place in places for name in os.listdir(place)}:
            inner: list[Path] = []
            opaque = False
            for node in (place / name for place in places):
                if not os.path.lexists(node):
                    continue
                if node.is_dir() and not node.is_symlink():
                    inner.append(node)
                    opaque = is_opaque(node)
                elif inner:
                    opaque = True
                else:
                    copy(node, directory / name)
                if opaque or not inner:
                    break
            if inner:
                merged = directory / name
                merged.mkdir()
                shutil.copystat(inner[0], merged)
                if opaque:
                    os.setxattr(merged, _OPAQUE, b"y")
                todo.append((tuple(inner), merged))
