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


@pytest.mark.parametrize("shell", ["sh", "dash", "bash", "busybox"])
def test_every_shell_can_read_it(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = [shell, "sh"] if shell == "busybox" else [shell]
    result = subprocess.run(
        [*command, "-n", SUPERVISOR], capture_output=True, text=True, timeout=10, check=False
    )

    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["sh", "dash", "bash", "busybox"])
def test_every_shell_lists_the_workspace(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    workspace = tmp_path / "a workspace"
    for folder in ("dir/.git/objects", ".git/refs", "closed/inner"):
        (workspace / folder).mkdir(parents=True)
    for name in ("new\nline", "dir/file", os.fsdecode(b"caf\xe9"), "//0"):
        (workspace / name.lstrip("/")).write_text("x")
    (workspace / "link").symlink_to("dir")
    (workspace / "closed").chmod(0o300)

    text = Path(SUPERVISOR).read_text()
    function = text[
        text.index("list_workspace() {") : text.index("\n}\n", text.index("list_w")) + 3
    ]
    if shell == "busybox":
        function += 'find() { busybox find "$@"; }\n'
    command = [shell, "sh"] if shell == "busybox" else [shell]
    script = f"{function}mm_workspace=$1 mm_out=$2; list_workspace before"
    subprocess.run(
        [*command, "-c", script, "x", str(workspace), str(tmp_path)], timeout=10, check=True
    )

    names = read_names(tmp_path / "before")
    assert names.closed == {"closed"}
    assert names.directories == {
        **dict.fromkeys(["dir", "closed"], True),
        **dict.fromkeys(["dir/.git", ".git", "dir/file", "link", "new\nline", "0"], False),
        os.fsdecode(b"caf\xe9"): False,
    }


@pytest.mark.parametrize("shell", ["sh", "dash", "bash", "busybox"])
def test_every_shell_counts_the_files(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    artifacts = tmp_path / "the artifacts"
    (artifacts / "inner" / "empty").mkdir(parents=True)
    for name in ("file", "inner/file", ".hidden", os.fsdecode(b"caf\xe9")):
        (artifacts / name).write_text("x")
    (artifacts / "link").symlink_to("file")

    text = Path(SUPERVISOR).read_text()
    function = text[text.index("count_files() {") : text.index("\n}\n", text.index("count_f")) + 3]
    if shell == "busybox":
        function += 'find() { busybox find "$@"; }\nwc() { busybox wc "$@"; }\n'
    command = [shell, "sh"] if shell == "busybox" else [shell]
    script = f'{function}count_files "$1"'
    printed = subprocess.run(
        [*command, "-c", script, "x", str(artifacts)],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )

    assert printed.stdout.split() == ["4"]
