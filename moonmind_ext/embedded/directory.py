"""Directories, files and changesets, as the API has them.

Public methods are the schema's fields, in Python's spelling, and Dagger's reference
says what each is for. An object is a recipe: it is worked out when somebody asks for
something that needs it.

An `owner` is accepted and changes nothing: whoever a command runs as owns every
file that it is given.
"""

# ruff: noqa: ARG002, D102

import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from posixpath import basename
from typing import Self

from graphql import GraphQLError

from moonmind_ext.embedded import filters
from moonmind_ext.embedded import tree as trees
from moonmind_ext.embedded.filters import Filter
from moonmind_ext.embedded.output import read_text
from moonmind_ext.embedded.session import Lazy, Session, recipe
from moonmind_ext.embedded.store import remove
from moonmind_ext.embedded.tree import Changes, Entry, Tree

_TYPES = {
    "REGULAR_TYPE": stat.S_ISREG,
    "DIRECTORY_TYPE": stat.S_ISDIR,
    "SYMLINK_TYPE": stat.S_ISLNK,
}
_NAMES = {stat.S_IFREG: "REGULAR", stat.S_IFDIR: "DIRECTORY", stat.S_IFLNK: "SYMLINK"}


class Node:
    """Whatever has an id."""

    def __init__(self, session: Session, key: str) -> None:
        self.session = session
        self.key = key

    def id(self) -> str:
        """Give the id, and remember what it stands for."""
        self.session.keep(self.key, self)
        return self.key

    @classmethod
    def load(cls, session: Session, key: str) -> Self:
        """Give the object that an argument names by its id."""
        thing = load(session, key)
        if not isinstance(thing, cls):
            raise GraphQLError(f"expected the id of a {cls.__name__}, got a {type(thing).__name__}")
        return thing


def load(session: Session, key: str) -> object:
    """Give the object of any id."""
    try:
        return session.load(key)
    except KeyError:
        raise GraphQLError(f"no object in this session has the id {key!r}") from None


def missing(path: str) -> GraphQLError:
    """Say that a path leads nowhere, as a real engine does."""
    return GraphQLError(f"stat {path}: no such file or directory")


def find(tree: Tree, path: str, *, wants_directory: bool) -> Tree:
    """Take a directory or a file out of a tree."""
    key = trees.resolve(tree, path)
    if key is None:
        raise missing(path)
    if tree[key].is_directory != wants_directory:
        kinds = ("a file", "a directory") if wants_directory else ("a directory", "a file")
        raise GraphQLError(f"path {path} is {kinds[0]}, not {kinds[1]}")
    return trees.subtree(tree, key)


def there(tree: Tree, path: str, expected_type: str | None, *, follow: bool) -> bool:
    """Answer `exists`."""
    key = trees.resolve(tree, path, follow_last=follow)
    return key is not None and is_type(tree[key].mode, expected_type)


def is_type(mode: int, expected_type: str | None) -> bool:
    """Whether a node is of an `ExistsType`."""
    return expected_type is None or bool(_TYPES[expected_type](mode))


class Stat(Node):
    """What is known of one path."""

    def __init__(self, session: Session, key: str, name: str, entry: Entry) -> None:
        super().__init__(session, key)
        self.name = name
        self.size = entry.size
        self.permissions = stat.S_IMODE(entry.mode)
        self.file_type = _NAMES.get(stat.S_IFMT(entry.mode), "UNKNOWN")


class TreeNode(Node):
    """A directory or a file."""

    def __init__(self, session: Session, lazy: Lazy[Tree], name: str) -> None:
        super().__init__(session, f"{type(self).__name__}:{lazy.key}")
        self.lazy = lazy
        self._name = name

    async def tree(self) -> Tree:
        """Work it out."""
        return await self.session.get(self.lazy)

    async def sync(self) -> str:
        """Work it out; give the id."""
        await self.tree()
        return self.id()

    async def tree_digest(self) -> str:
        """Give the digest of what it is, whatever it is made of."""

        async def compute() -> str:
            return await self.session.in_thread(trees.digest, await self.tree())

        return await self.session.get(Lazy(f"digest:{self.lazy.key}", compute))

    def name(self) -> str:
        return self._name

    async def _write(self, target: Path) -> None:
        tree = await self.tree()
        try:
            await self.session.in_thread(self.session.store.write, tree, str(target))
        except OSError as error:
            raise GraphQLError(f"export to {target}: {error}") from error


class Directory(TreeNode):
    """A directory."""

    def __init__(self, session: Session, lazy: Lazy[Tree], name: str = "/") -> None:
        super().__init__(session, lazy, name)

    def _change(
        self, operation: tuple[object, ...], change: Callable[[Tree], Awaitable[Tree]]
    ) -> "Directory":
        """Make the directory that a change of this one gives."""

        async def compute() -> Tree:
            return await change(await self.tree())

        return Directory(self.session, Lazy(recipe(*operation, self.lazy.key), compute))

    def _put(
        self, operation: str, path: str, key: object, other: Callable[[], Awaitable[Tree]]
    ) -> "Directory":
        async def change(tree: Tree) -> Tree:
            return trees.put(tree, path, await other())

        return self._change((operation, path, key), change)

    async def entries(self, path: str = "") -> list[str]:
        tree = await self.tree()
        key = trees.resolve(tree, path)
        if key is None:
            raise GraphQLError(f"open {path}: no such file or directory")
        if not tree[key].is_directory:
            raise GraphQLError(f"open {path}: not a directory")
        return trees.listing(tree, key)

    async def glob(self, pattern: str) -> list[str]:
        return trees.glob(await self.tree(), pattern)

    async def exists(
        self,
        path: str,
        expected_type: str | None = None,
        *,
        do_not_follow_symlinks: bool = False,
    ) -> bool:
        return there(await self.tree(), path, expected_type, follow=not do_not_follow_symlinks)

    async def stat(self, path: str, *, do_not_follow_symlinks: bool = False) -> Stat:
        tree = await self.tree()
        key = trees.resolve(tree, path, follow_last=not do_not_follow_symlinks)
        if key is None:
            raise missing(path)
        return Stat(self.session, f"Stat:{self.key}:{key}", basename(key), tree[key])

    async def digest(self) -> str:
        return await self.tree_digest()

    def directory(self, path: str) -> "Directory":
        async def compute() -> Tree:
            return find(await self.tree(), path, wants_directory=True)

        lazy = Lazy(recipe("directory", path, self.lazy.key), compute)
        return Directory(self.session, lazy, f"{basename(trees.relative(path))}/")

    async def file(self, path: str) -> "File":
        async def compute() -> Tree:
            return find(await self.tree(), path, wants_directory=False)

        lazy = Lazy(recipe("file", path, self.lazy.key), compute)
        await self.session.get(lazy)
        return File(self.session, lazy, basename(path))

    def with_directory(
        self,
        path: str,
        source: str,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        *,
        gitignore: bool = False,
        owner: str = "",
    ) -> "Directory":
        other = Directory.load(self.session, source).filter(include, exclude, gitignore=gitignore)
        return self._put("withDirectory", path, other.key, other.tree)

    def with_file(
        self, path: str, source: str, permissions: int | None = None, owner: str = ""
    ) -> "Directory":
        file = File.load(self.session, source)

        async def other() -> Tree:
            entry = (await file.tree())[""]
            if permissions is not None:
                entry = replace(entry, mode=stat.S_IFREG | permissions)
            return {"": entry}

        # Into a directory it goes under its own name.
        target = path + file.name() if path.endswith("/") else path
        return self._put("withFile", target, (file.key, permissions), other)

    def with_new_file(self, path: str, contents: str, permissions: int = 0o644) -> "Directory":
        async def other() -> Tree:
            return await new_file(self.session, contents, permissions)

        return self._put("withNewFile", path, (contents, permissions), other)

    def with_new_directory(self, path: str, permissions: int = 0o644) -> "Directory":
        async def other() -> Tree:
            return {"": trees.directory(permissions)}

        return self._put("withNewDirectory", path, permissions, other)

    def with_symlink(self, target: str, link_name: str) -> "Directory":
        async def other() -> Tree:
            return {"": Entry(stat.S_IFLNK | 0o777, target)}

        return self._put("withSymlink", link_name, target, other)

    def without_directory(self, path: str) -> "Directory":
        return self.without_files([path])

    def without_file(self, path: str) -> "Directory":
        return self.without_files([path])

    def without_files(self, paths: Sequence[str]) -> "Directory":
        async def change(tree: Tree) -> Tree:
            exact = {trees.relative(path) for path in paths}
            patterns = [path for path in exact if path not in tree]
            matching = [
                found.rstrip("/") for pattern in patterns for found in trees.glob(tree, pattern)
            ]
            return trees.without(tree, exact.union(matching) - {""})

        return self._change(("without", *paths), change)

    def filter(
        self, include: Sequence[str] = (), exclude: Sequence[str] = (), *, gitignore: bool = False
    ) -> "Directory":
        wanted = Filter(tuple(include), tuple(exclude), gitignore)
        if wanted.takes_all:
            return self

        async def change(tree: Tree) -> Tree:
            texts = {
                path: self.session.store.path(entry.content)
                for path, entry in tree.items()
                if entry.is_file and basename(path) == filters.GITIGNORE
            }
            read = {path: Path(place).read_text(errors="replace") for path, place in texts.items()}
            return filters.apply(tree, wanted, read)

        return self._change(("filter", wanted), change)

    def with_timestamps(self, timestamp: int) -> "Directory":
        async def change(tree: Tree) -> Tree:
            time_ns = timestamp * 1_000_000_000
            return {path: replace(entry, mtime_ns=time_ns) for path, entry in tree.items()}

        return self._change(("withTimestamps", timestamp), change)

    def changes(self, from_: str) -> "Changeset":
        return Changeset(self.session, Directory.load(self.session, from_), self)

    def diff(self, other: str) -> "Directory":
        return Changeset(self.session, self, Directory.load(self.session, other)).layer()

    async def export(self, path: str, *, wipe: bool = False) -> str:
        target = Path.cwd() / path
        if wipe:
            await self.session.in_thread(remove, str(target))
        await self.session.in_thread(target.parent.mkdir, parents=True, exist_ok=True)
        await self._write(target)
        return str(target)


class File(TreeNode):
    """A file: a tree whose root it is."""

    async def _entry(self) -> Entry:
        return (await self.tree())[""]

    async def contents(self, offset_lines: int = 0, limit_lines: int | None = None) -> str:
        entry = await self._entry()
        text = await read_content(self.session, entry.content)
        if not offset_lines and limit_lines is None:
            return text
        lines = text.splitlines(keepends=True)[offset_lines:]
        return "".join(lines[:limit_lines])

    async def size(self) -> int:
        return (await self._entry()).size

    async def digest(self, *, exclude_metadata: bool = False) -> str:
        if exclude_metadata:
            return f"sha256:{(await self._entry()).content}"
        return await self.tree_digest()

    async def stat(self) -> Stat:
        return Stat(self.session, f"Stat:{self.key}", self._name, await self._entry())

    async def export(self, path: str, *, allow_parent_dir_path: bool = False) -> str:
        given = target = Path.cwd() / path
        if target.is_dir() and not target.is_symlink():
            if not allow_parent_dir_path:
                raise GraphQLError(
                    f'destination "{target}" is a directory; must be a file path unless '
                    "allowParentDirPath is set"
                )
            target /= self._name
        await self.session.in_thread(target.parent.mkdir, parents=True, exist_ok=True)
        await self._write(target)
        return str(given)


class Changeset(Node):
    """How one directory became another."""

    def __init__(self, session: Session, before: Directory, after: Directory) -> None:
        super().__init__(session, f"Changeset:{recipe(before.key, after.key)}")
        self._before = before
        self._after = after

    async def _changes(self) -> Changes:
        async def compute() -> Changes:
            return trees.changes(await self._before.tree(), await self._after.tree())

        return await self.session.get(Lazy(self.key, compute))

    def before(self) -> Directory:
        return self._before

    def after(self) -> Directory:
        return self._after

    async def sync(self) -> str:
        await self._changes()
        return self.id()

    async def added_paths(self) -> list[str]:
        return (await self._changes()).added

    async def modified_paths(self) -> list[str]:
        return (await self._changes()).modified

    async def removed_paths(self) -> list[str]:
        return (await self._changes()).removed

    async def is_empty(self) -> bool:
        found = await self._changes()
        return not (found.added or found.modified or found.removed)

    def layer(self) -> Directory:
        async def compute() -> Tree:
            return trees.layer(await self._before.tree(), await self._after.tree())

        return Directory(self.session, Lazy(recipe("layer", self.key), compute))

    async def export(self, path: str) -> str:
        target = Path.cwd() / path
        gone = (await self._changes()).removed
        layer = await self.layer().tree()

        def remove_and_write() -> None:
            for name in gone:
                place = target / name.rstrip("/")
                if place.is_dir() and not place.is_symlink():
                    remove(str(place))
                else:
                    place.unlink(missing_ok=True)
            target.mkdir(parents=True, exist_ok=True)
            self.session.store.write(layer, str(target))

        try:
            await self.session.in_thread(remove_and_write)
        except OSError as error:
            raise GraphQLError(f"export to {target}: {error}") from error
        return str(target)


async def new_file(session: Session, contents: str, permissions: int) -> Tree:
    """Make a file of a string."""
    data = contents.encode(errors="surrogateescape")
    content = await session.in_thread(session.store.add_bytes, data)
    return {"": Entry(stat.S_IFREG | permissions, content, len(data), trees.directory().mtime_ns)}


async def read_content(session: Session, content: str) -> str:
    """Give the bytes of a digest as text."""
    try:
        return await session.in_thread(read_text, Path(session.store.path(content)))
    except ValueError as error:
        raise GraphQLError(str(error)) from error


def host_path(path: str) -> Path:
    """Make a path of this host absolute, links followed."""
    return Path(os.path.realpath(Path.cwd() / Path(path).expanduser()))
