"""Which branch a job works on, and the clone it gets."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import pytest

from moonmind_ext.run.stage_log import StageLog
from moonmind_ext.worker.checkout import (
    BranchError,
    Branches,
    Checkout,
    check_out,
    choose_branches,
)
from moonmind_ext.worker.git import git_environment
from moonmind_ext.worker.process import CommandError, Runner
from pipelines.masking import Masker
from pipelines.payload import Git
from tests.worker.support import Origin, git, make_origin

DAY = date(2026, 2, 16)

URL = "https://github.com/acme/widgets.git"
JOB = "0f8fad5b-d9cb-469f-a165-70867728950e"


@contextmanager
def job_of(origin: Origin, folder: Path) -> Iterator[Runner]:
    directory = folder / "job"
    directory.mkdir()
    variables = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    environment = git_environment({**variables, "GIT_CONFIG_GLOBAL": str(origin.config)}, None)
    with StageLog(directory / "stage.log", Masker()) as log:
        yield Runner(directory, environment, log)


async def clone(folder: Path, origin: Origin, given: Git) -> Checkout:
    with job_of(origin, folder) as runner:
        return await check_out(runner, URL, given, job_id=JOB, skill="auto", day=DAY)


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    """A repository with `main`, a branch `feature/one` that has a file more, and a tag."""
    origin = make_origin(tmp_path)
    seed = tmp_path / "seed"
    git(seed, "tag", "v1")
    git(seed, "checkout", "--quiet", "-b", "feature/one")
    (seed / "one.txt").write_text("1\n")
    git(seed, "add", "--all")
    git(seed, "commit", "--quiet", "--message=feature")
    git(seed, "push", "--quiet", str(origin.path), "feature/one", "v1")
    return origin


@pytest.mark.parametrize(
    ("given", "starting", "new", "working"),
    [
        (Git(starting_branch="dev"), "dev", None, "dev"),
        (Git(new_branch="mine"), "main", "mine", "mine"),
        (Git(starting_branch="dev", new_branch="mine"), "dev", "mine", "mine"),
        (Git(starting_branch="main", new_branch="mine"), "main", "mine", "mine"),
        (Git(starting_branch=" ", new_branch=" mine "), "main", "mine", "mine"),
    ],
)
def test_named_branches_are_taken_as_they_are(
    given: Git, starting: str, new: str | None, working: str
) -> None:
    branches = choose_branches(given, default="main", job_id=JOB, skill="auto", day=DAY)
    assert branches == Branches("main", starting, new, is_own=False)
    assert branches.working == working
    assert branches.to_dict() == {
        "defaultBranch": "main",
        "startingBranch": starting,
        "newBranch": new,
        "workingBranch": working,
    }


@pytest.mark.parametrize("given", [Git(), Git(starting_branch="main")])
@pytest.mark.parametrize(
    ("skill", "tail"),
    [
        ("auto", ""),
        ("speckit", "-speckit"),
        # No git would take these as they are.
        ("my skill", "-my-skill"),
        ("a..b~^:?*[", "-a-b"),
        ("x.lock", "-x-lock"),
        ("..", ""),
    ],
)
def test_the_default_branch_is_not_worked_on_but_a_branch_of_the_jobs_own(
    given: Git, skill: str, tail: str
) -> None:
    branches = choose_branches(given, default="main", job_id=JOB, skill=skill, day=DAY)
    assert (branches.starting, branches.is_own) == ("main", True)
    assert re.fullmatch(rf"task/[0-9]{{8}}/0f8fad5b{re.escape(tail)}", branches.working)


async def test_the_default_branch_is_the_remotes(tmp_path: Path, origin: Origin) -> None:
    git(origin.path, "symbolic-ref", "HEAD", "refs/heads/feature/one")
    checkout = await clone(tmp_path, origin, Git())
    repo = tmp_path / "job/repo"
    assert checkout.branches.default == "feature/one"
    assert checkout.branches.is_own
    assert checkout.commit == git(origin.path, "rev-parse", "feature/one")
    assert git(repo, "rev-parse", "HEAD") == checkout.commit
    assert git(repo, "symbolic-ref", "--short", "HEAD") == checkout.branches.working
    assert (repo / "one.txt").read_text() == "1\n"
    assert git(repo, "status", "--porcelain") == ""
    assert checkout.url == URL


@pytest.mark.parametrize(
    ("given", "working", "start"),
    [
        (Git(starting_branch="feature/one"), "feature/one", "feature/one"),
        (Git(starting_branch="feature/one", new_branch="mine"), "mine", "feature/one"),
        (Git(new_branch="mine"), "mine", "main"),
        # That there is one at the remote makes no difference: it starts where it is told.
        (Git(new_branch="feature/one"), "feature/one", "main"),
        (Git(starting_branch="v1", new_branch="fix"), "fix", "v1"),
        (Git(starting_branch="v1"), "v1", "v1"),
    ],
)
async def test_a_job_is_on_its_branch(
    tmp_path: Path, origin: Origin, given: Git, working: str, start: str
) -> None:
    checkout = await clone(tmp_path, origin, given)
    repo = tmp_path / "job/repo"
    assert checkout.branches.working == working
    assert git(repo, "symbolic-ref", "HEAD") == f"refs/heads/{working}"
    assert git(repo, "rev-parse", "HEAD") == git(origin.path, "rev-parse", f"{start}^{{commit}}")
    assert (repo / "one.txt").exists() == (start == "feature/one")


@pytest.mark.parametrize("name", ["absent", "refs/heads/main", "origin/main", "0" * 40, "feature"])
async def test_a_starting_branch_that_is_not_there_is_named(
    tmp_path: Path, origin: Origin, name: str
) -> None:
    with pytest.raises(BranchError) as error:
        await clone(tmp_path, origin, Git(starting_branch=name))
    assert str(error.value) == (
        f"task.git.startingBranch: the repository has no branch or tag {name!r}"
    )


@pytest.mark.parametrize(
    "name",
    [
        "-x",
        "--upload-pack=id",
        "a b",
        "a..b",
        "@{-1}",
        "HEAD",
        "a~1",
        "a:b",
        "a.lock",
        "/a",
        "a\0b",
        "\ud800",
    ],
)
@pytest.mark.parametrize("field", ["startingBranch", "newBranch"])
async def test_what_is_no_name_of_a_branch_is_refused_by_its_field(
    tmp_path: Path, origin: Origin, name: str, field: str
) -> None:
    # By a model of its own: the payload's contract may be stricter.
    given = Git.model_construct(
        starting_branch=name if field == "startingBranch" else None,
        new_branch=name if field == "newBranch" else None,
    )
    with pytest.raises(BranchError) as error:
        await clone(tmp_path, origin, given)
    assert str(error.value) == f"task.git.{field}: {name!r} is no name of a branch"


async def test_a_remote_whose_head_leads_nowhere_has_main(tmp_path: Path, origin: Origin) -> None:
    git(origin.path, "symbolic-ref", "HEAD", "refs/heads/absent")
    checkout = await clone(tmp_path, origin, Git())
    assert checkout.branches.default == "main"
    assert (tmp_path / "job/repo/README.md").exists()


async def test_an_empty_repository_has_no_branch_to_start_from(tmp_path: Path) -> None:
    origin = make_origin(tmp_path)
    git(origin.path, "update-ref", "-d", "refs/heads/main")
    with pytest.raises(BranchError, match="no branch or tag 'main'"):
        await clone(tmp_path, origin, Git())


async def test_a_repository_that_is_not_there_is_a_clone_that_failed(
    tmp_path: Path, origin: Origin
) -> None:
    origin.path.rename(tmp_path / "moved")
    with pytest.raises(CommandError, match=r"^git clone failed \(128\): "):
        await clone(tmp_path, origin, Git())
