"""Containers, as the API has them.

Public methods are the schema's fields, in Python's spelling, and Dagger's reference
says what each is for. A container is a value: every method gives another one, and
nothing runs before something is asked for that only the run can tell.

An `owner` is accepted and changes nothing: whoever a command runs as owns every
file that it is given.
"""

# ruff: noqa: ARG002, D102, PLR0913

import re
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from posixpath import basename, join, normpath
from typing import Any

from graphql import GraphQLError

from moonmind_ext.embedded import tree as trees
from moonmind_ext.embedded.directory import (
    Directory,
    File,
    Node,
    TreeNode,
    find,
    is_type,
    missing,
    new_file,
    read_content,
    there,
)
from moonmind_ext.embedded.execution import (
    CacheMount,
    Exec,
    Mount,
    Outcome,
    SecretMount,
    TempMount,
    TreeMount,
    add_layer,
    execute,
)
from moonmind_ext.embedded.images import LAYERS, ImageError, find_image
from moonmind_ext.embedded.root import Root, make_layer
from moonmind_ext.embedded.session import Lazy, Session, recipe
from moonmind_ext.embedded.tree import Tree, inside

_EXPECTED: dict[str, Callable[[int], bool]] = {
    "SUCCESS": lambda code: code == 0,
    "FAILURE": lambda code: 1 <= code <= 127,  # noqa: PLR2004
    "ANY": lambda code: 0 <= code <= 127 or 192 <= code <= 255,  # noqa: PLR2004
}
"""By `ReturnType`. 128 to 191 are signals, and those are never expected."""


class Secret(Node):
    """A value that is shown to nobody; it is known by its name."""

    def __init__(
        self, session: Session, name: str, read: Callable[[], Awaitable[str]], uri: str = ""
    ) -> None:
        super().__init__(session, f"Secret:{recipe(name, uri)}")
        self._name = name
        self._read = read

    def name(self) -> str:
        return self._name

    async def plaintext(self) -> str:
        return await self._read()


class CacheVolume(Node):
    """A directory that lasts, known by its key."""

    def __init__(self, session: Session, volume: str) -> None:
        super().__init__(session, f"CacheVolume:{recipe(volume)}")
        self.volume = volume


class EnvVariable(Node):
    """A variable's name and value."""

    def __init__(self, session: Session, name: str, value: str) -> None:
        super().__init__(session, f"EnvVariable:{recipe(name, value)}")
        self.name = name
        self.value = value


@dataclass(frozen=True, slots=True)
class _LazyTree:
    """A mount of a directory or a file that is not worked out yet."""

    path: str
    source: TreeNode
    read_only: bool = False

    @property
    def key(self) -> object:
        return self.path, self.source.key, self.read_only


@dataclass(frozen=True, slots=True)
class _LazySecret:
    path: str
    secret: Secret
    mode: int

    @property
    def key(self) -> object:
        return self.path, self.secret.key, self.mode


_LazyMount = _LazyTree | CacheMount | TempMount | _LazySecret


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that a container is.

    Attributes
    ----------
    volatile
        Variables that do not count when the cache is asked.
    ran
        The last exec.
    """

    root: Lazy[Root]
    address: str = ""
    mounts: tuple[_LazyMount, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    secrets: tuple[tuple[str, Secret], ...] = ()
    volatile: tuple[tuple[str, str], ...] = ()
    user: str = ""
    workdir: str = ""
    entrypoint: tuple[str, ...] = ()
    default_args: tuple[str, ...] = ()
    ran: Lazy[Outcome] | None = None

    def key(self) -> str:
        """What the container is by, for the cache: no volatile variable, no secret value."""
        return recipe(
            self.root.key,
            self.address,
            [mount.key for mount in self.mounts],
            self.variables,
            self.secret_keys(),
            self.user,
            self.workdir,
            self.entrypoint,
            self.default_args,
            self.ran and self.ran.key,
        )

    def secret_keys(self) -> list[tuple[str, str]]:
        """What the secret variables are by: their names, never their values."""
        return [(name, secret.key) for name, secret in self.secrets]


async def _scratch() -> Root:
    return Root()


SCRATCH = State(root=Lazy(recipe("scratch"), _scratch))
"""A container of no image."""


class Container(Node):
    """A container."""

    def __init__(self, session: Session, state: State = SCRATCH) -> None:
        super().__init__(session, f"Container:{recipe(state.key(), state.volatile)}")
        self._state = state

    def _with(self, **changes: Any) -> "Container":
        return Container(self.session, replace(self._state, **changes))

    def _path(self, path: str) -> str:
        """Make a path absolute, from the working directory."""
        return normpath(join("/", self._state.workdir, path))

    # What it is.

    def from_(self, address: str) -> "Container":
        try:
            image = find_image(address)
        except ImageError as error:
            raise GraphQLError(str(error)) from error

        async def compute() -> Root:
            base = Root((self.session.base,), host=True)
            if not image.layer:
                return base
            layer = self.session.new_path("layer")
            make_layer(layer)
            await self.session.in_thread(LAYERS[image.layer], base, layer)
            return base.with_layer(layer)

        return self._with(
            root=Lazy(recipe("image", image.layer), compute),
            address=address,
            variables=image.variables(),
            user=image.user,
            workdir=image.workdir,
            entrypoint=image.entrypoint,
            default_args=image.default_args,
            ran=None,
        )

    def image_ref(self) -> str:
        if not self._state.address:
            raise GraphQLError(
                "Image reference can only be retrieved immediately after the 'Container.From' "
                "call. Error in fetching imageRef as the container image is changed"
            )
        return self._state.address

    async def sync(self) -> str:
        if self._state.ran is not None:
            await self.session.get(self._state.ran)
        await self.session.get(self._state.root)
        return self.id()

    # How commands run in it.

    def with_env_variable(self, name: str, value: str, *, expand: bool = False) -> "Container":
        if expand:
            known = dict(self._state.variables)
            value = re.sub(
                r"\$(?:\{(\w+)\}|(\w+))", lambda found: known.get(found[1] or found[2], ""), value
            )
        return self._with(variables=_with_item(self._state.variables, name, value))

    def without_env_variable(self, name: str) -> "Container":
        return self._with(variables=_without_item(self._state.variables, name))

    def env_variable(self, name: str) -> str | None:
        return dict(self._state.variables).get(name)

    def env_variables(self) -> list[EnvVariable]:
        return [EnvVariable(self.session, name, value) for name, value in self._state.variables]

    def with_volatile_variable(self, name: str, value: str) -> "Container":
        return self._with(volatile=_with_item(self._state.volatile, name, value))

    def without_volatile_variable(self, name: str) -> "Container":
        return self._with(volatile=_without_item(self._state.volatile, name))

    def with_secret_variable(self, name: str, secret: str) -> "Container":
        value = Secret.load(self.session, secret)
        return self._with(secrets=_with_item(self._state.secrets, name, value))

    def without_secret_variable(self, name: str) -> "Container":
        return self._with(secrets=_without_item(self._state.secrets, name))

    def with_user(self, name: str) -> "Container":
        return self._with(user=name)

    def user(self) -> str:
        return self._state.user

    def with_workdir(self, path: str) -> "Container":
        return self._with(workdir=self._path(path))

    def workdir(self) -> str:
        return self._state.workdir

    def with_entrypoint(
        self, args: Sequence[str], *, keep_default_args: bool = False
    ) -> "Container":
        default_args = self._state.default_args if keep_default_args else ()
        return self._with(entrypoint=tuple(args), default_args=default_args)

    def entrypoint(self) -> list[str]:
        return list(self._state.entrypoint)

    def with_default_args(self, args: Sequence[str]) -> "Container":
        return self._with(default_args=tuple(args))

    def without_default_args(self) -> "Container":
        return self._with(default_args=())

    def default_args(self) -> list[str]:
        return list(self._state.default_args)

    # What is in it.

    def _mount(self, mount: _LazyMount) -> "Container":
        others = tuple(m for m in self._state.mounts if m.path != mount.path)
        return self._with(mounts=(*others, mount))

    def with_mounted_directory(
        self, path: str, source: str, owner: str = "", *, read_only: bool = False
    ) -> "Container":
        directory = Directory.load(self.session, source)
        return self._mount(_LazyTree(self._path(path), directory, read_only))

    def with_mounted_file(self, path: str, source: str, owner: str = "") -> "Container":
        return self._mount(_LazyTree(self._path(path), File.load(self.session, source)))

    def with_mounted_cache(
        self, path: str, cache: str, sharing: str = "SHARED", owner: str = ""
    ) -> "Container":
        volume = CacheVolume.load(self.session, cache).volume
        return self._mount(CacheMount(self._path(path), volume, alone=sharing != "SHARED"))

    def with_mounted_temp(self, path: str, size: int | None = None) -> "Container":
        return self._mount(TempMount(self._path(path), size))

    def with_mounted_secret(
        self, path: str, source: str, owner: str = "", mode: int = 0o400
    ) -> "Container":
        secret = Secret.load(self.session, source)
        return self._mount(_LazySecret(self._path(path), secret, mode))

    def without_mount(self, path: str) -> "Container":
        gone = self._path(path)
        return self._with(mounts=tuple(m for m in self._state.mounts if m.path != gone))

    def mounts(self) -> list[str]:
        return [mount.path for mount in self._state.mounts]

    def with_directory(
        self,
        path: str,
        source: str,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        *,
        gitignore: bool = False,
        owner: str = "",
    ) -> "Container":
        other = Directory.load(self.session, source).filter(include, exclude, gitignore=gitignore)
        return self._put(path, other)

    def with_file(
        self, path: str, source: str, permissions: int | None = None, owner: str = ""
    ) -> "Container":
        file = File.load(self.session, source)
        if path.endswith("/"):
            path += file.name()
        if permissions is not None:
            mode = stat.S_IFREG | permissions

            async def compute() -> Tree:
                return {"": replace((await file.tree())[""], mode=mode)}

            lazy = Lazy(recipe("mode", mode, file.key), compute)
            return self._put(path, File(self.session, lazy, file.name()))
        return self._put(path, file)

    def with_new_file(
        self, path: str, contents: str, permissions: int = 0o644, owner: str = ""
    ) -> "Container":
        async def compute() -> Tree:
            return await new_file(self.session, contents, permissions)

        lazy = Lazy(recipe("newFile", contents, permissions), compute)
        return self._put(path, File(self.session, lazy, ""))

    def _put(self, path: str, other: TreeNode) -> "Container":
        """Lay something over what is there: in the mount that it is in, or in the root."""
        path = self._path(path)
        mount = self._mount_of(path)
        if mount is None:
            lower = self._state.root

            async def compute_root() -> Root:
                root, tree = await self.session.get(lower), await other.tree()
                return await self.session.in_thread(add_layer, self.session, root, path, tree)

            return self._with(root=Lazy(recipe("put", lower.key, path, other.key), compute_root))
        if not isinstance(mount, _LazyTree):
            raise _no_tree(mount)
        source = mount.source
        inner = path[len(mount.path) :]

        async def compute_tree() -> Tree:
            return trees.put(await source.tree(), inner, await other.tree())

        lazy = Lazy(recipe("put", source.key, inner, other.key), compute_tree)
        changed = replace(mount, source=type(source)(self.session, lazy, source.name()))
        return self._with(mounts=tuple(changed if m is mount else m for m in self._state.mounts))

    def _mount_of(self, path: str) -> _LazyMount | None:
        for mount in reversed(self._state.mounts):
            if path == mount.path or inside(path, mount.path):
                return mount
        return None

    async def exists(
        self,
        path: str,
        expected_type: str | None = None,
        *,
        do_not_follow_symlinks: bool = False,
    ) -> bool:
        path = self._path(path)
        follow = not do_not_follow_symlinks
        mount = self._mount_of(path)
        if isinstance(mount, _LazyTree):
            tree = await mount.source.tree()
            return there(tree, path[len(mount.path) :], expected_type, follow=follow)
        if mount is not None:
            raise _no_tree(mount)
        root = await self.session.get(self._state.root)
        found = root.find(path, follow_last=follow)
        return found is not None and is_type(found.status.st_mode, expected_type)

    def directory(self, path: str) -> Directory:
        lazy = self._read(path, wants_directory=True)
        mount = self._mount_of(self._path(path))
        inner = self._path(path)[len(mount.path) :] if mount else path
        return Directory(self.session, lazy, f"{basename(inner)}/")

    def file(self, path: str) -> File:
        lazy = self._read(path, wants_directory=False)
        return File(self.session, lazy, basename(path))

    def _read(self, path: str, *, wants_directory: bool) -> Lazy[Tree]:
        path = self._path(path)
        mount = self._mount_of(path)
        root = self._state.root

        async def compute() -> Tree:
            if isinstance(mount, _LazyTree):
                tree = await mount.source.tree()
                return find(tree, path[len(mount.path) :], wants_directory=wants_directory)
            if mount is not None:
                raise _no_tree(mount)
            return await self._read_root(await self.session.get(root), path, wants_directory)

        source = mount.source.key if isinstance(mount, _LazyTree) else root.key
        return Lazy(recipe("read", source, mount and mount.path, path, wants_directory), compute)

    async def _read_root(self, root: Root, path: str, wants_directory: bool) -> Tree:
        found = root.find(path)
        if found is None:
            raise missing(path)
        if not found.path and root.host:
            raise GraphQLError(
                "the root of a container is this host's own in the embedded engine, and is not "
                "copied as a whole: name a directory in it"
            )
        try:
            tree = await self.session.in_thread(root.read, found, self.session.store)
        except OSError as error:
            raise GraphQLError(str(error)) from error
        return find(tree, "", wants_directory=wants_directory)

    # What runs in it.

    def with_exec(
        self,
        args: Sequence[str],
        *,
        use_entrypoint: bool = False,
        stdin: str = "",
        redirect_stdin: str = "",
        redirect_stdout: str = "",
        redirect_stderr: str = "",
        expect: str = "SUCCESS",
        experimental_privileged_nesting: bool = False,
        insecure_root_capabilities: bool = False,
    ) -> "Container":
        if experimental_privileged_nesting or insecure_root_capabilities:
            raise GraphQLError(
                "the embedded engine has neither experimentalPrivilegedNesting nor "
                "insecureRootCapabilities; a real Dagger engine has"
            )
        if stdin and redirect_stdin:
            raise GraphQLError("cannot set both stdin and redirectStdin")
        state = self._state
        command = tuple(args) or state.default_args
        if use_entrypoint:
            command = (*state.entrypoint, *command)
        if not command:
            raise GraphQLError("no command has been set")
        redirects = [
            p and self._path(p) for p in (redirect_stdin, redirect_stdout, redirect_stderr)
        ]
        call = (command, stdin, redirects, expect)

        async def compute() -> Outcome:
            root = await self.session.get(state.root)
            mounts = [await _evaluate(mount) for mount in state.mounts]
            secrets = {name: await secret.plaintext() for name, secret in state.secrets}
            job = Exec(
                root=root,
                mounts=tuple(mounts),
                args=command,
                environment=dict((*state.variables, *state.volatile)),
                secrets=secrets,
                user=state.user,
                workdir=state.workdir or "/",
                stdin=stdin,
                redirect_stdin=redirects[0],
                redirect_stdout=redirects[1],
                redirect_stderr=redirects[2],
                expected=_EXPECTED[expect],
            )
            # What is in the mounts counts, not where it came from.
            contents = [
                (mount.path, mount.read_only, await mount.source.tree_digest())
                if isinstance(mount, _LazyTree)
                else mount.key
                for mount in state.mounts
            ]
            same = (root, state.address, contents, state.variables, state.secret_keys(), state.user)
            content = Lazy(
                recipe("run", *same, job.workdir, *call), lambda: execute(self.session, job)
            )
            return await self.session.get(content)

        ran = Lazy(recipe("withExec", state.key(), *call), compute)

        async def root_after() -> Root:
            return (await self.session.get(ran)).root

        return self._with(
            root=Lazy(recipe("rootAfter", ran.key), root_after),
            mounts=tuple(self._mount_after(mount, ran) for mount in state.mounts),
            ran=ran,
        )

    def _mount_after(self, mount: _LazyMount, ran: Lazy[Outcome]) -> _LazyMount:
        if not isinstance(mount, _LazyTree) or mount.read_only:
            return mount

        async def compute() -> Tree:
            return (await self.session.get(ran)).trees[mount.path]

        lazy = Lazy(recipe("mountAfter", ran.key, mount.path), compute)
        return replace(mount, source=type(mount.source)(self.session, lazy, mount.source.name()))

    async def _outcome(self) -> Outcome:
        if self._state.ran is None:
            raise GraphQLError("no command has been set")
        return await self.session.get(self._state.ran)

    async def exit_code(self) -> int:
        return (await self._outcome()).exit_code

    async def stdout(self) -> str:
        return await read_content(self.session, (await self._outcome()).stdout)

    async def stderr(self) -> str:
        return await read_content(self.session, (await self._outcome()).stderr)

    async def combined_output(self) -> str:
        return await read_content(self.session, (await self._outcome()).combined)


async def _evaluate(mount: _LazyMount) -> Mount:
    match mount:
        case _LazyTree():
            return TreeMount(mount.path, await mount.source.tree(), mount.read_only)
        case _LazySecret():
            return SecretMount(mount.path, await mount.secret.plaintext(), mount.mode)
        case _:
            return mount


def _no_tree(mount: _LazyMount) -> GraphQLError:
    kinds = {TempMount: "tmpfs", CacheMount: "cache", _LazySecret: "secret"}
    return GraphQLError(f"{mount.path}: cannot retrieve path from {kinds[type(mount)]}")


def _with_item(items: tuple[tuple[str, Any], ...], name: str, value: object) -> tuple[Any, ...]:
    return (*_without_item(items, name), (name, value))


def _without_item(items: tuple[tuple[str, Any], ...], name: str) -> tuple[Any, ...]:
    return tuple(item for item in items if item[0] != name)
