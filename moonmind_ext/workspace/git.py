"""Git is asked about a workspace without running anything that the workspace names.

Its `.git/config` and `.gitattributes` may name programs (filters, a file system
monitor, hooks, the transport of a partial clone).
"""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import anyio

GIT_SECONDS = 10
"""For each question. A status of 20,000 files takes a tenth of a second."""

_SAFE_GIT = (
    "git",
    *("-c", "core.fsmonitor=false"),
    *("-c", "core.hooksPath=/dev/null"),
    "--no-optional-locks",
)


def command(git_dir: Path, *arguments: str) -> list[str]:
    """Give the command line of a question about a repository.

    The repository is named, so that it is not one around the workspace. And for one
    that is named git does not ask whose it is: root runs on others' checkouts. That
    question protects from the programs in a configuration, of which none is run.
    """
    return [*_SAFE_GIT, f"--git-dir={git_dir}", *arguments]


def environment() -> dict[str, str]:
    """Give our variables, without those that speak of another repository, as in a hook."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name.startswith("GIT_CONFIG_")
    }


async def ask(git_dir: Path, *arguments: str, extra: Mapping[str, str] | None = None) -> str | None:
    """Ask git something; None when it does not say.

    Parameters
    ----------
    extra
        Variables.
    """
    try:
        with anyio.fail_after(GIT_SECONDS):
            result = await anyio.run_process(
                command(git_dir, *arguments),
                check=False,
                stdin=subprocess.DEVNULL,
                env={**environment(), **(extra or {})},
            )
    except (OSError, TimeoutError):
        return None
    return None if result.returncode else os.fsdecode(result.stdout)
