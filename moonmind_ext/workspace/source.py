"""Where a workspace stands in its repository, and what in it is being worked on.

Commit and branch are read from files alone. The state takes more, so that is asked
through a git directory of our own, with an empty configuration, which shares the
objects and the index. What the user's and the system's configuration say does count,
their filters (Git LFS) too.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from moonmind_ext.workspace.git import ask
from pipelines.artifacts import readable
from pipelines.concurrency import together
from pipelines.report import Source

_STATUS = (
    *("status", "--porcelain", "-z"),
    *("--ignore-submodules=all", "--no-renames"),
)
_LETTERS = len("XY ")
"""That a line of the status begins with."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a workspace stands.

    Attributes
    ----------
    touched
        Relative paths that are not as they were committed, nor ignored: what somebody
        works on. A directory of which nothing was committed ends with a slash.
    is_clone
        Whether nobody but git has written to it, its `.git` included. For others git
        does not say so.
    """

    source: Source
    touched: tuple[str, ...] = ()
    is_clone: bool = False


NOWHERE = Standing(Source(repository=""))


async def read_standing(workspace: Path, repository: str) -> Standing:
    """Ask git for commit, branch and state; what it does not say is None.

    The state is None too for repositories that git does not understand without their
    configuration: SHA-256, split indexes, objects that a partial clone left out.
    """
    git_dir = workspace / ".git"
    if not git_dir.exists():
        return Standing(Source(repository=repository))
    commit, branch, touched = await together(
        ask(git_dir, "rev-parse", "--verify", "HEAD"),
        ask(git_dir, "symbolic-ref", "--short", "--quiet", "HEAD"),
        _touched(workspace, git_dir),
    )
    if commit is None:
        return Standing(Source(repository=repository))
    source = Source(
        repository=repository,
        commit=commit.strip(),
        branch=None if branch is None else readable(branch.strip()),
        dirty=None if touched is None else bool(touched),
    )
    return Standing(source, touched or ())


async def _touched(workspace: Path, git_dir: Path) -> tuple[str, ...] | None:
    names = [argument for name in ("objects", "index", "info") for argument in ("--git-path", name)]
    answer = await ask(git_dir, "rev-parse", "HEAD", "--path-format=absolute", *names)
    # More lines are a path with a line break in it.
    if answer is None or answer.count("\n") != len(names) // 2 + 1:
        return None
    commit, objects, index, info, _ = answer.split("\n")
    try:
        with tempfile.TemporaryDirectory(prefix="moonmind-git-") as folder:
            own = Path(folder)
            (own / "refs").mkdir()
            (own / "HEAD").write_text(f"{commit}\n")
            # What is to be ignored in this clone only.
            (own / "info").symlink_to(info)
            status = await ask(
                own,
                f"--work-tree={workspace}",
                *_STATUS,
                extra={"GIT_OBJECT_DIRECTORY": objects, "GIT_INDEX_FILE": index},
            )
    except OSError:
        # No room for it.
        return None
    if status is None:
        return None
    return tuple(line[_LETTERS:] for line in status.split("\0") if line)
