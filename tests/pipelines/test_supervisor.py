"""The supervisor on every shell of this host, outside any engine."""

import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

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
