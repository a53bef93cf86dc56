"""`moonmind-ext run` as a process: what it prints, and how it ends."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.support import sh
from tests.engines import Engine

CLI = (sys.executable, "-m", "moonmind_ext.cli")
LIMIT_SECONDS = 120
SAVING = (
    "trap 'echo saved > $ARTIFACT_DIR/saved; exit 0' TERM; echo up; while :; do sleep 0.1; done"
)

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(engine: Engine, tmp_path: Path) -> Run:
    """Start `moonmind-ext run` with a container; output goes to `tmp_path / out`."""

    def begin(*command: str, options: tuple[str, ...] = (), **fields: Any) -> Any:
        container = {"image": engine.image("base"), "command": list(command), **fields}
        workspace = tmp_path / "ws"
        workspace.mkdir(exist_ok=True)
        arguments = ["--workspace", str(workspace), "--output", str(tmp_path / "out")]
        process = subprocess.Popen(
            [*CLI, "run", "-", *arguments, "--engine", engine.choice.value, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "MOONMIND_HELPER_IMAGE": engine.image("busybox")},
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(container))
        process.stdin.close()
        process.stdin = None
        return process

    return begin


def test_output_goes_to_stdout_and_progress_to_stderr(start: Run, tmp_path: Path) -> None:
    process = start(*sh("echo out; echo err >&2; exit 3"))
    stdout, stderr = process.communicate(timeout=LIMIT_SECONDS)

    assert process.returncode == 3
    assert stdout == "out\nerr\n"
    assert "running the command" in stderr
    assert "command-failed" in stderr
    assert "container command failed (3): err" in stderr
    assert str(tmp_path / "out" / "container" / "logs" / "runner.log") in stderr
    assert "\x1b[" not in stdout + stderr


def test_with_json_every_line_is_an_event_and_the_last_is_the_report(
    start: Run, tmp_path: Path
) -> None:
    process = start(*sh("echo hello; exit 2"), options=("--json", "--job-id", "job-1"))
    stdout, _ = process.communicate(timeout=LIMIT_SECONDS)

    *events, report = [json.loads(line) for line in stdout.splitlines()]
    assert process.returncode == 2
    assert events[0]["message"] == "moonmind.task.container.started"
    assert events[-1]["message"] == "moonmind.task.container.finished"
    assert "".join(e["payload"].get("text", "") for e in events) == "hello\n"
    assert report == json.loads((tmp_path / "out/container/metadata/run.json").read_text())
    assert report["jobId"] == "job-1"


def test_a_timeout_ends_with_124(start: Run) -> None:
    process = start("sleep", "60", timeoutSeconds=1)
    _, stderr = process.communicate(timeout=LIMIT_SECONDS)

    assert process.returncode == 124
    assert "timed out after 1s" in stderr


def test_a_missing_image_ends_with_69(engine: Engine, start: Run) -> None:
    process = start("true", image=engine.image("missing"))
    _, stderr = process.communicate(timeout=LIMIT_SECONDS)

    assert process.returncode == 69
    assert "is not available" in stderr
    assert "Traceback" not in stderr


def test_ctrl_c_stops_the_task_and_brings_back_what_it_has(start: Run, tmp_path: Path) -> None:
    script = (
        "trap 'echo saved > $ARTIFACT_DIR/saved; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    )
    process = start(*sh(script))
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=LIMIT_SECONDS)

    assert process.returncode == 130
    assert "stopping the task" in stderr
    assert (tmp_path / "out/container/saved").read_text() == "saved\n"
    assert "cancelled" in stderr


def test_ctrl_c_in_a_terminal_is_ours_and_not_the_commands(engine: Engine, tmp_path: Path) -> None:
    container = {"image": engine.image("base"), "command": list(sh(SAVING))}
    (tmp_path / "payload.json").write_text(json.dumps(container))
    (tmp_path / "ws").mkdir()
    arguments = ["--workspace", str(tmp_path / "ws"), "--output", str(tmp_path / "out")]
    arguments += ["--engine", engine.choice.value]
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [*CLI, "run", str(tmp_path / "payload.json"), *arguments])
    shown = b""
    while b"up" not in shown:
        shown += os.read(terminal, 4096)
    os.write(terminal, b"\x03")
    with contextlib.suppress(OSError):
        while more := os.read(terminal, 4096):
            shown += more
    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 130, shown.decode(errors="replace")
    assert b"cancelled" in shown
    assert (tmp_path / "out/container/saved").read_text() == "saved\n"


def test_a_second_ctrl_c_ends_it_at_once(start: Run) -> None:
    process = start(*sh("trap '' TERM; echo up; sleep 100; sleep 100"), gracePeriodSeconds=100)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LIMIT_SECONDS)

    assert process.returncode == 130
    assert time.monotonic() - began < 20


def test_a_reader_that_has_seen_enough_does_not_end_the_task(start: Run, tmp_path: Path) -> None:
    process = start(*sh("i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done"))
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    process.communicate(timeout=LIMIT_SECONDS)

    assert process.returncode == 0
    log = (tmp_path / "out/container/logs/runner.log").read_text()
    assert log.endswith("line 19999\n")


def test_bytes_that_are_no_utf8_are_shown_as_such_or_not_at_all(start: Run, tmp_path: Path) -> None:
    process = start(*sh(r"printf 'a\377b\n'; sleep 0.5; echo end"))
    stdout, _ = process.communicate(timeout=LIMIT_SECONDS)

    # A real engine drops the record, the embedded one sends it.
    assert stdout in {"a\ufffdb\nend\n", "end\n"}
    assert (tmp_path / "out/container/logs/runner.log").read_bytes() == b"a\xffb\nend\n"


def peak_megabytes(process: "subprocess.Popen[str]") -> float:
    """Follow the peak of a process's own memory until it ends."""
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            peak = int(found[1])
        time.sleep(0.2)
    return peak / 1024


def test_a_gigabyte_of_output_needs_no_memory_of_ours(start: Run, tmp_path: Path) -> None:
    process = start(*sh("yes moonmind | head -c 1073741824; exit 5"), options=("--json",))
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    peak = peak_megabytes(process)
    process.communicate(timeout=LIMIT_SECONDS)

    assert process.returncode == 5
    assert peak < 300
    log = tmp_path / "out/container/logs/runner.log"
    assert log.stat().st_size < (16 << 20) + 1000
    report = json.loads((tmp_path / "out/container/metadata/run.json").read_text())
    assert report["log"] == {"bytes": 1 << 30, "truncated": True}
