"""Workspaces of one repository, sent as one base and what differs from it.

A job's checkout is new, but most of what is in it was sent for the job before. So
the first of them is kept as a base, with the digest of everything in it, and the next
is that base with what changed put over it and what is gone taken out. The engine's
directories never change, so any number of jobs can share one.
"""

import os
import stat
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread

from moonmind_ext.workspace.delta import Delta, compare, is_small, parents, set_apart
from moonmind_ext.workspace.index import WORTH_BYTES, WORTH_FILES, vouched
from moonmind_ext.workspace.manifest import (
    TICK_NS,
    Manifest,
    Node,
    Stamp,
    Stamps,
    changed_between,
    look,
    read,
)
from moonmind_ext.workspace.stage import stage
from pipelines.concurrency import together

if TYPE_CHECKING:
    import dagger

MAX_BASES = 16
"""Of one session. A base is a manifest here, some MB for 20,000 files; and the engine
keeps what it consists of as long as the session is open."""

MAX_AGE_SECONDS = 3600.0
"""Of a base. Differences grow from job to job as the repository goes on."""

BASE_ATTEMPTS = 3
"""Of sending a base while somebody works in the workspace, on names that only a whole
send can put right."""

GITIGNORE = ".gitignore"


class HostDirectory(Protocol):
    """Makes the engine's view of a directory of this host, not sent before it is synced.

    It is filtered as the payload says, and lacks `without`: paths that are patterns of
    themselves.
    """

    def __call__(self, path: Path, without: Sequence[str] = ()) -> "dagger.Directory":
        """Make it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A workspace that is to be sent.

    Attributes
    ----------
    root
        Absolute.
    left_out
        Relative paths that do not go along.
    touched
        Relative paths that are likely to be others the next time.
    is_clone
        Whether nobody but git has been there, so that its index can be believed.
    filtered, includes, gitignore
        Whether `host_directory` leaves something out, and whether by what is included
        or by `.gitignore` files. What is left out may be unreadable.
    """

    root: Path
    left_out: frozenset[str]
    host_directory: HostDirectory
    touched: Sequence[str]
    is_clone: bool
    filtered: bool
    includes: bool
    gitignore: bool

    def look(self) -> dict[str, Stamp]:
        """Stamp everything; blocking."""
        return look(self.root, self.left_out, all_readable=not self.filtered)

    def read(self, stamps: Stamps) -> dict[str, Node]:
        """Read everything; blocking."""
        size = sum(stamp.size for stamp in stamps.values() if stamp.is_file)
        is_much = len(stamps) >= WORTH_FILES or size >= WORTH_BYTES
        known = vouched(self.root, stamps) if is_much and self.is_clone else {}
        return read(self.root, stamps, known, all_readable=not self.filtered)

    def apart(self, stamps: Stamps) -> tuple[str, ...]:
        """Choose what is to be sent by itself; blocking."""
        if self.includes:
            # A directory is there for what is included of it.
            return ()
        chosen = set_apart(stamps, self.touched)
        return tuple(
            path
            for path in chosen
            if os.access(self.root / path, os.R_OK)
            # They decide about files that are not apart.
            and not (self.gitignore and _is_ignore_file(path))
        )

    def ignore_files(self, stamps: Stamps) -> list[str]:
        """List the files that say what the engine is to leave out, if any do."""
        return [path for path in stamps if _is_ignore_file(path)] if self.gitignore else []


@dataclass(frozen=True, slots=True)
class Sent:
    """A workspace in the engine.

    Attributes
    ----------
    stamps
        What it consists of, before any filter.
    uploaded_bytes
        Content of the files that were sent for it; None where the engine has decided
        that itself.
    """

    directory: "dagger.Directory"
    stamps: Stamps
    uploaded_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Base:
    directory: "dagger.Directory"
    manifest: Manifest
    born: float


@dataclass
class Bases:
    """The bases of one session; the oldest are forgotten."""

    _bases: "OrderedDict[str, _Base]" = field(default_factory=OrderedDict)
    # Kept as long as somebody waits for or has one.
    _turns: "WeakValueDictionary[str, anyio.Lock]" = field(default_factory=WeakValueDictionary)

    async def send(self, key: str, source: Source) -> Sent:
        """Send a workspace as a base, or as what differs from one.

        Parameters
        ----------
        key
            What bases are shared by: the repository, and the filter.

        Raises
        ------
        WorkspaceError
            When something in it cannot be read.
        dagger.DaggerError
            When the engine fails.
        """
        while True:
            # The first job sends the base; those that come meanwhile wait for it,
            # which takes less than sending the whole again.
            async with self._turn(key):
                base = self._find(key)
                if base is None:
                    sent, manifest = await send_whole(source, digests=True)
                    self._keep(key, _Base(sent.directory, manifest, anyio.current_time()))
                    return sent
            difference = await _send_difference(base, source)
            if difference is not None:
                return difference
            if self._bases.get(key) is base:
                del self._bases[key]

    @asynccontextmanager
    async def _turn(self, key: str) -> AsyncIterator[None]:
        lock = self._turns.get(key)
        if lock is None:
            lock = self._turns[key] = anyio.Lock()
        async with lock:
            yield

    def _find(self, key: str) -> _Base | None:
        base = self._bases.get(key)
        if base is None or anyio.current_time() - base.born > MAX_AGE_SECONDS:
            return None
        self._bases.move_to_end(key)
        return base

    def _keep(self, key: str, base: _Base) -> None:
        self._bases[key] = base
        self._bases.move_to_end(key)
        while len(self._bases) > MAX_BASES:
            self._bases.popitem(last=False)


async def send_whole(source: Source, *, digests: bool) -> tuple[Sent, Manifest]:
    """Send everything.

    What changes meanwhile is noticed, and sent again in one piece.

    Parameters
    ----------
    digests
        Whether to read it too, at the same time: for a base, which is sent once from
        where it is.

    Returns
    -------
    tuple
        What was sent, and the digests of just that; none if they are not wanted.
    """

    async def read_all() -> dict[str, Node]:
        return await anyio.to_thread.run_sync(source.read, stamps) if digests else {}

    for attempt in range(1, BASE_ATTEMPTS + 1):
        began, stamps = await anyio.to_thread.run_sync(_look_at_rest, source)
        apart = () if digests else await anyio.to_thread.run_sync(source.apart, stamps)
        directory, manifest = await together(
            source.host_directory(source.root, apart).sync(), read_all()
        )
        directory = await _put_apart(directory, apart, source, stamps)
        after = await anyio.to_thread.run_sync(source.look)
        changed = changed_between(stamps, after, began)
        if not changed:
            return Sent(directory, stamps, None), manifest
        delta = _again(changed, stamps, after)
        if delta.is_expressible or attempt == BASE_ATTEMPTS:
            break
    directory, nodes, _ = await _put_over(directory, delta, source, source.ignore_files(after))
    kept = {path: node for path, node in manifest.items() if path not in changed}
    return Sent(directory, after, None), {**kept, **nodes}


async def _put_apart(
    directory: "dagger.Directory", apart: tuple[str, ...], source: Source, stamps: Stamps
) -> "dagger.Directory":
    """Add what was sent by itself.

    An engine that knows a directory from an earlier session asks for what changed in it,
    but makes a copy of all of it then: 2.4 s of 20,000 files, instead of 0.5 s.
    """
    if not apart:
        return directory
    delta = Delta(changed=apart, removed_files=(), removed_directories=())
    directory, _, _ = await _put_over(directory, delta, source, source.ignore_files(stamps))
    return directory


async def _send_difference(base: _Base, source: Source) -> Sent | None:
    """Send what differs from a base; None when that is too much, or cannot be told."""
    stamps, manifest = await anyio.to_thread.run_sync(_read_settled, source)
    delta = compare(base.manifest, manifest)
    if not delta.is_expressible or any(stamp.is_special for stamp in stamps.values()):
        return None
    if source.includes and (
        delta.removed_files
        or delta.removed_directories
        or any(stamps[path].is_directory for path in delta.changed)
    ):
        # A directory is there for what is included of it, which only a whole send knows.
        return None
    ignore_files = source.ignore_files(stamps)
    if not set(ignore_files).isdisjoint({*delta.changed, *delta.removed_files}):
        # It may decide about files that have not changed.
        return None
    sizes = [stamps[path].size for path in delta.changed if stamps[path].is_file]
    total = sum(stamp.size for stamp in stamps.values() if stamp.is_file)
    if not is_small(len(sizes), sum(sizes), files=len(stamps), size_of_all=total):
        return None
    if delta.is_empty:
        return Sent(base.directory, stamps, 0)
    directory, _, uploaded = await _put_over(base.directory, delta, source, ignore_files)
    return Sent(directory, stamps, uploaded)


def _is_ignore_file(path: str) -> bool:
    return path.rpartition("/")[2] == GITIGNORE


def _look_at_rest(source: Source) -> tuple[int, dict[str, Stamp]]:
    """Look at a workspace that nobody has written to a moment ago, if that can be had."""
    began = time.time_ns()
    stamps = source.look()
    fresh = [path for path, stamp in stamps.items() if stamp.ctime_ns >= began - TICK_NS]
    if fresh:
        # A clone that has just ended. Its last files could not be told from such as
        # change while they are sent.
        time.sleep(TICK_NS / 1e9)
        began = time.time_ns()
        for path in fresh:
            try:
                stamps[path] = Stamp.of((source.root / path).lstat())
            except OSError:
                # It has gone; what is below it will be missed too.
                del stamps[path]
    return began, stamps


def _read_settled(source: Source) -> tuple[Stamps, Manifest]:
    """Read a workspace, and again what changed meanwhile; blocking."""
    began, stamps = _look_at_rest(source)
    manifest = source.read(stamps)
    after = source.look()
    changed = changed_between(stamps, after, began)
    kept = {path: node for path, node in manifest.items() if path not in changed}
    again = source.read({path: after[path] for path in changed & after.keys()})
    return after, {**kept, **again}


def _again(changed: Iterable[str], before: Stamps, after: Stamps) -> Delta:
    """Say how to put right what changed while it was sent: it may have come in any state."""
    gone = {path for path in changed if path in before} - {""}
    gone = {
        path
        for path in gone
        if path not in after or not (before[path].is_directory and after[path].is_directory)
    }
    topmost = [path for path in gone if gone.isdisjoint(parents(path))]
    return Delta(
        changed=tuple(sorted(path for path in changed if path in after)),
        removed_files=tuple(path for path in topmost if not before[path].is_directory),
        removed_directories=tuple(path for path in topmost if before[path].is_directory),
    )


async def _put_over(
    directory: "dagger.Directory", delta: Delta, source: Source, with_it: Iterable[str]
) -> "tuple[dagger.Directory, dict[str, Node], int]":
    """Apply a difference to a directory of the engine.

    Parameters
    ----------
    with_it
        Paths that have not changed, and go along for the filter to read.

    Returns
    -------
    tuple
        The directory, what was brought, and the bytes of that.
    """
    if delta.removed_files:
        directory = directory.without_files(list(delta.removed_files))
    for path in delta.removed_directories:
        directory = directory.without_directory(path)
    with tempfile.TemporaryDirectory(prefix="moonmind-delta-") as folder:
        staging = Path(folder, "changes")
        paths = {*delta.changed, *with_it}
        nodes = await anyio.to_thread.run_sync(stage, source.root, staging, paths)
        if nodes:
            directory = directory.with_directory("/", source.host_directory(staging))
        # Before the staging directory is gone.
        directory = await directory.sync()
        size = sum(
            (staging / path).stat().st_size
            for path, node in nodes.items()
            if stat.S_ISREG(node.mode)
        )
    return directory, {path: nodes[path] for path in delta.changed if path in nodes}, size
