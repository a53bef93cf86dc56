"""What a task has changed goes out, and nothing that it has planted runs."""

import os
import stat
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import anyio
import pytest

from moonmind_ext.run.stage_log import StageLog
from moonmind_ext.worker.checkout import Checkout, check_out
from moonmind_ext.worker.git import Credential, git_environment
from moonmind_ext.worker.process import Runner
from moonmind_ext.worker.publish import Published, PublishError, publish, separate_git
from pipelines.masking import Masker
from pipelines.payload import Git, Publish, PublishMode
from tests.worker.servers import until
from tests.worker.support import Origin, git, make_origin

DAY = date(2026, 2, 16)

URL = "https://github.com/acme/widgets.git"
TOKEN = "ghp-0123456789abcdef"
BRANCH = Publish(mode=PublishMode.BRANCH)
PULL = Publish(mode=PublishMode.PR)

GH = """#!/bin/sh
printf '%s\\0' "$@" >>{folder}/gh.argv
echo "$GH_TOKEN" >>{folder}/gh.token
{then}
"""


@dataclass
class Job:
    """A job after its task: with a checkout, and what is published out of it."""

    folder: Path
    origin: Origin
    runner: Runner
    checkout: Checkout
    gh: Path = field(init=False)

    @property
    def repo(self) -> Path:
        return self.folder / "repo"

    async def publish(self, publishing: Publish = BRANCH) -> Published:
        variables = separate_git(self.folder, self.checkout)
        environment = {**self.runner.environment, **variables}
        runner = Runner(self.folder, environment, self.runner.log)
        return await publish(runner, publishing, self.checkout, str(self.gh))

    def install_gh(self, then: str) -> None:
        self.gh.write_text(GH.format(folder=self.folder, then=then))
        self.gh.chmod(0o755)

    def gh_calls(self) -> list[list[str]]:
        file = self.folder / "gh.argv"
        words = file.read_text().split("\0")[:-1] if file.exists() else []
        starts = [index for index, word in enumerate(words) if word == "pr"]
        return [words[a:b] for a, b in zip(starts, [*starts[1:], len(words)], strict=True)]

    def log(self) -> str:
        return (self.folder / "stage.log").read_text()

    def pushes(self) -> int:
        return self.log().count(" push --quiet ")


@asynccontextmanager
async def job_on(
    origin: Origin, folder: Path, given: Git | None = None, *, job_id: str = "job-1"
) -> AsyncIterator[Job]:
    directory = folder / job_id
    directory.mkdir()
    variables = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    variables["GIT_CONFIG_GLOBAL"] = str(origin.config)
    environment = git_environment(variables, Credential(TOKEN))
    with StageLog(directory / "stage.log", Masker([TOKEN])) as log:
        runner = Runner(directory, environment, log)
        checkout = await check_out(
            runner, URL, given or Git(), job_id="job-1", skill="auto", day=DAY
        )
        job = Job(directory, origin, runner, checkout)
        job.gh = directory / "gh"
        yield job


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    return make_origin(tmp_path)


async def test_a_message_and_a_body_may_be_of_any_length(tmp_path: Path, origin: Origin) -> None:
    long = ("word " * 40_000).strip()
    async with job_on(origin, tmp_path) as job:
        job.install_gh("echo https://github.com/acme/widgets/pull/7")
        (job.repo / "new").write_text("x")
        await job.publish(Publish(mode=PublishMode.PR, commit_message=long, pr_body=long))
        assert (job.folder / "body.md").read_text() == long
    assert git(origin.path, "log", "-1", "--format=%B", job.checkout.branches.working) == long


async def test_what_fails_here_is_final(tmp_path: Path, origin: Origin) -> None:
    async with job_on(origin, tmp_path) as job:
        (job.repo / ".gitattributes").write_text("*.txt working-tree-encoding=no-such\n")
        (job.repo / "a.txt").write_text("x")
        with pytest.raises(PublishError) as error:
            await job.publish()
    assert error.value.is_refused


async def test_without_changes_nothing_is_published(tmp_path: Path, origin: Origin) -> None:
    async with job_on(origin, tmp_path) as job:
        published = await job.publish(PULL)
    assert published.note == "publish skipped: no local changes"
    assert published.to_dict() == {
        "mode": "pr",
        "branch": job.checkout.branches.working,
        "prUrl": None,
        "skipped": True,
        "reason": "no local changes",
    }
    assert origin.branches() == ["main"]
    assert job.pushes() == 0


async def test_new_changed_and_removed_files_are_one_commit_on_the_branch(
    tmp_path: Path, origin: Origin
) -> None:
    async with job_on(origin, tmp_path) as job:
        (job.repo / "README.md").unlink()
        (job.repo / "sub").mkdir()
        (job.repo / "sub" / "run").write_text("#!/bin/sh\n")
        (job.repo / "sub" / "run").chmod(0o755)
        (job.repo / "link").symlink_to("sub/run")
        published = await job.publish()
    branch = job.checkout.branches.working
    assert published == Published(PublishMode.BRANCH, branch, "main")
    assert published.note == f"published branch {branch}"
    listed = git(origin.path, "ls-tree", "-r", "--format=%(objectmode) %(path)", branch)
    assert listed.splitlines() == ["120000 link", "100755 sub/run"]
    assert git(origin.path, "rev-list", "--count", f"main..{branch}") == "1"
    shown = git(origin.path, "log", "-1", "--format=%s|%an|%ae", branch)
    assert shown == "MoonMind task result for job job-1|MoonMind|moonmind@localhost"


async def test_the_message_is_the_payloads_and_the_author_the_workers(
    tmp_path: Path, origin: Origin
) -> None:
    with origin.config.open("a") as config:
        config.write("[user]\n\tname = Operator\n\temail = op@example.org\n")
        # The worker's own git must not hide what a task has made.
        config.write("[status]\n\tshowUntrackedFiles = no\n")
    async with job_on(origin, tmp_path) as job:
        (job.repo / "new").write_text("1")
        await job.publish(Publish(mode=PublishMode.BRANCH, commit_message="--amend\n\nbody 'x'"))
    branch = job.checkout.branches.working
    assert (
        git(origin.path, "log", "-1", "--format=%B|%an", branch) == "--amend\n\nbody 'x'\n|Operator"
    )


async def test_a_jobs_own_branch_of_an_earlier_attempt_is_overwritten(
    tmp_path: Path, origin: Origin
) -> None:
    for attempt in ("one", "two"):
        async with job_on(origin, tmp_path, job_id=f"attempt-{attempt}") as job:
            (job.repo / "file").write_text(attempt)
            published = await job.publish()
    assert origin.file(published.branch, "file") == "two"
    assert git(origin.path, "rev-list", "--count", f"main..{published.branch}") == "1"


async def test_a_named_branch_is_never_overwritten_and_that_is_final(
    tmp_path: Path, origin: Origin
) -> None:
    given = Git(new_branch="mine")
    async with job_on(origin, tmp_path, given, job_id="attempt-one") as job:
        job.checkout = replace(job.checkout, job_id="another")
        (job.repo / "file").write_text("theirs")
        await job.publish()
    async with job_on(origin, tmp_path, given, job_id="attempt-two") as job:
        (job.repo / "file").write_text("ours")
        with pytest.raises(PublishError, match="^publish failed: git push failed") as error:
            await job.publish()
    assert error.value.is_refused
    assert job.pushes() == 1
    assert origin.file("mine", "file") == "theirs"


async def test_a_named_branch_with_an_earlier_attempts_commit_is_overwritten(
    tmp_path: Path, origin: Origin
) -> None:
    for attempt in ("one", "two"):
        given = Git(new_branch="mine")
        async with job_on(origin, tmp_path, given, job_id=f"attempt-{attempt}") as job:
            (job.repo / "file").write_text(attempt)
            await job.publish()
    assert origin.file("mine", "file") == "two"
    assert git(origin.path, "rev-list", "--count", "main..mine") == "1"


async def test_a_push_that_the_servers_hook_declines_is_final(
    tmp_path: Path, origin: Origin
) -> None:
    hook = origin.path / "hooks" / "pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho not here >&2\nexit 1\n")
    hook.chmod(0o755)
    async with job_on(origin, tmp_path) as job:
        (job.repo / "file").write_text("1")
        with pytest.raises(PublishError) as error:
            await job.publish()
    assert error.value.is_refused
    assert job.pushes() == 1


async def test_a_server_that_is_away_is_tried_again_and_no_refusal(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moonmind_ext.worker.publish.pause_after", lambda _: 0.05)
    # Names in which a careless reader finds a refusal.
    given = Git(new_branch="fix/permission-denied-403")
    async with job_on(origin, tmp_path, given) as job:
        (job.repo / "file").write_text("1")
        away = origin.path.rename(tmp_path / "rejected-403-denied.git")
        with pytest.raises(PublishError) as error:
            await job.publish()
        assert not error.value.is_refused
        assert job.pushes() == 3
    away.rename(origin.path)


async def test_a_server_that_comes_back_in_time_gets_the_branch(
    tmp_path: Path, origin: Origin
) -> None:
    async with job_on(origin, tmp_path) as job:
        (job.repo / "file").write_text("1")
        away = origin.path.rename(tmp_path / "away.git")

        async def come_back() -> None:
            await until(lambda: "does not appear to be a git repository" in job.log())
            away.rename(origin.path)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(come_back)
            published = await job.publish()
    assert origin.file(published.branch, "file") == "1"


async def test_a_pull_request_is_opened_for_the_branch(tmp_path: Path, origin: Origin) -> None:
    publishing = Publish(
        mode=PublishMode.PR, pr_base_branch="main", pr_title="-t 'x'", pr_body="$(id)\n`id`"
    )
    async with job_on(origin, tmp_path) as job:
        (job.repo / "file").write_text("1")
        job.install_gh("echo https://github.com/acme/widgets/pull/7")
        published = await job.publish(publishing)
        body = job.folder / "body.md"
        assert body.read_text() == "$(id)\n`id`"
    branch = job.checkout.branches.working
    assert published.url == "https://github.com/acme/widgets/pull/7"
    assert published.note == "published PR https://github.com/acme/widgets/pull/7"
    (call,) = job.gh_calls()
    assert call == [
        *("pr", "create", "--base", "main", "--head", branch),
        *("--title", "-t 'x'", "--body-file", str(body), "--repo", URL),
    ]
    # By the environment alone, and in no log.
    assert (job.folder / "gh.token").read_text() == f"{TOKEN}\n"
    assert TOKEN not in job.log()
    assert published.to_dict() == {
        "mode": "pr",
        "branch": branch,
        "prUrl": published.url,
        "baseBranch": "main",
        "skipped": False,
    }


async def test_a_pull_request_that_exists_already_is_the_one(
    tmp_path: Path, origin: Origin
) -> None:
    async with job_on(origin, tmp_path) as job:
        (job.repo / "file").write_text("1")
        job.install_gh(
            'echo "a pull request for branch x into branch main already exists:" >&2\n'
            "echo https://github.com/acme/widgets/pull/3 >&2; exit 1"
        )
        published = await job.publish(PULL)
    assert published.url == "https://github.com/acme/widgets/pull/3"
    assert len(job.gh_calls()) == 1


async def test_a_pull_request_that_github_refuses_is_final(tmp_path: Path, origin: Origin) -> None:
    async with job_on(origin, tmp_path) as job:
        (job.repo / "file").write_text("1")
        job.install_gh("echo 'HTTP 403: Resource not accessible by integration' >&2; exit 1")
        with pytest.raises(PublishError) as error:
            await job.publish(PULL)
    assert error.value.is_refused
    assert len(job.gh_calls()) == 1


async def test_a_pull_request_is_tried_again_where_github_did_not_answer(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moonmind_ext.worker.publish.pause_after", lambda _: 0.05)
    async with job_on(origin, tmp_path) as job:
        (job.repo / "file").write_text("1")
        job.install_gh(
            f"[ $(wc -l <{job.folder}/gh.token) -gt 2 ] || {{ echo 'connection reset' >&2; exit 1; }}"
        )
        published = await job.publish(PULL)
    assert len(job.gh_calls()) == 3
    # An answer without an address is no failure: the branch is there.
    assert published.note == f"published PR from {published.branch}"


@pytest.mark.parametrize("mode", [PublishMode.BRANCH, PublishMode.PR])
async def test_no_program_that_a_task_has_planted_is_run(
    tmp_path: Path, origin: Origin, mode: PublishMode
) -> None:
    async with job_on(origin, tmp_path) as job:
        proof = job.folder / "proof"
        evil = job.folder / "evil.sh"
        # It notes who ran it, and passes its input on as a filter does.
        evil.write_text(f'#!/bin/sh\necho "$0 $*" >>{proof}\ncat\n')
        evil.chmod(0o755)
        _plant(job.repo, evil)
        job.install_gh("echo https://github.com/acme/widgets/pull/1")
        (job.repo / "file.txt").write_text("changed\n")
        (job.repo / "README.md").write_text("changed\n")
        published = await job.publish(Publish(mode=mode))
        assert not proof.exists(), proof.read_text()
    assert origin.file(published.branch, "file.txt") == "changed"


async def test_a_planted_program_would_have_run_in_the_checkout_itself(
    tmp_path: Path, origin: Origin
) -> None:
    # Or else the test above would prove nothing.
    async with job_on(origin, tmp_path) as job:
        proof, evil = job.folder / "proof", job.folder / "evil.sh"
        evil.write_text(f'#!/bin/sh\necho "$0 $*" >>{proof}\ncat\n')
        evil.chmod(0o755)
        _plant(job.repo, evil)
        (job.repo / "file.txt").write_text("changed\n")
        # It fails, for what is planted is no filter that speaks git's protocol.
        subprocess.run(["git", "add", "file.txt"], cwd=job.repo, capture_output=True, check=False)
        assert proof.exists()


def _plant(repo: Path, evil: Path) -> None:
    """Put a program wherever git would find one."""
    hooks = repo / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    names = "pre-commit prepare-commit-msg commit-msg post-commit pre-push reference-transaction"
    names += " post-index-change fsmonitor-watchman pre-auto-gc post-checkout post-rewrite"
    for name in names.split():
        (hooks / name).write_text(evil.read_text())
        (hooks / name).chmod(0o755)
    with (repo / ".git" / "config").open("a") as config:
        config.write(
            f"""
[core]
    fsmonitor = {evil}
    hooksPath = {hooks}
    sshCommand = {evil}
    editor = {evil}
    pager = {evil}
    askPass = {evil}
    gitProxy = {evil}
[filter "evil"]
    clean = {evil} clean
    smudge = {evil} smudge
    process = {evil} process
    required = true
[diff "evil"]
    command = {evil}
    textconv = {evil}
[merge "evil"]
    driver = {evil}
[diff]
    external = {evil}
[credential]
    helper = {evil}
[commit]
    gpgSign = true
[gpg]
    program = {evil}
[alias]
    status = !{evil}
    add = !{evil}
[url "ext::{evil} "]
    insteadOf = https://github.com/
[remote "origin"]
    receivepack = {evil}
    vcs = evil
[include]
    path = {evil}.config
"""
        )
    attributes = "* filter=evil diff=evil merge=evil\n"
    (repo / ".gitattributes").write_text(attributes)
    (repo / ".git" / "info").mkdir(exist_ok=True)
    (repo / ".git" / "info" / "attributes").write_text(attributes)
    # One of the repository's own files, too.
    assert stat.S_ISREG((repo / "README.md").stat().st_mode)
