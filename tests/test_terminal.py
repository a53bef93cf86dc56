"""How a run begins: payload, engine and imports at once, and what is said when one fails."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

PAYLOAD = json.dumps({"image": "busybox:1.36", "command": ["true"]})
LIMIT_SECONDS = 60

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `moonmind-ext run`, with a `dagger` command that never gets a session up."""
    cli = tmp_path / "dagger"
    cli.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/new\nmv {tmp_path}/new {tmp_path}/pid\nsleep 100\n"
    )
    cli.chmod(0o755)
    (tmp_path / "ws").mkdir()
    with ExitStack() as stack:

        def start(payload: str, *, engine: bool = True) -> "subprocess.Popen[str]":
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "moonmind_ext.cli", "run", payload),
                    *("--workspace", str(tmp_path / "ws"), "--output", str(tmp_path / "out")),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    "DAGGER_SESSION_PORT": "",
                    "_EXPERIMENTAL_DAGGER_CLI_BIN": str(cli) if engine else "",
                    "_EXPERIMENTAL_DAGGER_RUNNER_HOST": "unix:///nowhere" if engine else "",
                    "PATH": os.environ["PATH"] if engine else str(tmp_path / "ws"),
                },
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def session_of(tmp_path: Path) -> int:
    """Wait for the command's `dagger session`, and give its process."""
    ends = time.monotonic() + LIMIT_SECONDS
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < ends
        time.sleep(0.01)
    return int((tmp_path / "pid").read_text())


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_engine_is_asked_for_a_session_before_the_payload_is_there(
    start: Start, tmp_path: Path
) -> None:
    process = start("-")
    session = session_of(tmp_path)

    _, stderr = process.communicate('{"command": []}', timeout=LIMIT_SECONDS)

    assert process.returncode == 2
    assert "image" in stderr
    assert "engine" not in stderr
    assert not is_there(session)


def test_a_payload_in_a_file_that_is_wrong_starts_nothing(start: Start, tmp_path: Path) -> None:
    (tmp_path / "payload.json").write_text('{"command": []}')
    process = start(str(tmp_path / "payload.json"))

    process.communicate(timeout=LIMIT_SECONDS)

    assert process.returncode == 2
    assert not (tmp_path / "pid").exists()


def test_what_is_wrong_with_the_payload_comes_before_an_engine_that_is_missing(
    start: Start,
) -> None:
    process = start("-", engine=False)
    # By now it has found that there is none.
    time.sleep(1.5)
    _, stderr = process.communicate('{"command": []}', timeout=LIMIT_SECONDS)

    assert process.returncode == 2
    assert "engine" not in stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_payload(
    start: Start, tmp_path: Path, stop: signal.Signals
) -> None:
    process = start("-")
    session = session_of(tmp_path)

    process.send_signal(stop)
    process.wait(LIMIT_SECONDS)

    assert process.returncode == 130
    assert not is_there(session)


def test_a_payload_may_come_from_a_pipe_with_a_name(start: Start, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    process = start(str(tmp_path / "pipe"), engine=False)
    (tmp_path / "pipe").write_text(PAYLOAD)
    process.communicate(timeout=LIMIT_SECONDS)

    # The payload is good; only the engine is missing.
    assert process.returncode == 75


def test_a_large_payload_is_read_to_its_end(start: Start) -> None:
    container = {**json.loads(PAYLOAD), "env": {"LONG": "x" * 1_000_000, "JOB_ID": "no"}}
    process = start("-", engine=False)
    _, stderr = process.communicate(json.dumps(container), timeout=LIMIT_SECONDS)

    assert process.returncode == 2
    assert "JOB_ID" in stderr


def test_nothing_is_no_payload(start: Start) -> None:
    process = start("/dev/null")
    _, stderr = process.communicate(timeout=LIMIT_SECONDS)

    assert process.returncode == 2
    assert "the payload is not valid" in stderr


def test_a_payload_that_is_not_there_is_named(start: Start, tmp_path: Path) -> None:
    process = start(str(tmp_path / "missing.json"))
    _, stderr = process.communicate(timeout=LIMIT_SECONDS)

    assert process.returncode == 2
    assert f"payload {tmp_path}/missing.json: No such file or directory" in stderr
