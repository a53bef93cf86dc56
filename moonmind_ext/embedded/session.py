"""One session: its directory on the disk, what it has computed, what it runs."""

import fcntl
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import IO, Any, Generic, ParamSpec, TypeVar

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from moonmind_ext.embedded.logs import LiveLogs
from moonmind_ext.embedded.once import Once
from moonmind_ext.embedded.root import make_base
from moonmind_ext.embedded.sandbox import Sandbox
from moonmind_ext.embedded.store import Known, Store, remove

FILE_THREADS = 8
"""That work on files at once; more would only wait for the same disk."""

_LOCK = "lock"
"""In a session's directory: locked while its process lives."""

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Lazy(Generic[T]):
    """A value that is computed when it is needed, once in a session.

    Attributes
    ----------
    key
        The recipe's digest: what has the same is the same.
    """

    key: str
    compute: Callable[[], Awaitable[T]]


def recipe(*parts: object) -> str:
    """Make a key of an operation and everything that goes into it."""
    return sha256(repr(parts).encode(errors="surrogateescape")).hexdigest()


class Session:
    """What all objects of a session share.

    Parameters
    ----------
    folder
        For the session alone; it is removed at its end.
    volumes
        Where cache volumes last.
    """

    def __init__(
        self, folder: Path, volumes: Path, sandbox: Sandbox, logs: LiveLogs, tasks: TaskGroup
    ) -> None:
        self.sandbox = sandbox
        self.logs = logs
        self.store = Store(folder / "store")
        self.base = folder / "base"
        make_base(self.base)
        self.host_directories: dict[str, tuple[Known, int]] = {}
        self._objects: dict[str, Any] = {}
        self._folder = folder
        self._volumes = volumes
        self._numbers = count()
        self._tasks = tasks
        self._once = Once(tasks)
        self._threads = anyio.CapacityLimiter(FILE_THREADS)

    async def get(self, lazy: Lazy[T]) -> T:
        """Evaluate; what was evaluated once is only looked up."""
        return await self._once.get(lazy.key, lazy.compute)

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run something that blocks for files."""
        call = partial(function, *args, **kwargs)
        return await anyio.to_thread.run_sync(call, limiter=self._threads)

    def later(self, function: Callable[..., object], *args: object) -> None:
        """Run something that blocks, when nobody waits for it."""
        self._tasks.start_soon(partial(self.in_thread, function, *args))

    def keep(self, key: str, thing: object) -> None:
        """Keep an object whose id somebody gets."""
        self._objects[key] = thing

    def load(self, key: str) -> Any:
        """Give the object of an id.

        Raises
        ------
        KeyError
            When this session has given no such id.
        """
        return self._objects[key]

    def new_path(self, kind: str) -> Path:
        """Name something that does not exist yet."""
        return self._folder / f"{kind}-{next(self._numbers)}"

    def volume(self, key: str) -> Path:
        """Give the directory of a cache volume."""
        path = self._volumes / sha256(key.encode()).hexdigest()
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        return path


@asynccontextmanager
async def open_session(
    state_dir: Path, sandbox: Sandbox, logs_endpoint: str | None
) -> AsyncIterator[Session]:
    """Open a session; at its end its commands are dead and its files away."""
    folder, lock = await anyio.to_thread.run_sync(_claim_directory, state_dir)
    logs = LiveLogs(logs_endpoint)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(logs.post)
            try:
                yield Session(folder, state_dir / "volumes", sandbox, logs, tasks)
            finally:
                tasks.cancel_scope.cancel()
    finally:
        with lock, anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(_remove_directory, state_dir, folder)


def _claim_directory(state_dir: Path) -> tuple[Path, IO[str]]:
    """Make a directory that is locked as long as its session lives; clear away dead ones."""
    sessions = state_dir / "sessions"
    sessions.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Held for as long as clearing away takes: seconds, and only after a crash.
    with _all_sessions(state_dir):
        for folder in sessions.iterdir():
            if not _is_alive(folder):
                remove(str(folder))
        folder = sessions / secrets.token_hex(4)
        folder.mkdir(mode=0o700)
        lock = (folder / _LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def _remove_directory(state_dir: Path, folder: Path) -> None:
    """Remove a session's directory, its lock last: without one it would be a dead one's.

    Then somebody who opens a session meanwhile would clear it away too.
    """
    for path in folder.iterdir():
        if path.name == _LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            remove(str(path))
        else:
            path.unlink()
    with _all_sessions(state_dir):
        remove(str(folder))


@contextmanager
def _all_sessions(state_dir: Path) -> Iterator[None]:
    """Keep everybody else from opening a session, or closing one."""
    with (state_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_alive(folder: Path) -> bool:
    """Whether a process holds the lock of a session's directory."""
    try:
        with (folder / _LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass  # Killed before it had one.
    return False
