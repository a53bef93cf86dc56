"""`dagger call` and the worker give the same for the same payload.

Needs a real engine, found as `moonmind-ext run` finds it, that can run Python modules.
"""

import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.session import open_session
from moonmind_ext.reproduce import reproduce_command
from moonmind_ext.run.task import RunRequest, run_task
from pipelines.payload import parse_any
from pipelines.plan import plan_task
from tests.conformance.support import Watcher
from tests.engines import real_engine_problem

ROOT = Path(__file__).parents[2]
REGISTRY = os.environ.get("MOONMIND_TEST_REGISTRY", "docker.io/library")
CALL_SECONDS = 240
"""The first call builds the module's runtime."""


def call(*words: str, directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    dagger = os.environ.get("_EXPERIMENTAL_DAGGER_CLI_BIN") or shutil.which("dagger")
    assert dagger is not None
    command = [dagger, "--silent", "--mod", str(ROOT), *words]
    return subprocess.run(
        command,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=CALL_SECONDS,
        check=False,
        env={**os.environ, "TOKEN": "value-of-token"},
    )


@cache
def module_problem() -> str | None:
    """Say why the module cannot run; asked once."""
    if problem := real_engine_problem():
        return problem
    if not (os.environ.get("_EXPERIMENTAL_DAGGER_CLI_BIN") or shutil.which("dagger")):
        return "there is no dagger command"
    answer = call("functions")
    return None if answer.returncode == 0 else f"no Python module runtime: {answer.stderr[-300:]}"


@pytest.fixture(autouse=True)
def module_runtime() -> None:
    if problem := module_problem():
        pytest.skip(problem)


SCRIPT = r"""
cat README.md; echo to stderr >&2; printf 'a\0b' > $ARTIFACT_DIR/bytes; mkdir -p $ARTIFACT_DIR/d/e
cd $ARTIFACT_DIR; pwd > d/e/where; chmod 755 bytes; ln -s d/e/where link
ln -s /etc/passwd '*'; ln -s ../../.. '!bytes'; ln -s / ' [d] '; mkfifo pipe; echo $TOKEN | head -c 5
exit 143
"""


@pytest.mark.timeout(2 * CALL_SECONDS)
async def test_the_module_and_the_worker_give_the_same(tmp_path: Path) -> None:
    workspace, output = tmp_path / "workspace", tmp_path / "worker"
    workspace.mkdir()
    (workspace / "README.md").write_text("# widgets\n")
    container = {
        "image": f"{REGISTRY}/busybox:1.36",
        "command": ["sh", "-c", SCRIPT],
        "secretEnv": {"TOKEN": "env://TOKEN"},
    }
    (tmp_path / "payload.json").write_text(json.dumps(container))
    async with open_session(EngineChoice.DAGGER, environment=os.environ) as session:
        payload = parse_any(container)
        report = await run_task(
            session,
            RunRequest(
                payload=payload,
                plan=plan_task(payload, job_id="same"),
                workspace=workspace,
                output=output,
                secrets={"TOKEN": "value-of-token"},
            ),
            Watcher(),
        )

    run = ["call", "run", "--payload=payload.json", "--workspace=workspace", "--job-id=same"]
    run.append("--secrets=env://TOKEN")
    exported = call(*run, "result", "export", "--path=module", directory=tmp_path)
    assert exported.returncode == 0, exported.stderr

    theirs = json.loads((output / "container/metadata/run.json").read_text())
    ours = json.loads((tmp_path / "module/run.json").read_text())
    same = ("outcome", "exitCode", "error", "artifacts", "imageDigest", "workdir", "artifactDir")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert report.exit_code == 143
    assert (tmp_path / "module/exit-code").read_text() == "143\n"
    assert tree(tmp_path / "module/artifacts") == tree(output / "container", {"logs", "metadata"})
    assert (tmp_path / "module/logs/runner.log").read_bytes() == (
        output / "container/logs/runner.log"
    ).read_bytes()
    assert (tmp_path / "module/payload.json").read_bytes() == (
        output / "container/metadata/payload.json"
    ).read_bytes()
    assert ours["reproduce"] == theirs["reproduce"]

    again = reproduce_command(output, module=str(ROOT))
    checked = call(*again[3:], directory=workspace)
    assert checked.returncode == 143
    assert "# widgets\nto stderr\n" in checked.stderr


def tree(root: Path, without: set[str] | None = None) -> dict[str, Any]:
    """Give every file's mode and bytes, and every link's target."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if name.parts[0] in (without or set()) or path.is_dir():
            continue
        content = path.readlink() if path.is_symlink() else (path.stat().st_mode, path.read_bytes())
        found[str(name)] = content
    return found
