"""A job's directory: locked while its worker lives, removed with the job.

The lock is the kernel's, so it is gone with the process that holds it: a directory
whose lock is free was left by a worker that was killed.
"""

import errno
import fcntl
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import anyio
import anyio.to_thread
import structlog

from moonmind_ext.workspace.tree import remove_tree
from pipelines.plan import JOB_ID

LOCK = ".moonmind-worker"
"""In a job's directory; what has none there is not this worker's to sweep."""

PROBE_BYTES = 64 << 10
"""Written to see whether there is room: more than a block, and soon done."""

BUSY_SECONDS = 60.0
"""For another worker of this host, which has lost the job and removes its checkout. Giving
the job back would cost an attempt."""

BUSY_AGAIN_SECONDS = 0.5

log = structlog.get_logger()


class DirectoryBusyError(Exception):
    """Another worker on this host has the job's directory."""


@asynccontextmanager
async def job_directory(workdir: Path, job_id: str) -> AsyncIterator[Path]:
    """Make a job's directory, and remove it at the end with all that is in it.

    What an earlier attempt has left there is removed first.

    Raises
    ------
    DirectoryBusyError
        When another worker has it: that one still has to learn that it lost the job.
    OSError
        When it cannot be made.
    """
    # All that is in it is removed: so it must be one of the jobs' own.
    if not re.fullmatch(JOB_ID, job_id):
        raise OSError(errno.EINVAL, f"job id {job_id!r}: cannot name a directory")
    path = workdir / job_id
    if path.is_symlink():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if not _may_be_emptied(path):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
    async with _lock_in_time(path):
        await anyio.to_thread.run_sync(_empty, path)
        try:
            yield path
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(_remove, path)


def _may_be_emptied(path: Path) -> bool:
    """Whether what is in a directory was left by a worker: by the lock, or by the name."""
    if not path.exists() or (path / LOCK).is_file() or not any(path.iterdir()):
        return True
    try:
        # MoonMind's own worker leaves its jobs' directories, and has no lock.
        return str(UUID(path.name)) == path.name
    except ValueError:
        return False


@asynccontextmanager
async def _lock_in_time(path: Path) -> AsyncIterator[None]:
    """Hold the lock of a directory, also when another worker has still to let it go."""
    with anyio.move_on_after(BUSY_SECONDS) as waiting:
        while True:
            with _locked(path) as is_ours:
                if is_ours:
                    waiting.deadline = float("inf")
                    yield
                    return
            await anyio.sleep(BUSY_AGAIN_SECONDS)
    raise DirectoryBusyError(f"{path} is in use by another worker")


def probe(workdir: Path) -> None:
    """Make sure that a job's directory could be made and written to; blocking.

    Raises
    ------
    OSError
        When it could not.
    """
    with TemporaryDirectory(prefix=".moonmind-probe-", dir=workdir) as folder:
        Path(folder, "file").write_bytes(bytes(PROBE_BYTES))


def sweep(workdir: Path) -> None:
    """Remove the directories that workers which were killed have left; blocking."""
    for path in sorted(workdir.iterdir()):
        try:
            if path.is_symlink() or not (path / LOCK).is_file():
                continue
            with _locked(path) as is_ours:
                if is_ours:
                    _remove(path)
                    log.info("removed what a killed worker had left", directory=str(path))
        except OSError as error:
            log.warning("cannot remove what was left", directory=str(path), error=str(error))


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a directory, made if it is not there; False when somebody has it."""
    # A checkout and what a task leaves are nobody else's business.
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            # Removed by the worker that had it, between our two steps.
            yield os.fstat(lock).st_nlink > 0
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    _empty(path)
    # The lock last: until then the directory is known as one to sweep.
    (path / LOCK).unlink()
    path.rmdir()


def _empty(path: Path) -> None:
    for inner in path.iterdir():
        if inner.name == LOCK:
            continue
        if inner.is_dir() and not inner.is_symlink():
            remove_tree(inner)
        else:
            inner.unlink()
