"""The CI examples: linted where the linters are, and the script really run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.payload import loads, parse_payload, warnings_of

ROOT = Path(__file__).parents[2]
SCRIPTS = ["examples/ci/run.sh", "pipelines/listing.sh", "pipelines/supervisor.sh", ".ci/run"]
EXAMPLES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("examples/*/payload.json"))
WORKFLOWS = [".github/workflows/ci.yml", "examples/ci/github.yml"]

FAKE_DAGGER = """#!/bin/sh
echo "$@" >"$CALLED"
for last; do :; done
[ "$ENDS" = engine-failed ] && exit 1
mkdir -p "${last#--path=}/logs"
echo 'the log' >"${last#--path=}/logs/runner.log"
echo "$ENDS" >"${last#--path=}/exit-code"
"""


def linter(name: str) -> str:
    # Beside this Python first: shellcheck is one of the development tools.
    here = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([here, os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"there is no {name} on PATH")
    return found


def test_scripts_pass_shellcheck() -> None:
    subprocess.run([linter("shellcheck"), *SCRIPTS], cwd=ROOT, check=True)


def test_workflows_pass_actionlint() -> None:
    subprocess.run([linter("actionlint"), *WORKFLOWS], cwd=ROOT, check=True)


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_no_expression_reaches_a_shell(workflow: str) -> None:
    """Branch names and titles are written by strangers."""
    text = (ROOT / workflow).read_text()
    expressions = [line.strip() for line in text.splitlines() if "${{" in line]
    assert [line for line in expressions if not line.startswith("group: ")] == []


@pytest.mark.parametrize("payload", [".github/tests.payload.json", *EXAMPLES])
def test_payloads_are_valid_and_without_warnings(payload: str) -> None:
    assert warnings_of(parse_payload(loads((ROOT / payload).read_bytes()))) == []


def run_script(tmp_path: Path, ends: str) -> subprocess.CompletedProcess[str]:
    fake = tmp_path / "bin" / "dagger"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(FAKE_DAGGER)
    fake.chmod(0o755)
    return subprocess.run(
        [ROOT / "examples/ci/run.sh", "p.json", "work space", tmp_path / "result"],
        env={
            "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}",
            "CALLED": str(tmp_path / "called"),
            "ENDS": ends,
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("code", [0, 37, 124])
def test_the_script_keeps_the_result_and_ends_as_the_task_did(tmp_path: Path, code: int) -> None:
    ended = run_script(tmp_path, str(code))

    assert ended.returncode == code
    assert ended.stderr == "the log\n"
    assert (
        "call run --payload=p.json --workspace=work space result export"
        in (tmp_path / "called").read_text()
    )


def test_the_script_does_not_take_an_earlier_result_for_this_one(tmp_path: Path) -> None:
    run_script(tmp_path, "0")
    assert run_script(tmp_path, "37").returncode == 2


def test_the_script_fails_with_the_engine(tmp_path: Path) -> None:
    assert run_script(tmp_path, "engine-failed").returncode == 1


def test_the_versions_of_dagger_are_the_modules() -> None:
    version = json.loads((ROOT / "dagger.json").read_text())["engineVersion"].removeprefix("v")
    for file in [*WORKFLOWS, "examples/ci/gitlab-ci.yml"]:
        assert version in (ROOT / file).read_text(), file
