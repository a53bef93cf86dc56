import os
from pathlib import Path
from typing import Any

import dagger
import gql
import pytest
from dagger._exceptions import QueryErrorValue

from moonmind_ext.workspace.errors import WorkspaceError
from moonmind_ext.workspace.manifest import look
from moonmind_ext.workspace.send import send_workspace
from pipelines.payload import WorkspaceFilter
from tests.workspace.support import as_ordinary_user


class Client:
    """An engine's, whose every host directory is sent, or fails with a message."""

    def __init__(self, problem: str | None) -> None:
        self.problem = problem

    def host(self) -> "Client":
        return self

    def directory(self, path: str, **chosen: object) -> "Client":
        return self

    async def sync(self) -> "Client":
        if self.problem is not None:
            request = gql.GraphQLRequest("{ version }")
            raise dagger.QueryError([QueryErrorValue(self.problem)], request)
        return self


ANY_CLIENT: Any = Client(None)


async def test_a_workspace_is_measured_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("12345")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "b").write_text("123")
    (tmp_path / "loop").symlink_to(tmp_path)

    _, size = await send_workspace(ANY_CLIENT, tmp_path, WorkspaceFilter())

    assert size.files == 3
    assert size.bytes == 8 + len(os.fspath(tmp_path))


async def test_an_empty_workspace_has_no_files(tmp_path: Path) -> None:
    _, size = await send_workspace(ANY_CLIENT, tmp_path, WorkspaceFilter())

    assert (size.files, size.bytes) == (0, 0)


def test_what_is_no_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="missing"):
        look(tmp_path / "missing")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    printed = as_ordinary_user(
        tmp_path,
        "moonmind_ext.workspace.manifest",
        """
        Path("private").write_text("x")
        Path("private").chmod(0)
        try: look(Path.cwd())
        except WorkspaceError as error: print(error)
        """,
    )

    assert "private: cannot be read" in printed


@pytest.mark.parametrize(
    "message",
    [
        # The embedded engine's, and a real one's.
        "[Errno 13] Permission denied: '/w/private'",
        "failed to sync: error from sender: open /w/private: permission denied",
    ],
)
async def test_where_a_filter_chooses_the_engine_finds_what_cannot_be_read(
    tmp_path: Path, message: str
) -> None:
    client: Any = Client(message)
    with pytest.raises(WorkspaceError, match="/w/private"):
        await send_workspace(client, tmp_path, WorkspaceFilter(exclude=["other"]))


async def test_any_other_failure_while_sending_is_the_engines(tmp_path: Path) -> None:
    client: Any = Client("no space left on device")
    with pytest.raises(dagger.QueryError):
        await send_workspace(client, tmp_path, WorkspaceFilter())


async def test_where_a_filter_chooses_nothing_is_measured(tmp_path: Path) -> None:
    _, size = await send_workspace(ANY_CLIENT, tmp_path, WorkspaceFilter(gitignore=True))

    assert size.files is None
    assert size.bytes is None


def test_what_is_left_out_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "big").write_text("12345")
    (tmp_path / "a").write_text("1")

    assert set(look(tmp_path, {"out"})) == {"", "a"}
