"""One exec: from what a container is to what it is afterwards."""

import fcntl
import os
import posixpath
import shutil
import stat
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
from graphql import GraphQLError

from moonmind_ext.embedded import tree as trees
from moonmind_ext.embedded.output import STDERR, STDOUT, Capture
from moonmind_ext.embedded.process import Command, NotStartedError
from moonmind_ext.embedded.root import Root, flatten, make_directories, make_layer
from moonmind_ext.embedded.sandbox import MountOptions, assemble, find_identity, resolver
from moonmind_ext.embedded.session import Session
from moonmind_ext.embedded.store import Known, remove
from moonmind_ext.embedded.tree import Entry, Tree, inside, relative

LOCK_POLL_SECONDS = 0.05
"""How often a volume that another exec has is asked for. There is no limit to the
wait: it ends with the other exec, or with the query."""


@dataclass(frozen=True, slots=True)
class TreeMount:
    """A directory or a file of its own: a copy."""

    path: str
    tree: Tree
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class CacheMount:
    """A volume that lasts.

    Attributes
    ----------
    alone
        Whether no other exec may have it at the same time.
    """

    path: str
    volume: str
    alone: bool = False

    @property
    def key(self) -> object:
        """What it is by, for the cache; its content does not count."""
        return self.path, self.volume, self.alone


@dataclass(frozen=True, slots=True)
class TempMount:
    """An empty directory in memory."""

    path: str
    size: int | None = None

    @property
    def key(self) -> object:
        """What it is by, for the cache."""
        return self.path, self.size


@dataclass(frozen=True, slots=True)
class SecretMount:
    """A secret as a file, in memory."""

    path: str
    plaintext: str
    mode: int


Mount = TreeMount | CacheMount | TempMount | SecretMount


@dataclass(frozen=True, slots=True, kw_only=True)
class Exec:
    """What is to run, with everything that it needs evaluated.

    Attributes
    ----------
    redirect_stdin, redirect_stdout, redirect_stderr
        Absolute paths in the container, or empty.
    expected
        Whether an exit code is a success.
    """

    root: Root
    mounts: tuple[Mount, ...]
    args: tuple[str, ...]
    environment: Mapping[str, str]
    secrets: Mapping[str, str]
    user: str
    workdir: str
    stdin: str = ""
    redirect_stdin: str = ""
    redirect_stdout: str = ""
    redirect_stderr: str = ""
    expected: Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an exec left.

    Attributes
    ----------
    trees
        By the path of their mounts.
    stdout, stderr, combined
        Digests in the store.
    """

    exit_code: int
    root: Root
    trees: Mapping[str, Tree]
    stdout: str
    stderr: str
    combined: str


class ExecError(GraphQLError):
    """A command ended as it should not; says it as a real engine does."""

    def __init__(
        self,
        args: tuple[str, ...],
        code: int,
        stdout: str = "",
        stderr: str = "",
        message: str = "",
    ) -> None:
        super().__init__(
            message or f"exit code: {code}",
            extensions={
                "_type": "EXEC_ERROR",
                "cmd": list(args),
                "exitCode": code,
                "stdout": stdout,
                "stderr": stderr,
            },
        )


async def execute(session: Session, job: Exec) -> Outcome:
    """Run a command.

    Raises
    ------
    ExecError
        When the exit code is not an expected one, or the command cannot be started.
    GraphQLError
        When the sandbox fails.
    """
    async with _working_directory(session) as folder, AsyncExitStack() as stack:
        for mount in job.mounts:
            if isinstance(mount, CacheMount) and mount.alone:
                await stack.enter_async_context(_alone(session.volume(mount.volume)))
        stage = _Stage(session, job, folder)
        stack.callback(stage.close)
        await session.in_thread(stage.prepare)
        log = session.logs.stream()
        secrets = [*job.secrets.values()]
        secrets += [m.plaintext for m in job.mounts if isinstance(m, SecretMount)]
        capture = Capture(folder, secrets, log.write)
        code: int | None
        try:
            with capture:
                code = await Command(
                    bwrap=session.sandbox.bwrap,
                    options=stage.options,
                    args=job.args,
                    stdin=stage.stdin,
                    pass_fds=stage.descriptors,
                    write=capture.write,
                ).run()
        except NotStartedError as error:
            code = _not_started(capture.end(STDERR))
            if code is None:
                message = f"the sandbox could not be made: {capture.end(STDERR)}"
                raise GraphQLError(message) from error
        except OSError as error:
            raise GraphQLError(f"running the command: {error}") from error
        finally:
            log.finish()
        if not job.expected(code):
            raise ExecError(job.args, code, capture.end(STDOUT), capture.end(STDERR))
        return await session.in_thread(stage.collect, capture, code)


def _not_started(said: str) -> int | None:
    """Give a shell's exit code for a program that cannot be run; None where the sandbox failed."""
    if not said.startswith("bwrap: execvp "):
        return None
    return 127 if said.endswith("No such file or directory") else 126


@asynccontextmanager
async def _working_directory(session: Session) -> AsyncIterator[Path]:
    folder = session.new_path("exec")
    folder.mkdir()
    try:
        yield folder
    finally:
        # Not on the way of the answer: ten thousand files take a while to remove.
        session.later(remove, str(folder))


@asynccontextmanager
async def _alone(volume: Path) -> AsyncIterator[None]:
    """Hold a volume against other execs, those of other sessions too."""
    with volume.with_suffix(".lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await anyio.sleep(LOCK_POLL_SECONDS)
        yield


class _Stage:
    """The files of one exec, before and after it; all methods block."""

    def __init__(self, session: Session, job: Exec, folder: Path) -> None:
        self._session = session
        self._store = session.store
        self._job = job
        self._folder = folder
        self._closing = ExitStack()
        self._marks: dict[str, Known] = {}
        self._upper = session.new_path("layer")
        self._root = Root((self._upper,), job.root.host)
        self._points: list[MountOptions] = []
        self._started_ns = 0
        self.options: list[str] = []
        self.descriptors: list[int] = []
        self.stdin = -1

    def close(self) -> None:
        """Close the descriptors."""
        self._closing.close()

    def prepare(self) -> None:
        """Put everything where the sandbox takes it from."""
        job, sandbox = self._job, self._session.sandbox
        try:
            identity = find_identity(job.user)
        except LookupError as error:
            raise ExecError(job.args, -1, message=f"get user: {error}") from error
        for path in (job.redirect_stdout, job.redirect_stderr):
            if path and not self._can_hold(path):
                message = f"open redirect file: open {path}: no such file or directory"
                raise ExecError(job.args, -1, message=message)
        self.stdin = self._open_stdin()
        # One writable layer of all: the kernel stacks none that is inside another, and
        # all of them are inside the host's root.
        make_layer(self._upper)
        flatten(job.root.layers, self._upper, _copy_node)
        mounts = [self._make_point(mount) for mount in map(self._mount, job.mounts)]
        root = [MountOptions(("--bind", str(self._upper), "/"))]
        if job.root.host:
            mounts = [*map(self._make_point, resolver()), *mounts]
            work = self._folder / "work"
            work.mkdir()
            root = list(assemble(self._upper, work, overlay=sandbox.overlay))
        self._points = [m for m in (*root, *mounts) if m.makes_point]
        mounts += [*self._make_directory(identity.home), *self._make_directory(job.workdir)]
        self.options = sandbox.options(
            root=root,
            mounts=mounts,
            identity=identity,
            workdir=job.workdir,
            environment={"HOME": identity.home, **job.environment, **job.secrets},
        )
        if any("\0" in text for text in (*self.options, *job.args)):
            # It would end an option, and what comes after it would be one.
            raise ExecError(job.args, -1, message="a NUL character cannot be given to a command")
        self._started_ns = time.time_ns()

    def _can_hold(self, path: str) -> bool:
        """Whether a file can be at a path when the command has ended."""
        parent, mounted = posixpath.dirname(path), self._mount_of(path)
        if mounted is None:
            return self._job.root.find(parent) is not None
        return (
            isinstance(mounted, TreeMount)
            and not mounted.read_only
            and trees.resolve(mounted.tree, parent[len(mounted.path) :]) is not None
        )

    def _open_stdin(self) -> int:
        path = self._job.redirect_stdin
        if not path:
            return self._memory_file("stdin", self._job.stdin)
        source = self._find_file(path)
        if source is None:
            message = f"open redirect stdin file: open {path}: no such file or directory"
            raise ExecError(self._job.args, -1, message=message)
        descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        self._closing.callback(os.close, descriptor)
        return descriptor

    def _find_file(self, path: str) -> str | None:
        """Find a regular file of the container on this host."""
        mounted = self._mount_of(path)
        if mounted is None:
            found = self._job.root.find(path)
            regular = found is not None and stat.S_ISREG(found.status.st_mode)
            return str(found.places[0]) if found is not None and regular else None
        if not isinstance(mounted, TreeMount):
            return None
        key = trees.resolve(mounted.tree, path[len(mounted.path) :])
        if key is None or not mounted.tree[key].is_file:
            return None
        return self._store.path(mounted.tree[key].content)

    def _memory_file(self, name: str, text: str) -> int:
        """Keep text where no disk sees it; it is read from the beginning."""
        descriptor = os.memfd_create(name)
        self._closing.callback(os.close, descriptor)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(text.encode(errors="surrogateescape"))
        os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor

    def _mount_of(self, path: str, *, but: Mount | None = None) -> Mount | None:
        """Find the mount that a path is in: the last one that covers it."""
        for mount in reversed(self._job.mounts):
            if mount is not but and (path == mount.path or inside(path, mount.path)):
                return mount
        return None

    def _source(self, mount: Mount) -> Path:
        """Where the content of a mount is on this host."""
        if isinstance(mount, CacheMount):
            return self._session.volume(mount.volume)
        return self._folder / f"mount-{self._job.mounts.index(mount)}"

    def _mount(self, mount: Mount) -> MountOptions:
        """Make what a mount shows."""
        place = mount.path
        if self._mount_of(place, but=mount) is None:
            # bubblewrap does not follow links on the way.
            place = "/" + self._job.root.place(place)
        match mount:
            case TreeMount():
                source = str(self._source(mount))
                self._marks[mount.path] = self._store.write(mount.tree, source, mark=True)
                bind = "--ro-bind" if mount.read_only else "--bind"
                is_file = not mount.tree[""].is_directory
                return MountOptions((bind, source, place), is_file=is_file)
            case CacheMount():
                return MountOptions(("--bind", str(self._source(mount)), place))
            case TempMount():
                size = ("--size", str(mount.size)) if mount.size else ()
                return MountOptions((*size, "--perms", "1777", "--tmpfs", place))
            case SecretMount():
                data = self._memory_file("secret", mount.plaintext)
                self.descriptors.append(data)
                options = ("--perms", f"{mount.mode:o}", "--ro-bind-data", str(data), place)
                return MountOptions(options, is_file=True)

    def _make_point(self, mount: MountOptions) -> MountOptions:
        """Make what a mount goes over, if nothing is there."""
        path = relative(mount.place)
        if self._mount_of(posixpath.dirname(mount.place)) is not None:
            return mount  # bubblewrap makes it there, and as with a real engine it stays.
        if self._root.find(path) is not None:
            return mount
        if mount.is_file:
            make_directories(self._root, self._upper, posixpath.dirname(path))
            (self._upper / path).unlink(missing_ok=True)
            (self._upper / path).touch()
        else:
            make_directories(self._root, self._upper, path)
        return replace(mount, makes_point=True)

    def _clear_points(self) -> None:
        """Take away the mount points that were made, and the empty ways to them."""
        for mount in reversed(self._points):
            point = self._upper / relative(mount.place)
            with suppress(OSError):  # There is something in it, or it is gone.
                if point.is_symlink() or point.is_file():
                    point.unlink()
                else:
                    point.rmdir()
                for parent in point.relative_to(self._upper).parents[:-1]:
                    if Root((), self._job.root.host).find(str(parent)) is None:
                        (self._upper / parent).rmdir()

    def _make_directory(self, path: str) -> list[MountOptions]:
        """Make a directory that a command may take for granted, if it is missing."""
        mounted = self._mount_of(path)
        if mounted is not None:
            # Only bubblewrap sees where links in there lead.
            return [MountOptions(("--dir", path))]
        if self._root.find(path) is None:
            make_directories(self._root, self._upper, self._root.place(path))
        return []

    def collect(self, capture: Capture, code: int) -> Outcome:
        """Take in what the command left."""
        self._clear_points()
        after: dict[str, Tree] = {}
        for mount in self._job.mounts:
            if isinstance(mount, TreeMount) and not mount.read_only:
                after[mount.path], _ = self._store.read(
                    str(self._source(mount)),
                    known=self._marks[mount.path],
                    known_since_ns=self._started_ns,
                    ours=True,
                )
        stdout, stderr, combined = (
            self._store.add_file(str(path), ours=True)
            for path in (capture.path(STDOUT), capture.path(STDERR), capture.combined_path)
        )
        root = self._root
        for path, (content, size) in (
            (self._job.redirect_stdout, stdout),
            (self._job.redirect_stderr, stderr),
        ):
            if path:
                file = {"": Entry(stat.S_IFREG | 0o600, content, size, time.time_ns())}
                mounted = self._mount_of(path)
                if mounted is None:
                    root = add_layer(self._session, root, path, file)
                else:
                    inner = path[len(mounted.path) :]
                    after[mounted.path] = trees.put(after[mounted.path], inner, file)
        return Outcome(code, root, after, stdout[0], stderr[0], combined[0])


def add_layer(session: Session, root: Root, path: str, tree: Tree) -> Root:
    """Put a directory or a file into a root, in a layer of its own; blocking."""
    layer = session.new_path("layer")
    make_layer(layer)
    place = root.place(path)
    make_directories(root, layer, posixpath.dirname(place))
    session.store.write(tree, str(layer / place) if place else str(layer))
    return root.with_layer(layer)


def _copy_node(source: Path, target: Path) -> None:
    mode = source.lstat().st_mode
    if stat.S_ISREG(mode) or stat.S_ISLNK(mode):
        shutil.copy2(source, target, follow_symlinks=False)
    else:
        os.link(source, target, follow_symlinks=False)
