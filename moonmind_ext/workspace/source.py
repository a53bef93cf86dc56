"""Where a workspace stands in its repository."""

import subprocess
from pathlib import Path

import anyio

from pipelines.report import Source

GIT_SECONDS = 10
"""For each question. A status of 20,000 files takes a tenth of a second."""

SAFE_GIT = (
    "git",
    *("-c", "core.fsmonitor=false"),
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "safe.directory=*"),
    "--no-optional-locks",
)
"""The workspace's own configuration may name programs; none of them is run."""


async def read_source(workspace: Path, repository: str) -> Source:
    """Ask git for commit, branch and state; what it does not say is None."""
    commit = await _ask(workspace, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return Source(repository=repository)
    branch = await _ask(workspace, "symbolic-ref", "--short", "--quiet", "HEAD")
    status = await _ask(workspace, "status", "--porcelain", "--ignore-submodules=all")
    return Source(
        repository=repository,
        commit=commit,
        branch=branch,
        dirty=None if status is None else bool(status),
    )


async def _ask(workspace: Path, *arguments: str) -> str | None:
    if not (workspace / ".git").exists():
        # Not of a repository around it: the workspace would be something else there.
        return None
    try:
        with anyio.fail_after(GIT_SECONDS):
            result = await anyio.run_process(
                [*SAFE_GIT, "-C", str(workspace), *arguments],
                check=False,
                stdin=subprocess.DEVNULL,
            )
    except (OSError, TimeoutError):
        return None
    return None if result.returncode else result.stdout.decode("utf-8", "replace").strip()
