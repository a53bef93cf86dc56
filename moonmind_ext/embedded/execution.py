"""One exec: from what a container is to what it is afterwards."""

import fcntl
import os
import shutil
import stat
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
from graphql import GraphQLError

from moonmind_ext.embedded import tree as trees
from moonmind_ext.embedded.output import STDERR, STDOUT, Capture
from moonmind_ext.embedded.process import Command, SandboxError
from moonmind_ext.embedded.root import Root, flatten, make_directories
from moonmind_ext.embedded.sandbox import (
    Identity,
    assembled_root,
    find_identity,
    host_mounts,
    overlay_root,
)
from moonmind_ext.embedded.session import Session
from moonmind_ext.embedded.store import Known, remove
from moonmind_ext.embedded.tree import Entry, Tree, inside, relative

MAX_LAYERS = 24
"""Then they are made one: the options of an overlay mount must fit into a page."""

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


@dataclass(frozen=True, slots=True)
class TempMount:
    """An empty directory in memory."""

    path: str
    size: int | None = None


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
        self, args: tuple[str, ...], code: int, stdout: str = "", stderr: str = "", message: str = ""
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
        except SandboxError as error:
            raise GraphQLError(f"{error}: {capture.end(STDERR)}") from error
        except OSError as error:
            raise GraphQLError(f"running the command: {error}") from error
        finally:
            log.finish()
        if not job.expected(code):
            raise ExecError(job.args, code, capture.end(STDOUT), capture.end(STDERR))
        return await session.in_thread(stage.collect, capture, code)


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
        self._root = job.root
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
        except KeyError as error:
            raise ExecError(job.args, -1, message=f"get user: {error.args[0]}") from error
        for redirect in (job.redirect_stdout, job.redirect_stderr):
            self._check_redirect(redirect)
        mounts = [self._mount(index, mount) for index, mount in enumerate(job.mounts)]
        self.stdin = self._open_stdin()
        root = self._prepare_root(sandbox.overlay)
        self._make_workdir()
        self.options = sandbox.options(
            root=root,
            mounts=[*host_mounts(), *mounts] if sandbox.overlay and job.root.host else mounts,
            identity=identity,
            workdir=job.workdir,
            environment=self._environment(identity),
        )
        self._started_ns = time.time_ns()

    def _environment(self, identity: Identity) -> dict[str, str]:
        return {"HOME": identity.home, **self._job.environment, **self._job.secrets}

    def _mount(self, index: int, mount: Mount) -> list[str]:
        """Make what a mount shows; give its options."""
        place = self._mount_point(mount)
        match mount:
            case TreeMount():
                source = str(self._source(index))
                self._marks[mount.path] = self._store.write(mount.tree, source, mark=True)
                return ["--ro-bind" if mount.read_only else "--bind", source, place]
            case CacheMount():
                return ["--bind", str(self._session.volume(mount.volume)), place]
            case TempMount():
                size = ["--size", str(mount.size)] if mount.size else []
                return [*size, "--perms", "1777", "--tmpfs", place]
            case SecretMount():
                data = self._memory_file("secret", mount.plaintext)
                self.descriptors.append(data)
                return ["--perms", f"{mount.mode:o}", "--ro-bind-data", str(data), place]

    def _source(self, index: int) -> Path:
        return self._folder / f"mount-{index}"

    def _mount_point(self, mount: Mount) -> str:
        """Where a mount goes; bubblewrap does not follow links on the way."""
        if self._mount_of(mount.path, but=mount) is not None:
            return mount.path
        return "/" + self._job.root.place(mount.path)

    def _mount_of(self, path: str, *, but: Mount | None = None) -> tuple[int, Mount] | None:
        """Find the mount that a path is in: the last one that covers it."""
        for index, mount in reversed(list(enumerate(self._job.mounts))):
            if mount is not but and (path == mount.path or inside(path, mount.path)):
                return index, mount
        return None

    def _memory_file(self, name: str, text: str) -> int:
        """Keep text where no disk sees it; it is read from the beginning."""
        descriptor = os.memfd_create(name)
        self._closing.callback(os.close, descriptor)
        with open(descriptor, "wb", closefd=False) as file:  # noqa: PTH123
            file.write(text.encode(errors="surrogateescape"))
        os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor

    def _open_stdin(self) -> int:
        path = self._job.redirect_stdin
        if not path:
            return self._memory_file("stdin", self._job.stdin)
        source = self._find_file(path)
        if source is None:
            raise ExecError(
                self._job.args, -1, message=f"open redirect stdin file: {path}: no such file"
            )
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
        mount = mounted[1]
        if not isinstance(mount, TreeMount):
            return None
        key = trees.resolve(mount.tree, path[len(mount.path) :])
        if key is None or not mount.tree[key].is_file:
            return None
        return self._store.path(mount.tree[key].content)

    def _check_redirect(self, path: str) -> None:
        """See before the command runs that its output has a place to go."""
        if not path:
            return
        parent = os.path.dirname(path)  # noqa: PTH120
        mounted = self._mount_of(path)
        if mounted is None:
            there = self._job.root.find(parent) is not None
        else:
            mount = mounted[1]
            there = (
                isinstance(mount, TreeMount)
                and not mount.read_only
                and trees.resolve(mount.tree, parent[len(mount.path) :]) is not None
            )
        if not there:
            raise ExecError(
                self._job.args,
                -1,
                message=f"open redirect file: open {path}: no such file or directory",
            )

    def _prepare_root(self, overlay: bool) -> list[str]:
        """Make the layer that is written to; give the options for the root."""
        job = self._job
        self._upper.mkdir()
        self._upper.chmod(0o755)
        points = {
            self._mount_point(mount): isinstance(mount, SecretMount)
            or (isinstance(mount, TreeMount) and not mount.tree[""].is_directory)
            for mount in job.mounts
            if self._mount_of(mount.path, but=mount) is None
        }
        if not overlay:
            flatten(self._root.layers, self._upper, _copy_node)
            self._root = Root((self._upper,), job.root.host)
            return assembled_root(self._root, self._upper, map(relative, points))
        if len(self._root.layers) > MAX_LAYERS:
            flat = self._session.new_path("layer")
            flat.mkdir()
            flatten(self._root.layers, flat, _link_node)
            self._root = Root((flat,), job.root.host)
        # Mount points are made in a layer that goes away with the mounts.
        stubs = self._folder / "stubs"
        stubs.mkdir()
        for point, is_file in {"/proc": False, "/dev": False, "/sys": False, **points}.items():
            path = relative(point)
            if self._root.find(path) is not None:
                continue
            make_directories(self._root, stubs, os.path.dirname(path))  # noqa: PTH120
            if is_file:
                (stubs / path).touch()
            else:
                make_directories(self._root, stubs, path)
        for (_, _, path) in host_mounts() if job.root.host else []:
            if self._root.find(path) is None:
                make_directories(self._root, stubs, os.path.dirname(relative(path)))  # noqa: PTH120
                (stubs / relative(path)).touch()
        work = self._folder / "work"
        work.mkdir()
        return overlay_root(self._root.with_layer(stubs), self._upper, work)

    def _make_workdir(self) -> None:
        path = self._job.workdir
        mounted = self._mount_of(path)
        if mounted is None:
            if self._root.find(path) is None:
                make_directories(self._root, self._upper, self._root.place(path))
            return
        index, mount = mounted
        match mount:
            case TreeMount():
                if trees.resolve(mount.tree, path[len(mount.path) :]) is None:
                    place = self._source(index) / relative(path[len(mount.path) :])
                    place.mkdir(parents=True, exist_ok=True)
            case CacheMount():
                place = self._session.volume(mount.volume) / relative(path[len(mount.path) :])
                place.mkdir(parents=True, exist_ok=True)

    def collect(self, capture: Capture, code: int) -> Outcome:
        """Take in what the command left."""
        after: dict[str, Tree] = {}
        for index, mount in enumerate(self._job.mounts):
            if isinstance(mount, TreeMount) and not mount.read_only:
                after[mount.path], _ = self._store.read(
                    str(self._source(index)),
                    known=self._marks[mount.path],
                    known_since_ns=self._started_ns,
                    ours=True,
                )
        root = self._root
        if self._session.sandbox.overlay:
            if any(self._upper.iterdir()):
                root = root.with_layer(self._upper)
            else:
                self._upper.rmdir()
        stdout, stderr, combined = (
            self._store.add_file(str(path), ours=True)
            for path in (capture.path(STDOUT), capture.path(STDERR), capture.combined_path)
        )
        for path, (content, size) in (
            (self._job.redirect_stdout, stdout),
            (self._job.redirect_stderr, stderr),
        ):
            if path:
                root = self._redirect(path, content, size, root, after)
        return Outcome(code, root, after, stdout[0], stderr[0], combined[0])

    def _redirect(
        self, path: str, content: str, size: int, root: Root, after: dict[str, Tree]
    ) -> Root:
        """Put the output where it was asked for, as a file that only its user reads."""
        file: Tree = {"": Entry(stat.S_IFREG | 0o600, content, size, self._started_ns)}
        mounted = self._mount_of(path)
        if mounted is not None:
            mount = mounted[1]
            after[mount.path] = trees.put(after[mount.path], path[len(mount.path) :], file)
            return root
        return add_layer(self._session, root, path, file)


def add_layer(session: Session, root: Root, path: str, tree: Tree) -> Root:
    """Put a directory or a file into a root, in a layer of its own; blocking."""
    layer = session.new_path("layer")
    layer.mkdir()
    layer.chmod(0o755)
    place = root.place(path)
    make_directories(root, layer, os.path.dirname(place))  # noqa: PTH120
    session.store.write(tree, str(layer / place) if place else str(layer))
    return root.with_layer(layer)


def _link_node(source: Path, target: Path) -> None:
    os.link(source, target, follow_symlinks=False)


def _copy_node(source: Path, target: Path) -> None:
    mode = source.lstat().st_mode
    if stat.S_ISREG(mode) or stat.S_ISLNK(mode):
        shutil.copy2(source, target, follow_symlinks=False)
    else:
        _link_node(source, target)
