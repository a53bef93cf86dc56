"""Payloads, a clock to turn, and the command line as a process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

ABLE = ["codex", "git", "docker"]
"""What a worker must have for `TASK_PAYLOAD`."""

TASK_PAYLOAD: dict[str, Any] = {
    "repository": "acme/widgets",
    "task": {
        "instructions": "Test it.",
        "container": {"enabled": True, "image": "busybox:1.36", "command": ["true"]},
    },
}
OTHER_PAYLOAD: dict[str, Any] = {"anything": ["goes", 1, None]}


def with_repository(repository: str) -> dict[str, Any]:
    return deepcopy(TASK_PAYLOAD) | {"repository": repository}


class Clock:
    """Tells the time that a test wants it to be."""

    def __init__(self) -> None:
        self.now = datetime(2026, 2, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def turn(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def __sub__(self, text: str) -> float:
        """How many seconds ago a time of a row was; below 0 in the future."""
        return (self.now - datetime.fromisoformat(text)).total_seconds()


def environment(**variables: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MOONMIND_")}
    return {**ours, "NO_COLOR": "1", **variables}


def queue_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moonmind_ext.cli", "queue", *arguments]


def queue_cli(
    *arguments: str, text: str = "", **variables: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        queue_command(*arguments),
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(**variables),
    )


@contextmanager
def server_process(
    db: Path, *options: str, port: int = 0, **variables: str
) -> "Iterator[tuple[str, subprocess.Popen[str]]]":
    """The server as a process of its own; gives its URL. What is left of it is killed."""
    command = queue_command("serve", "--port", str(port), "--db", str(db), *options)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment(**variables)
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()
