"""Where a workspace stands in its repository.

Asked without running anything of the workspace's: its `.git/config` and
`.gitattributes` may name programs (filters, a file system monitor, hooks, the
transport of a partial clone). Commit and branch are read from files alone. Its state
takes more, so that is asked through a git directory of our own, with an empty
configuration, which shares the objects and the index. What the user's and the
system's configuration say does count, their filters (Git LFS) too.
"""

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import anyio

from pipelines.artifacts import readable
from pipelines.concurrency import together
from pipelines.report import Source

GIT_SECONDS = 10
"""For each question. A status of 20,000 files takes a tenth of a second."""

SAFE_GIT = (
    "git",
    *("-c", "core.fsmonitor=false"),
    *("-c", "core.hooksPath=/dev/null"),
    "--no-optional-locks",
)


async def read_source(workspace: Path, repository: str) -> Source:
    """Ask git for commit, branch and state; what it does not say is None.

    The state is None too for repositories that git does not understand without their
    configuration: SHA-256, split indexes, objects that a partial clone left out.
    """
    # Named, so that it is not one of a repository around the workspace. And for one
    # that is named git does not ask whose it is: root runs on others' checkouts. That
    # question protects from the programs in a configuration, of which none is run.
    git_dir = workspace / ".git"
    if not git_dir.exists():
        return Source(repository=repository)
    commit, branch, dirty = await together(
        _ask(git_dir, "rev-parse", "--verify", "HEAD"),
        _ask(git_dir, "symbolic-ref", "--short", "--quiet", "HEAD"),
        _is_dirty(workspace, git_dir),
    )
    if commit is None:
        return Source(repository=repository)
    return Source(
        repository=repository,
        commit=commit,
        branch=None if branch is None else readable(branch),
        dirty=dirty,
    )


async def _is_dirty(workspace: Path, git_dir: Path) -> bool | None:
    names = [argument for name in ("objects", "index", "info") for argument in ("--git-path", name)]
    answer = await _ask(git_dir, "rev-parse", "HEAD", "--path-format=absolute", *names)
    # More lines are a path with a line break in it.
    if answer is None or answer.count("\n") != len(names) // 2:
        return None
    commit, objects, index, info = answer.split("\n")
    try:
        with tempfile.TemporaryDirectory(prefix="moonmind-git-") as folder:
            own = Path(folder)
            (own / "refs").mkdir()
            (own / "HEAD").write_text(f"{commit}\n")
            # What is to be ignored in this clone only.
            (own / "info").symlink_to(info)
            status = await _ask(
                own,
                f"--work-tree={workspace}",
                *("status", "--porcelain", "--ignore-submodules=all"),
                environment={"GIT_OBJECT_DIRECTORY": objects, "GIT_INDEX_FILE": index},
            )
    except OSError:
        # No room for it.
        return None
    return None if status is None else bool(status)


async def _ask(
    git_dir: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> str | None:
    # Inside a git hook there are variables that speak of another repository.
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name.startswith("GIT_CONFIG_")
    }
    try:
        with anyio.fail_after(GIT_SECONDS):
            result = await anyio.run_process(
                [*SAFE_GIT, f"--git-dir={git_dir}", *arguments],
                check=False,
                stdin=subprocess.DEVNULL,
                env={**inherited, **(environment or {})},
            )
    except (OSError, TimeoutError):
        return None
    return None if result.returncode else os.fsdecode(result.stdout).strip()
