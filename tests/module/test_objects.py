"""What the functions give, with the embedded engine in the place of a real one."""

import json
from pathlib import Path
from typing import Any

import dagger
import pytest
from dagger import dag

from pipelines.module import Moonmind, TaskRun
from tests.module.conftest import Engine

HELPER = "embedded.test/busybox"

# The SDK's decorators hide from mypy what they decorate.
Module: Any = Moonmind


async def run(container: dict[str, Any], **arguments: Any) -> Any:
    payload = dag.file("payload.json", json.dumps({"image": "busybox", **container}))
    workspace = dag.directory().with_new_file("README.md", "# widgets\n")
    arguments.setdefault("workspace", workspace)
    return await Module(helper_image=HELPER).run(payload, **arguments)


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


async def test_a_task_that_succeeds_has_everything_in_one_result(
    engine: Engine, tmp_path: Path
) -> None:
    async with engine():
        done = await run(
            {"command": sh("cat README.md; echo oops >&2; echo a > $ARTIFACT_DIR/a")}, job_id="j-1"
        )

        assert (done.exit_code, done.outcome) == (0, "succeeded")
        assert await done.stdout() == "# widgets\noops\n"
        assert done.stderr().endswith("succeeded: exit code 0\n")
        assert await done.check() == "# widgets\noops\nsucceeded: exit code 0\n"
        assert await done.artifacts.entries() == ["a"]
        await done.result.export(str(tmp_path / "result"))
    files = {str(p.relative_to(tmp_path / "result")) for p in tmp_path.glob("result/**/*")}
    assert files == {
        "artifacts",
        "artifacts/a",
        "exit-code",
        "logs",
        "logs/runner.log",
        "payload.json",
        "run.json",
    }
    report = json.loads((tmp_path / "result/run.json").read_text())
    assert report["jobId"] == "j-1"
    assert report["outcome"] == "succeeded"
    assert [file["path"] for file in report["artifacts"]["files"]] == ["a"]
    assert (tmp_path / "result/exit-code").read_text() == "0\n"


@pytest.mark.parametrize("code", [3, 139, 255])
async def test_check_ends_with_the_commands_own_exit_code_and_shows_its_end(
    engine: Engine, code: int
) -> None:
    async with engine():
        done = await run({"command": sh(f"echo first; printf 'la\\0st\\n'; exit {code}")})

        assert (done.exit_code, done.outcome) == (code, "command-failed")
        with pytest.raises(dagger.ExecError) as failure:
            await done.check()
    assert failure.value.exit_code == code
    assert "first\nlast\n" in failure.value.stderr
    assert f"container command failed ({code}): last" in failure.value.stderr


async def test_a_time_limit_ends_with_124_and_keeps_the_artifacts(engine: Engine) -> None:
    async with engine():
        done = await run({"command": sh("echo a > $ARTIFACT_DIR/a; sleep 60"), "timeoutSeconds": 1})

        assert (done.exit_code, done.outcome) == (124, "timed-out")
        assert await done.artifacts.entries() == ["a"]


async def test_an_image_that_is_not_there_is_a_result_too(engine: Engine) -> None:
    async with engine():
        done = await run({"command": ["true"]}, image="embedded.test/missing:1")

        assert (done.exit_code, done.outcome) == (69, "image-unavailable")
        report = json.loads(await done.report.contents())
        assert report["exitCode"] is None
        with pytest.raises(RuntimeError, match="is not available"):
            await done.check()
        with pytest.raises(RuntimeError, match="no container to look into"):
            done.terminal()


async def test_changes_have_what_the_command_did_to_the_workspace(engine: Engine) -> None:
    script = "echo n > new; rm README.md; mkdir .git; echo h > .git/hook; ln -s /etc/passwd link"
    async with engine():
        done = await run({"command": sh(script)})

        assert await done.changes.added_paths() == ["new"]
        assert await done.changes.removed_paths() == ["README.md"]
        report = json.loads(await done.report.contents())
    assert report["workspace"]["writtenBack"] == {
        "added": ["new"],
        "modified": [],
        "removed": ["README.md"],
        "refused": {"link": "is a symbolic link with an absolute target"},
    }


async def test_hostile_artifacts_stay_in_the_engine_and_are_named(engine: Engine) -> None:
    script = (
        "cd $ARTIFACT_DIR; echo a > a; echo b > b; ln -s /etc '*'; ln -s ../../x '!b'; "
        "ln -s a good; mkfifo pipe; mkdir metadata; echo x > metadata/run.json"
    )
    async with engine():
        done = await run({"command": sh(script)})

        assert sorted(await done.artifacts.glob("**")) == ["a", "b", "good", "metadata/"]
        report = json.loads(await done.report.contents())
    assert sorted(report["artifacts"]["refused"]) == ["!b", "*", "metadata/run.json", "pipe"]


async def test_secrets_are_matched_in_the_payloads_order_and_masked(
    engine: Engine, tmp_path: Path
) -> None:
    async with engine():
        secrets = [dag.set_secret("1", "value-of-one"), dag.set_secret("2", "value-of-two")]
        done = await run(
            {
                "command": sh('echo "$ONE $TWO"; [ "$TWO" = value-of-two ]'),
                "secretEnv": {"ONE": "env://ONE", "TWO": "vault://secret/a/b#two"},
            },
            secrets=secrets,
        )

        assert done.exit_code == 0
        assert await done.stdout() == "*** ***\n"
        await done.result.export(str(tmp_path / "result"))
        report = json.loads(await done.report.contents())
    everything = "".join(p.read_text() for p in tmp_path.glob("result/**/*") if p.is_file())
    assert "value-of" not in everything
    assert "--secrets=env://ONE --secrets=vault://a/b.two check" in report["reproduce"]


async def test_a_missing_secret_is_named(engine: Engine) -> None:
    async with engine():
        with pytest.raises(ValueError, match="missing: TWO"):
            await run(
                {"command": ["true"], "secretEnv": {"ONE": "env://A", "TWO": "env://B"}},
                secrets=[dag.set_secret("a", "value-of-a")],
            )
        with pytest.raises(ValueError, match="none; 1 too many"):
            await run({"command": ["true"]}, secrets=[dag.set_secret("a", "value-of-a")])


async def test_a_payload_that_is_wrong_is_refused_by_its_fields(engine: Engine) -> None:
    async with engine():
        with pytest.raises(ValueError, match=r"task\.container\.timeoutSeconds must be"):
            await run({"command": ["true"], "timeoutSeconds": 0})


async def test_flags_alone_make_a_task(engine: Engine) -> None:
    async with engine():
        done = await Module(helper_image=HELPER).container(
            image="busybox",
            command=sh("echo $GREETING, $WHO"),
            workspace=dag.directory(),
            env=["GREETING=hi=there"],
            secret_names=["WHO"],
            secrets=[dag.set_secret("who", "everybody")],
        )

        assert await done.stdout() == "hi=there, ***\n"
        with pytest.raises(ValueError, match="must be NAME=VALUE"):
            await Module().container(
                image="busybox", command=["true"], workspace=dag.directory(), env=["nothing"]
            )


async def test_paths_and_limits_are_those_that_are_asked_for(engine: Engine) -> None:
    async with engine():
        done = await run(
            {"command": sh("pwd")}, job_id="j-2", jobs_dir="/work/elsewhere", timeout_seconds=77
        )

        assert await done.stdout() == "/work/elsewhere/j-2/repo\n"
        line = json.loads(await done.report.contents())["reproduce"]
    assert "--jobs-dir=/work/elsewhere" in line
    assert "--timeout-seconds=77" in line


async def test_a_run_travels_from_call_to_call_and_is_not_run_again(engine: Engine) -> None:
    """As Dagger does it between `run` and `check`: as JSON, objects by their ids."""
    module = Module.__dagger_module__
    async with engine():
        done = await run({"command": sh("cat /proc/sys/kernel/random/uuid")})
        state = json.loads(json.dumps(await module.unstructure(done, TaskRun)))
        again = await module.structure(state, TaskRun)

        assert await again.stdout() == await done.stdout()
        assert again.exit_code == 0
        assert state["exit_code" if "exit_code" in state else "exitCode"] == 0


async def test_a_log_over_the_limit_keeps_its_ends_masked(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.engine_run.LOG_LIMIT_BYTES", 200)
    script = 'echo begin $S; i=0; while [ $i -lt 99 ]; do echo "line $i $S"; i=$((i+1)); done'
    async with engine():
        done = await run(
            {"command": sh(script), "secretEnv": {"S": "env://S"}},
            secrets=[dag.set_secret("s", "value-of-secret")],
        )

        text = await done.stdout()
        report = json.loads(await done.report.contents())
    assert text.startswith("begin ***\n")
    assert text.endswith("line 98 ***\n")
    assert "only the beginning and the end are kept" in text
    assert len(text) < 500
    assert report["log"]["truncated"] is True
    assert report["log"]["bytes"] > 1000
