"""The supervisor on every shell of this host, outside any engine."""

import os
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

from moonmind_ext.workspace.names import read_names

SUPERVISOR = str(resources.files("pipelines").joinpath("supervisor.sh"))


def test_it_refuses_to_run_where_it_would_signal_other_peoples_processes(tmp_path: Path) -> None:
    result = subprocess.run(
        ["sh", SUPERVISOR, "run", "1", "1", str(tmp_path), "stop", str(tmp_path), "", "true"],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )

    assert result.returncode == 125
    assert "refused" in result.stderr
    assert list(tmp_path.iterdir()) == []


SHELLS = ["sh", "dash", "bash", "busybox"]


NOBODY = 65534


def open_to_all(folder: Path) -> Path:
    for path in (folder, *folder.parents[:3]):
        path.chmod(path.stat().st_mode | 0o755)
    return folder


def words_of(shell: str) -> list[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    return [shell, "sh"] if shell == "busybox" else [shell]


def run_function(
    shell: str, name: str, call: str, *arguments: Path, user: int | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run one of the supervisor's functions in a shell; the rest of it needs a container."""
    words = words_of(shell)
    text = Path(SUPERVISOR).read_text()
    begin = text.index(f"{name}() {{")
    function = text[begin : text.index("\n}\n", begin) + 3]
    if shell == "busybox":
        function += 'find() { busybox find "$@"; }\nwc() { busybox wc "$@"; }\n'
    return subprocess.run(
        [*words, "-c", f"{function}{call}", "x", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
        # No mode holds root up.
        user=user if os.getuid() == 0 else None,
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_can_read_it(shell: str) -> None:
    command = [*words_of(shell), "-n", SUPERVISOR]
    result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)

    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_lists_the_workspace(shell: str, tmp_path: Path) -> None:
    workspace = tmp_path / "a workspace"
    for folder in ("dir/.git/objects", ".git/refs", "closed/inner"):
        (workspace / folder).mkdir(parents=True)
    for name in ("new\nline", "dir/file", os.fsdecode(b"caf\xe9"), "//0"):
        (workspace / name.lstrip("/")).write_text("x")
    (workspace / "link").symlink_to("dir")
    (workspace / "closed").chmod(0o300)

    call = "mm_workspace=$1 mm_out=$2; list_workspace before"
    run_function(shell, "list_workspace", call, workspace, tmp_path).check_returncode()

    names = read_names(tmp_path / "before")
    assert names.closed == {"closed"}
    assert names.directories == {
        **dict.fromkeys(["dir", "closed"], True),
        **dict.fromkeys(["dir/.git", ".git", "dir/file", "link", "new\nline", "0"], False),
        os.fsdecode(b"caf\xe9"): False,
    }


def holds_something(shell: str, folder: Path) -> int:
    call = 'holds_something "$1"'
    return run_function(shell, "holds_something", call, folder, user=NOBODY).returncode


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_counts_the_files(shell: str, tmp_path: Path) -> None:
    artifacts = open_to_all(tmp_path) / "the artifacts"
    (artifacts / "inner" / "empty").mkdir(parents=True)
    for name in ("file", "inner/file", ".hidden", os.fsdecode(b"caf\xe9")):
        (artifacts / name).write_text("x")
    (artifacts / "link").symlink_to("file")

    assert run_function(shell, "count_files", 'count_files "$1"', artifacts).stdout.split() == ["4"]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ["*", "a", ".a", "..a", "...", "-n", " ", "\n", "[a]", "dangling"])
def test_every_shell_sees_that_something_is_there(shell: str, name: str, tmp_path: Path) -> None:
    artifacts = open_to_all(tmp_path) / "the artifacts"
    artifacts.mkdir()
    artifacts.chmod(0o777)
    assert holds_something(shell, artifacts) == 1

    if name == "dangling":
        (artifacts / name).symlink_to("nowhere")
    else:
        (artifacts / name).touch()

    assert holds_something(shell, artifacts) == 0


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("mode", [0o600, 0o300, 0o500])
def test_what_cannot_be_looked_into_may_hold_something(
    shell: str, mode: int, tmp_path: Path
) -> None:
    (open_to_all(tmp_path) / "closed").mkdir()
    if os.getuid() == 0:
        os.chown(tmp_path / "closed", NOBODY, NOBODY)
    (tmp_path / "closed").chmod(mode)

    assert holds_something(shell, tmp_path / "closed") == 0
