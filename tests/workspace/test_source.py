import os
import subprocess
from pathlib import Path

import pytest

from moonmind_ext.workspace.source import read_standing


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
    return subprocess.run(
        ["git", *identity, "-C", folder, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clean one, with one file and one commit."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-b", "main")
    (folder / "a").write_text("a")
    git(folder, "add", "a")
    git(folder, "commit", "-m", "first")
    return folder


async def test_a_source_says_commit_branch_and_state(checkout: Path) -> None:
    clean = (await read_standing(checkout, "acme/widgets")).source
    (checkout / "a").write_text("b")
    dirty = (await read_standing(checkout, "acme/widgets")).source

    assert clean.branch == "main"
    assert clean.commit == git(checkout, "rev-parse", "HEAD")
    assert clean.dirty is False
    assert dirty.dirty is True


async def test_a_new_file_is_dirty_unless_it_is_ignored(checkout: Path) -> None:
    (checkout / ".git" / "info").mkdir(exist_ok=True)
    (checkout / ".git" / "info" / "exclude").write_text("ignored\n")
    (checkout / "ignored").write_text("x")
    ignored = (await read_standing(checkout, "acme/widgets")).source
    (checkout / "new").write_text("x")
    new = (await read_standing(checkout, "acme/widgets")).source

    assert ignored.dirty is False
    assert new.dirty is True


async def test_what_somebody_works_on_is_named(checkout: Path) -> None:
    (checkout / ".gitignore").write_text("ignored\n")
    (checkout / "a").write_text("b")
    (checkout / "new").mkdir()
    for name in ("new/one", "ignored", " moved\n"):
        (checkout / name).write_text("x")
    git(checkout, "add", " moved\n")

    standing = await read_standing(checkout, "acme/widgets")

    assert set(standing.touched) == {".gitignore", "a", " moved\n", "new/"}


async def test_a_file_with_a_new_time_only_is_not_dirty(checkout: Path) -> None:
    os.utime(checkout / "a", (1, 1))

    assert (await read_standing(checkout, "acme/widgets")).source.dirty is False


async def test_another_worktree_has_its_own_branch_and_state(
    checkout: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    git(checkout, "worktree", "add", "-b", "topic", str(other))
    (checkout / "a").write_text("b")

    source = (await read_standing(other, "acme/widgets")).source

    assert (source.branch, source.dirty) == ("topic", False)


async def test_without_a_branch_there_is_still_a_commit(checkout: Path) -> None:
    git(checkout, "checkout", "--detach")

    source = (await read_standing(checkout, "acme/widgets")).source

    assert source.commit is not None
    assert (source.branch, source.dirty) == (None, False)


async def test_a_directory_that_is_no_repository_has_no_commit(checkout: Path) -> None:
    inside = checkout / "inside"
    (inside / ".git").mkdir(parents=True)
    for folder in (checkout.parent, inside):
        source = (await read_standing(folder, "acme/widgets")).source

        assert (source.commit, source.branch, source.dirty) == (None, None, None)


async def test_a_repository_without_a_commit_has_no_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-b", "main")

    source = (await read_standing(tmp_path, "acme/widgets")).source

    assert (source.commit, source.branch, source.dirty) == (None, None, None)


async def test_variables_of_a_hook_around_us_do_not_count(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "nowhere"))

    source = (await read_standing(checkout, "acme/widgets")).source

    assert source.commit is not None
    assert source.dirty is False


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
async def test_root_reads_a_checkout_of_somebody_else(checkout: Path) -> None:
    for path in (checkout, *checkout.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)

    source = (await read_standing(checkout, "acme/widgets")).source

    assert (source.branch, source.dirty) == ("main", False)


CONFIGURATION = """
[core]
    fsmonitor = {trap}fsmonitor
    hooksPath = {hooks}
    sshCommand = {trap}ssh
    pager = {trap}pager
    alternateRefsCommand = {trap}refs
[filter "x"]
    clean = {trap}clean
    smudge = {trap}smudge
    required = true
[filter "y"]
    process = {trap}process
    required = true
[diff]
    external = {trap}external
[diff "x"]
    textconv = {trap}textconv
    command = {trap}command
[alias]
    rev-parse = !{trap}alias
    symbolic-ref = !{trap}alias
    status = !{trap}alias
[pager]
    rev-parse = true
    status = true
[includeIf "gitdir:{git_dir}/"]
    path = included
[protocol "ext"]
    allow = always
[remote "origin"]
    url = "ext::{trap}lazy-fetch"
    promisor = true
    partialclonefilter = blob:none
"""


@pytest.mark.parametrize("complete", [True, False])
async def test_nothing_that_a_workspace_names_is_run(
    checkout: Path, tmp_path: Path, complete: bool
) -> None:
    git_dir, trapped = checkout / ".git", tmp_path / "trapped"
    for name in "bcd":
        (checkout / name).write_text(name)
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "second")
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\necho "$@" >> {trapped}\ncat\n')
    program.chmod(0o755)
    hooks = tmp_path / "hooks"
    for folder in (hooks, git_dir / "hooks"):
        folder.mkdir(exist_ok=True)
        for hook in ("post-index-change", "reference-transaction", "post-checkout"):
            (folder / hook).unlink(missing_ok=True)
            (folder / hook).symlink_to(program)
    with (git_dir / "config").open("a") as config:
        config.write(CONFIGURATION.format(trap=f"{program} ", hooks=hooks, git_dir=git_dir))
    (git_dir / "included").write_text(f"[core]\n fsmonitor = {program} included\n")
    (git_dir / "info" / "attributes").write_text("a filter=x diff=x\n")
    (checkout / ".gitattributes").write_text("b filter=x diff=x\nc filter=y diff=x\n")
    # So that git has to read them again.
    for name in "abc":
        os.utime(checkout / name, (1, 1))
    (checkout / "d").write_text("changed")
    if not complete:
        git_dir.joinpath("refs", "heads", "main").write_text("0123456789" * 4 + "\n")

    source = (await read_standing(checkout, "acme/widgets")).source

    assert not trapped.exists(), trapped.read_text()
    assert source.commit is not None
    assert source.branch == "main"
    assert source.dirty is (True if complete else None)
    # The traps do work.
    subprocess.run(["git", "-C", checkout, "status"], check=False, capture_output=True)
    assert trapped.exists()
