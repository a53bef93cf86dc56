"""Where every query begins, and this host.

Public methods are the schema's fields, in Python's spelling, and Dagger's reference
says what each is for.
"""

# ruff: noqa: D102

import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from graphql import GraphQLError

from moonmind_ext.embedded import tree as trees
from moonmind_ext.embedded.container import CacheVolume, Container, Secret
from moonmind_ext.embedded.directory import (
    Directory,
    File,
    Node,
    host_path,
    load,
    missing,
    new_file,
)
from moonmind_ext.embedded.filters import Filter
from moonmind_ext.embedded.session import Lazy, Session, recipe
from moonmind_ext.embedded.tree import Tree

VERSION = "v0.21.8"
"""Of the engine whose behaviour this one has."""


class Host(Node):
    """The host that the engine runs on."""

    def __init__(self, session: Session) -> None:
        super().__init__(session, "Host:")

    async def directory(
        self,
        path: str,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        *,
        gitignore: bool = False,
        no_cache: bool = False,
    ) -> Directory:
        wanted = Filter(tuple(include), tuple(exclude), gitignore)
        place = host_path(path)
        if not place.is_dir():
            raise missing(path)

        async def compute() -> Tree:
            return await self._read(place, wanted)

        lazy = Lazy(_key("hostDirectory", place, wanted, no_cache), compute)
        await self.session.get(lazy)
        return Directory(self.session, lazy)

    async def _read(self, place: Path, wanted: Filter) -> Tree:
        """Read a directory; what has not changed since the last time is not read again."""
        known, since = self.session.host_directories.get(str(place), ({}, 0))
        now = time.time_ns()
        try:
            tree, seen = await self.session.in_thread(
                self.session.store.read, str(place), wanted, known=known, known_since_ns=since
            )
        except OSError as error:
            raise GraphQLError(str(error)) from error
        self.session.host_directories[str(place)] = (seen, now)
        return tree

    async def file(self, path: str, *, no_cache: bool = False) -> File:
        place = host_path(path)
        if not place.is_file():
            raise missing(path)

        async def compute() -> Tree:
            try:
                return (await self.session.in_thread(self.session.store.read, str(place)))[0]
            except OSError as error:
                raise GraphQLError(str(error)) from error

        lazy = Lazy(_key("hostFile", place, None, no_cache), compute)
        await self.session.get(lazy)
        return File(self.session, lazy, place.name)


def _key(operation: str, place: Path, wanted: Filter | None, no_cache: bool) -> str:
    """Without cache no two reads are the same."""
    return recipe(operation, place, wanted, secrets.token_hex() if no_cache else "")


class Query:
    """The root of the schema."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def version(self) -> str:
        return VERSION

    def container(self) -> Container:
        return Container(self._session)

    def directory(self) -> Directory:
        async def compute() -> Tree:
            return {"": trees.directory()}

        return Directory(self._session, Lazy(recipe("empty"), compute))

    def file(self, name: str, contents: str, permissions: int = 0o644) -> File:
        if "/" in name:
            raise GraphQLError(f'file name "{name}" must not contain a directory')

        async def compute() -> Tree:
            return await new_file(self._session, contents, permissions)

        return File(self._session, Lazy(recipe("newFile", contents, permissions), compute), name)

    def host(self) -> Host:
        return Host(self._session)

    def cache_volume(self, key: str) -> CacheVolume:
        return CacheVolume(self._session, key)

    def set_secret(self, name: str, plaintext: str) -> Secret:
        async def read() -> str:
            return plaintext

        return Secret(self._session, name, read)

    def secret(self, uri: str) -> Secret:
        scheme, _, place = uri.partition("://")

        async def read() -> str:
            try:
                if scheme == "env":
                    return os.environ[place]
                return await self._session.in_thread(host_path(place).read_text)
            except KeyError:
                raise GraphQLError(f'secret env var not found: "{place[:3]}..."') from None
            except (OSError, ValueError) as error:
                raise GraphQLError(f"secret {uri}: {type(error).__name__}") from error

        if scheme not in {"env", "file"}:
            raise GraphQLError(
                f"the embedded engine has no secrets from {scheme}://; a real Dagger engine has"
            )
        return Secret(self._session, "", read, uri)

    def node(self, id: str) -> object:  # noqa: A002
        return load(self._session, id)
