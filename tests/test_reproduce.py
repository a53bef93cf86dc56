import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from moonmind_ext.reproduce import NoRunError, reproduce_command
from pipelines.payload import parse_any
from pipelines.plan import Defaults, plan_task, reproduce_line, secret_address

DIGEST = "busybox@sha256:" + "0" * 64


def a_run(folder: Path, **fields: object) -> Path:
    """Leave what a run leaves, as far as it matters here."""
    plan = plan_task(
        parse_any({"image": "busybox:1.36", "command": ["true"], **fields}), job_id="job-7"
    )
    folder.mkdir(parents=True)
    line = reproduce_line(plan, image=DIGEST)
    (folder / "run.json").write_text(json.dumps({"reproduce": line}))
    (folder / "payload.json").write_text("{}")
    return folder


@pytest.mark.parametrize("place", ["out/container/metadata", "out/metadata", "out"])
def test_a_run_is_found_wherever_it_was_left(tmp_path: Path, place: str) -> None:
    run = a_run(tmp_path / place)

    assert reproduce_command(tmp_path / "out", module="/module") == [
        "dagger",
        "-m",
        "/module",
        "call",
        "run",
        f"--payload={run}/payload.json",
        "--workspace=.",
        "--job-id=job-7",
        f"--image={DIGEST}",
        "check",
    ]


def test_the_module_is_this_checkout_by_itself(tmp_path: Path) -> None:
    words = reproduce_command(a_run(tmp_path / "out"), open_shell=True)

    assert words[2] == str(Path(__file__).resolve().parents[1])
    assert words[-1] == "terminal"


def test_a_module_that_the_run_has_recorded_is_the_one(tmp_path: Path) -> None:
    payload = parse_any({"image": "busybox:1.36", "command": ["true"]})
    defaults = Defaults(module="github.com/acme/moonmind-ext@v0.1.0")
    line = reproduce_line(plan_task(payload, job_id="j", defaults=defaults), image=DIGEST)
    (tmp_path / "run.json").write_text(json.dumps({"reproduce": line}))

    assert reproduce_command(tmp_path)[2] == "github.com/acme/moonmind-ext@v0.1.0"
    assert reproduce_command(tmp_path, module="/other")[2] == "/other"


def test_secrets_stand_in_the_order_of_the_published_payload(tmp_path: Path) -> None:
    run = a_run(
        tmp_path / "out",
        env={"API_KEY": "value-of-key", "PLAIN": "1"},
        secretEnv={"B": "file:///run/secrets/b", "A": "vault://secret/team/app#field"},
    )

    assert reproduce_command(run, module=".")[-4:] == [
        "--secrets=file:///run/secrets/b",
        "--secrets=vault://team/app.field",
        "--secrets=env://API_KEY",
        "check",
    ]


def test_a_secrets_address_is_daggers() -> None:
    assert secret_address("env://TOKEN") == "env://TOKEN"
    assert secret_address("file:///a b") == "file:///a b"
    assert secret_address("vault://kv/a/b#c") == "vault://a/b.c"


def test_paths_and_limits_that_are_not_the_defaults_are_in_the_line() -> None:
    payload = parse_any({"image": "busybox", "command": ["true"]})
    defaults = Defaults(workdir="/srv/jobs", timeout_seconds=60)
    line = reproduce_line(plan_task(payload, job_id="j", defaults=defaults), image="busybox")

    assert "--jobs-dir=/srv/jobs --timeout-seconds=60 check" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no run.json"),
        ("no json", "is not the run.json of a run"),
        ("{}", "is not the run.json of a run"),
        ('{"reproduce": "rm -rf /"}', "is not a call of this module"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(NoRunError, match=message):
        reproduce_command(tmp_path)


def test_several_runs_are_not_guessed_between(tmp_path: Path) -> None:
    for name in ("a", "b"):
        a_run(tmp_path / name / "metadata")
    with pytest.raises(NoRunError, match="has several runs; name one"):
        reproduce_command(tmp_path)


def reproduce(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moonmind_ext.cli", "reproduce", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path},
    )


def test_the_command_prints_the_line_or_becomes_it(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a run")
    fake = tmp_path / "bin" / "dagger"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor last; do :; done; echo "ran $last"; exit 37\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    path = f"{fake.parent}:/usr/bin:/bin"

    printed = reproduce(str(run), "--module=/m", path=path)
    ran = reproduce(str(run), "--module=/m", "--run", path=path)
    shell = reproduce(str(run), "--module=/m", "--shell", path=path)
    nowhere = reproduce(str(run), "--run", path=str(tmp_path))

    assert printed.returncode == 0
    assert printed.stdout.startswith("dagger -m /m call run '--payload=")
    assert (ran.returncode, ran.stdout) == (37, "ran check\n")
    assert (shell.returncode, shell.stdout) == (37, "ran terminal\n")
    assert nowhere.returncode == 75
    assert "no `dagger` on PATH" in nowhere.stderr
