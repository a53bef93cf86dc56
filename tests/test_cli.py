"""The parts of the command line that need no engine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PAYLOAD = {
    "repository": "acme/widgets",
    "task": {
        "instructions": "Test it.",
        "container": {"enabled": True, "image": "busybox:1.36", "command": ["true"]},
    },
}


def cli(
    *arguments: str, text: str = "", env: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "moonmind_ext.cli", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **(env or {})},
    )


def no_engine(tmp_path: Path) -> dict[str, str]:
    """An environment in which there is no engine to be found."""
    return {
        "PATH": str(tmp_path),
        "_EXPERIMENTAL_DAGGER_RUNNER_HOST": "",
        "_EXPERIMENTAL_DAGGER_CLI_BIN": "",
        "DAGGER_SESSION_PORT": "",
    }


@pytest.mark.parametrize("arguments", [["--help"], ["validate", "-"], ["plan", "-"]])
def test_what_touches_no_engine_imports_no_dagger(arguments: list[str]) -> None:
    script = (
        "import sys, moonmind_ext.cli as cli\n"
        f"sys.argv = ['moonmind-ext', *{arguments!r}]\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(PAYLOAD),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    loaded = result.stderr.splitlines()[-1]
    assert "'moonmind_ext'" in loaded
    for heavy in ("dagger", "gql", "beartype", "opentelemetry", "uvicorn", "oras", "requests"):
        assert f"'{heavy}'" not in loaded


def test_validate_prints_the_canonical_form() -> None:
    result = cli("validate", "-", text=json.dumps(PAYLOAD))

    canonical = json.loads(result.stdout)
    assert result.returncode == 0
    assert canonical["targetRuntime"] == "codex"
    assert canonical["requiredCapabilities"] == ["codex", "git", "docker"]
    assert json.loads(cli("validate", "-", text=result.stdout).stdout) == canonical


def test_validate_names_everything_that_is_wrong_at_once() -> None:
    container = {"enabled": True, "command": [], "timeoutSeconds": 0, "env": {"JOB_ID": "x"}}
    payload = {"repository": "a/b", "task": {"instructions": "x", "container": container}}
    result = cli("validate", "-", text=json.dumps(payload))

    assert result.returncode == 2
    assert result.stdout == ""
    assert "task.container.image is required when task.container.enabled=true" in result.stderr
    for field in ("command", "timeoutSeconds", "JOB_ID"):
        assert field in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "null", "{}"])
def test_what_is_no_payload_is_told_in_a_sentence(text: str) -> None:
    result = cli("validate", "-", text=text)

    assert result.returncode == 2
    assert "the payload is not valid" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_key_is_warned_about_with_the_nearest_known_one() -> None:
    payload: dict[str, Any] = json.loads(json.dumps(PAYLOAD))
    payload["task"]["container"]["timeoutSecond"] = 5
    result = cli("validate", "-", text=json.dumps(payload))

    assert result.returncode == 0
    assert "timeoutSecond" in result.stderr
    assert "timeoutSeconds" in result.stderr


def test_plan_shows_names_and_no_values() -> None:
    payload: dict[str, Any] = json.loads(json.dumps(PAYLOAD))
    payload["task"]["container"] |= {
        "env": {"PLAIN": "plain-value", "API_TOKEN": "token-value"},
        "secretEnv": {"DEPLOY": "env://DEPLOY_KEY"},
        "cacheVolumes": [{"name": "pip", "target": "/root/.cache/pip"}],
    }
    result = cli("plan", "-", "--job-id", "job-1", text=json.dumps(payload))

    assert result.returncode == 0
    for shown in (
        "busybox:1.36",
        "/work/agent_jobs/job-1/repo",
        "PLAIN",
        "API_TOKEN",
        "DEPLOY from env://DEPLOY_KEY",
        "/root/.cache/pip <- cache volume pip",
        "3600 s",
        "dagger ",
    ):
        assert shown in result.stdout
    assert "plain-value" not in result.stdout
    assert "token-value" not in result.stdout + result.stderr


@pytest.mark.parametrize("name", ["python", "node", "dotnet", "unity"])
def test_every_example_is_valid_without_a_warning(name: str) -> None:
    result = cli("validate", str(EXAMPLES / name / "payload.json"))

    assert (result.returncode, result.stderr) == (0, "")


def test_without_an_engine_the_message_lists_what_was_tried(tmp_path: Path) -> None:
    result = cli(
        *("run", "-", "--workspace", str(tmp_path), "--output", str(tmp_path / "out")),
        text=json.dumps(PAYLOAD),
        env=no_engine(tmp_path),
    )

    assert result.returncode == 75
    assert "no Dagger engine could be reached" in result.stderr
    assert "--engine embedded" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) < 10


def test_a_workspace_that_is_not_there_ends_with_66(tmp_path: Path) -> None:
    result = cli("run", "-", "--workspace", str(tmp_path / "no"), text=json.dumps(PAYLOAD))

    assert result.returncode == 66
    assert "is not a directory" in result.stderr


def test_a_secret_that_has_no_value_ends_before_anything_runs(tmp_path: Path) -> None:
    payload: dict[str, Any] = json.loads(json.dumps(PAYLOAD))
    payload["task"]["container"]["secretEnv"] = {"DEPLOY": "env://NOT_SET_ANYWHERE"}
    result = cli("run", "-", "--workspace", str(tmp_path), text=json.dumps(payload))

    assert result.returncode == 2
    assert "task.container.secretEnv.DEPLOY" in result.stderr


def test_doctor_shows_a_line_for_everything_a_run_may_need(tmp_path: Path) -> None:
    result = cli("doctor", env={**no_engine(tmp_path), "COLUMNS": "200"})

    for what in ("Dagger SDK", "Dagger CLI", "Docker", "Dagger engine", "embedded engine"):
        assert what in result.stdout
    assert "_EXPERIMENTAL_DAGGER_RUNNER_HOST" in result.stdout
    assert result.returncode == 75
    assert "Traceback" not in result.stderr
