import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from moonmind_ext.workspace.errors import WorkspaceError
from pipelines.report import Outcome
from tests.conformance.support import Task, Watcher, sh
from tests.engines import Engine


async def test_a_command_that_succeeds_brings_its_artifacts_back(task: Task) -> None:
    result = await task(*sh("cat README.md; echo made > $ARTIFACT_DIR/made.txt"))

    report = result.report
    assert report.outcome is Outcome.SUCCEEDED
    assert report.exit_code == 0
    assert report.error is None
    assert result.log == b"# widgets\n"
    assert result.artifact("made.txt") == "made\n"
    assert [file.path for file in report.artifacts.files] == ["made.txt"]
    assert [file.bytes for file in report.artifacts.files] == [5]
    assert abs(report.started_at - datetime.now(UTC)) < timedelta(minutes=5)


@pytest.mark.parametrize("code", [1, 3, 127, 137, 139, 143, 200, 255])
async def test_every_exit_code_is_the_commands_own_and_its_artifacts_come_back(
    task: Task, code: int
) -> None:
    result = await task(*sh(f"echo last words; echo left > $ARTIFACT_DIR/left; exit {code}"))

    assert result.report.outcome is Outcome.COMMAND_FAILED
    assert result.report.exit_code == code
    assert result.report.error == f"container command failed ({code}): last words"
    assert not result.report.retryable
    assert result.artifact("left") == "left\n"


@pytest.mark.parametrize(("signal", "code"), [("TERM", 143), ("KILL", 137), ("SEGV", 139)])
async def test_a_command_that_dies_of_a_signal_has_128_and_the_signals_number(
    task: Task, signal: str, code: int
) -> None:
    result = await task(*sh(f"echo left > $ARTIFACT_DIR/left; kill -{signal} $$; sleep 5"))

    assert result.report.exit_code == code
    assert result.artifact("left") == "left\n"


async def test_a_program_that_is_not_there_is_the_tasks_own_failure(task: Task) -> None:
    result = await task("no-such-program", "--help")

    assert result.report.outcome is Outcome.COMMAND_FAILED
    assert result.report.exit_code == 127
    assert b"no-such-program" in result.log


async def test_the_files_of_a_run_say_the_same_as_its_report(task: Task) -> None:
    result = await task(*sh("exit 3"), job_id="job-7", timeoutSeconds=60)

    written = json.loads((result.artifacts / "metadata" / "run.json").read_text())
    assert written == json.loads(result.report.to_json())
    assert written["jobId"] == "job-7"
    assert written["containerName"] == "mm-task-job-7"
    assert written["exitCode"] == 3
    assert written["timedOut"] is False
    assert written["timeoutSeconds"] == 60
    assert written["command"] == ["sh", "-c", "exit 3"]
    assert written["commandSummary"] == "sh -c exit 3"
    assert written["outcome"] == "command-failed"
    assert written["workdir"] == "/work/agent_jobs/job-7/repo"
    assert written["artifactDir"] == "/work/agent_jobs/job-7/artifacts/container"
    assert set(written["timings"]) == {"workspace", "image", "execute", "export"}
    assert all(seconds >= 0 for seconds in written["timings"].values())
    assert written["workspace"]["files"] == 1
    assert written["reproduce"].startswith("dagger ")
    stage = (result.output / "logs" / "execute.log").read_text()
    assert "job-7" in stage
    assert "command-failed" in stage


async def test_the_stored_payload_runs_again_and_gives_the_same(task: Task) -> None:
    first = await task(*sh("echo $GREETING > $ARTIFACT_DIR/g"), env={"GREETING": "hello"})
    stored = json.loads((first.artifacts / "metadata" / "payload.json").read_text())
    container = stored["task"]["container"]
    command = container.pop("command")
    for key in ("image", "enabled"):
        container.pop(key)

    again = await task(*command, **container)

    assert again.report.outcome is Outcome.SUCCEEDED
    assert again.artifact("g") == first.artifact("g") == "hello\n"


async def test_events_are_moonminds_own_with_the_outcome_beside(task: Task) -> None:
    result = await task(*sh("echo hi; exit 2"), job_id="job-8")

    first, *logs, last = result.watcher.events
    assert first.message == "moonmind.task.container.started"
    assert first.payload == {
        "image": result.report.image,
        "command": "sh -c echo hi; exit 2",
        "pullMode": "if-missing",
        "timeoutSeconds": 3600,
    }
    assert {event.message for event in logs} == {"moonmind.task.container.log"}
    assert last.message == "moonmind.task.container.finished"
    assert last.level == "error"
    assert last.payload == {
        "containerName": "mm-task-job-8",
        "image": result.report.image,
        "command": "sh -c echo hi; exit 2",
        "timedOut": False,
        "exitCode": 2,
        "durationSeconds": result.report.duration_seconds,
        "artifactsSubdir": "container",
        "outcome": "command-failed",
    }


async def test_an_image_that_does_not_exist_is_final(task: Task) -> None:
    result = await task("true", image="missing")

    assert result.report.outcome is Outcome.IMAGE_UNAVAILABLE
    assert result.report.exit_code is None
    assert not result.report.retryable
    assert result.report.error is not None
    assert "is not available" in result.report.error
    assert (result.artifacts / "metadata" / "run.json").exists()


async def test_an_image_without_a_shell_runs_too(task: Task) -> None:
    script = (
        "import os; print(os.path.exists('/bin/sh')); open(os.environ['ARTIFACT_DIR']+'/a','w')"
    )
    result = await task("python3", "-c", script, image="no-shell")

    assert result.log == b"False\n"
    assert result.report.exit_code == 0
    assert [file.path for file in result.report.artifacts.files] == ["a"]


async def test_the_images_entrypoint_is_applied(task: Task) -> None:
    result = await task(*sh("echo entry: $ENTRY"), image="entrypoint")

    assert result.log == b"entry: yes\n"


async def test_a_user_who_is_not_root_can_write_to_workspace_and_artifacts(task: Task) -> None:
    result = await task(
        *sh("id -u; echo w > written; echo a >> README.md; echo a > $ARTIFACT_DIR/a"),
        image="not-root",
        writeBack="changes",
    )

    assert result.log == b"1000\n"
    assert result.report.exit_code == 0
    assert result.artifact("a") == "a\n"
    assert (result.workspace / "written").read_text() == "w\n"
    assert (result.workspace / "README.md").read_text() == "# widgets\na\n"
    assert result.report.workspace is not None
    back = result.report.workspace.written_back
    assert back is not None
    assert (back.added, back.modified, back.removed) == (["written"], ["README.md"], [])


async def test_an_output_directory_in_the_workspace_is_not_part_of_it(
    engine: Engine, task: Task, tmp_path: Path
) -> None:
    # Where the command line's defaults put it.
    async with engine.session() as session:
        for _ in range(2):
            result = await task(
                *sh("find . -type f | sort"),
                workspace=tmp_path,
                files={"README.md": "x"},
                job_id="job-1",
                cache="reuse",
                session=session,
            )

    assert result.log == b"./README.md\n"
    assert result.report.cached


async def test_a_workspace_that_cannot_be_read_leaves_a_report_too(
    task: Task, tmp_path: Path
) -> None:
    watcher = Watcher()
    missing = tmp_path / "not-there"
    with pytest.raises(WorkspaceError, match="not-there"):
        await task("true", workspace=missing, files={}, job_id="job-1", watcher=watcher, make=False)

    report = json.loads((tmp_path / "output-job-1/container/metadata/run.json").read_text())
    assert report["outcome"] == "engine-failed"
    assert not report["retryable"]
    assert watcher.events[-1].message == "moonmind.task.container.finished"
