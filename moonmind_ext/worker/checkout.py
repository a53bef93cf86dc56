"""The checkout that a job works on: cloned, and on the right branch."""

import re
from dataclasses import dataclass
from datetime import date

from moonmind_ext.worker.git import CLONE_SECONDS, LOCAL_SECONDS
from moonmind_ext.worker.process import CommandError, Runner
from pipelines.payload import Git

REPO = "repo"
"""The checkout, in the job's directory."""


class BranchError(Exception):
    """A branch that the payload names and the repository does not have."""


@dataclass(frozen=True, slots=True)
class Branches:
    """The branches of a job, by MoonMind's rules.

    Attributes
    ----------
    default
        The remote's.
    starting
        Where the task starts from.
    new
        What is made from it; None when the task works on `starting` itself.
    is_own
        Whether `new` was made up for this job, so that nobody else has it.
    """

    default: str
    starting: str
    new: str | None
    is_own: bool

    @property
    def working(self) -> str:
        """The branch that is published."""
        return self.new or self.starting

    def to_dict(self) -> dict[str, str | None]:
        """Give them as MoonMind's events do."""
        return {
            "defaultBranch": self.default,
            "startingBranch": self.starting,
            "newBranch": self.new,
            "workingBranch": self.working,
        }


def choose_branches(git: Git, *, default: str, job_id: str, skill: str, day: date) -> Branches:
    """Say which branches a job has.

    With a new branch that is created from the starting one; with neither a branch of
    the job's own is made; a starting branch alone is worked on.

    Parameters
    ----------
    day
        Of the job, not of this attempt: the next one must find its branch again.
    """
    starting = git.starting_branch or default
    if git.new_branch:
        return Branches(default, starting, git.new_branch, is_own=False)
    if starting != default:
        return Branches(default, starting, None, is_own=False)
    # A skill has any name, a branch has not.
    name = "" if skill == "auto" else re.sub(r"[^A-Za-z0-9_]+", "-", skill).strip("-")
    tail = "-".join(filter(None, [job_id.replace("-", "")[:8], name]))
    new = f"task/{day:%Y%m%d}/{tail}"
    return Branches(default, starting, new, is_own=True)


@dataclass(frozen=True, slots=True)
class Checkout:
    """A repository on its branch, before the task has seen it.

    Attributes
    ----------
    url
        Where it came from; without credentials.
    commit
        That the task starts from.
    """

    job_id: str
    url: str
    branches: Branches
    commit: str


async def check_out(
    runner: Runner, url: str, git: Git, *, job_id: str, skill: str, day: date
) -> Checkout:
    """Clone a repository into the job's directory, and switch to the job's branch.

    Parameters
    ----------
    runner
        In the job's directory.
    skill, day
        That the payload names, and on which the job was made; parts of a made-up
        branch's name.

    Raises
    ------
    BranchError
        When the starting branch is not there, or a name is none.
    CommandError
        When git fails.
    """
    await runner.run("git", "clone", "--quiet", "--", url, REPO, seconds=CLONE_SECONDS)
    default = await _default_branch(runner)
    branches = choose_branches(git, default=default, job_id=job_id, skill=skill, day=day)
    await _check_name(runner, "startingBranch", branches.starting)
    await _check_name(runner, "newBranch", branches.working)
    commit = await _find(runner, branches.starting)
    # Once: the files of the starting branch are not needed beside those of the new.
    await _git(runner, "checkout", "--quiet", "--no-track", "-B", branches.working, commit)
    return Checkout(job_id, url, branches, commit)


async def _default_branch(runner: Runner) -> str:
    try:
        head = "refs/remotes/origin/HEAD"
        name = await _git(runner, "symbolic-ref", "--quiet", "--short", head)
    except CommandError:
        # A remote whose own HEAD points nowhere. MoonMind's answer.
        return "main"
    return name.strip().removeprefix("origin/")


async def _find(runner: Runner, starting: str) -> str:
    for base in (f"refs/remotes/origin/{starting}", f"refs/tags/{starting}"):
        try:
            found = await _git(runner, "rev-parse", "--quiet", "--verify", f"{base}^{{commit}}")
        except CommandError:
            continue
        return found.strip()
    raise BranchError(f"task.git.startingBranch: the repository has no branch or tag {starting!r}")


async def _check_name(runner: Runner, field: str, name: str) -> None:
    try:
        await _git(runner, "check-ref-format", "--branch", name)
    except CommandError:
        raise BranchError(f"task.git.{field}: {name!r} is no name of a branch") from None


async def _git(runner: Runner, *arguments: str) -> str:
    return await runner.run("git", "-C", REPO, *arguments, seconds=LOCAL_SECONDS)
