"""A workspace and a container's copy of it, as directories, without an engine."""

import os
import shutil
import stat
from collections.abc import Callable, Collection
from pathlib import Path

from moonmind_ext.workspace.changes import Sides, apply_changes, list_arrived
from moonmind_ext.workspace.journal import Staging
from moonmind_ext.workspace.manifest import look
from moonmind_ext.workspace.names import Names
from pipelines.report import WrittenBack


def listing(root: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a directory: types, modes, contents and the targets of links."""
    found: dict[str, tuple[int, bytes]] = {}
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            content = b""
            if stat.S_ISLNK(mode):
                content = os.fsencode(os.readlink(path))
            elif stat.S_ISREG(mode):
                content = path.read_bytes()
            found[os.fspath(path.relative_to(root))] = (mode, content)
    return found


def names_of(root: Path) -> Names:
    """What the supervisor's list says."""
    found: dict[str, bool] = {}
    for folder, folders, names in os.walk(root):
        inside = os.path.relpath(folder, root)
        for name in (*folders, *names):
            path = Path(folder, name)
            is_directory = name != ".git" and path.is_dir() and not path.is_symlink()
            found[os.path.normpath(f"{inside}/{name}")] = is_directory
        if ".git" in folders:
            folders.remove(".git")
    return Names(found, frozenset())


class Desk:
    """Begins with the workspace as it is sent.

    Attributes
    ----------
    container
        A copy of it, for a test to change; all of it arrives as if it was touched.
    """

    def __init__(self, workspace: Path, *, left_out: Collection[str] = ()) -> None:
        self.workspace = workspace
        self.container = workspace.with_name(f"{workspace.name}-container")
        shutil.copytree(workspace, self.container, symlinks=True)
        for path in left_out:
            inner = self.container / path
            shutil.rmtree(inner) if inner.is_dir() else inner.unlink()
        self.before = names_of(self.container)
        self.stamps = look(workspace)

    def sides(self, after: Names) -> Sides:
        return Sides(
            stamps=self.stamps,
            was_sent=lambda path, is_directory: self.before.directories.get(path) == is_directory,
            before=self.before,
            after=after,
        )

    def back(
        self,
        after_step: Callable[[], None] = lambda: None,
        *,
        after: Names | None = None,
        unchanged: Collection[str] = (),
    ) -> WrittenBack:
        """Write the changes back."""
        staging = Staging.make(self.workspace, after_step)
        try:
            ignore = shutil.ignore_patterns(".git")
            shutil.copytree(self.container, staging.changes, symlinks=True, ignore=ignore)
            after_step()
            sides = self.sides(names_of(self.container) if after is None else after)
            arrived = list_arrived(staging.changes)
            return apply_changes(staging, arrived, sides, unchanged=unchanged)
        finally:
            staging.close()
