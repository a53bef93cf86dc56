from pipelines.report import Outcome
from tests.conformance.support import Result, Task, sh


def assert_timed_out(result: Result, seconds: int = 1) -> None:
    report = result.report
    assert report.outcome is Outcome.TIMED_OUT
    assert report.timed_out
    assert report.exit_code == 124
    assert report.error == f"container execution timed out after {seconds}s"
    assert not report.retryable


async def test_a_command_that_obeys_is_ended_by_sigterm(task: Task) -> None:
    result = await task(*sh("echo before > $ARTIFACT_DIR/before; sleep 60"), timeoutSeconds=1)

    assert_timed_out(result)
    assert result.artifact("before") == "before\n"
    assert result.report.duration_seconds < 5


async def test_a_command_that_ignores_sigterm_is_killed_after_its_grace(task: Task) -> None:
    result = await task(
        *sh("trap '' TERM; echo before > $ARTIFACT_DIR/before; sleep 60; sleep 60"),
        timeoutSeconds=1,
        gracePeriodSeconds=2,
    )

    assert_timed_out(result)
    assert result.artifact("before") == "before\n"
    assert 2.9 < result.report.duration_seconds < 8


async def test_a_grandchild_gets_sigterm_and_may_still_write_an_artifact(task: Task) -> None:
    grandchild = (
        "trap 'sleep 1; echo saved > $ARTIFACT_DIR/saved; exit' TERM; while :; do sleep 0.1; done"
    )
    result = await task(
        "sh", "-c", 'sh -c "$0" & sleep 60', grandchild, timeoutSeconds=1, gracePeriodSeconds=10
    )

    assert_timed_out(result)
    assert result.artifact("saved") == "saved\n"


async def test_a_grandchild_that_ignores_sigterm_is_killed(task: Task) -> None:
    grandchild = "trap '' TERM; while :; do sleep 0.1; date > $ARTIFACT_DIR/alive; done"
    result = await task(
        "sh", "-c", 'sh -c "$0" & sleep 60', grandchild, timeoutSeconds=1, gracePeriodSeconds=1
    )

    assert_timed_out(result)
    assert 1.9 < result.report.duration_seconds < 6


async def test_a_background_child_that_holds_the_output_delays_nothing(task: Task) -> None:
    result = await task(*sh("sleep 60 & echo done"), timeoutSeconds=30)

    assert result.report.outcome is Outcome.SUCCEEDED
    assert result.log == b"done\n"
    assert result.report.duration_seconds < 5


async def test_such_a_child_delays_no_timeout_either(task: Task) -> None:
    result = await task(
        *sh("(trap '' TERM; sleep 60) & sleep 60"), timeoutSeconds=1, gracePeriodSeconds=1
    )

    assert_timed_out(result)
    assert result.report.duration_seconds < 6


async def test_what_was_printed_before_the_limit_is_in_the_log(task: Task) -> None:
    result = await task(*sh("echo one; echo two >&2; sleep 60"), timeoutSeconds=1)

    assert_timed_out(result)
    assert result.log == b"one\ntwo\n"
