import anyio

from pipelines.report import Outcome
from tests.conformance.support import Task, Watcher, sh


async def test_output_is_seen_while_the_task_runs(task: Task) -> None:
    watcher = Watcher()
    script = "echo first; while ! [ -e /witness/go ]; do sleep 0.1; done"
    seen: list[str] = []

    async def wait_and_stop(stop: anyio.Event) -> None:
        await watcher.printed.wait()
        seen.append(watcher.live)
        stop.set()

    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait_and_stop, stop)
        with anyio.fail_after(60):
            result = await task(*sh(script), watcher=watcher, stop=stop)

    assert seen == ["first\n"]
    assert result.report.outcome is Outcome.CANCELLED


async def test_live_output_is_the_commands_and_nothing_else(task: Task) -> None:
    result = await task(*sh("echo one; echo two >&2; sleep 0.5; printf three; exit 3"))

    assert result.watcher.live == "one\ntwo\nthree"
    offsets = [e.payload["offset"] for e in result.watcher.events if "offset" in e.payload]
    assert offsets[0] == 0
    assert offsets == sorted(offsets)


async def test_a_hundred_thousand_lines_are_complete_and_in_order(task: Task) -> None:
    script = "i=0; while [ $i -lt 100000 ]; do echo line $i; i=$((i+1)); done"
    result = await task(*sh(script))

    assert result.log.decode() == "".join(f"line {i}\n" for i in range(100_000))
    assert not result.report.log.truncated
    assert result.report.log.bytes == len(result.log)


async def test_stdout_and_stderr_are_one_in_the_order_of_their_writing(task: Task) -> None:
    result = await task(*sh("for i in 1 2 3 4 5; do echo out$i; echo err$i >&2; done"))

    assert result.log.decode().split() == [f"{s}{i}" for i in range(1, 6) for s in ("out", "err")]


async def test_bytes_that_are_no_text_are_in_the_log_as_they_are(task: Task) -> None:
    script = r"printf 'a\377\376\000b\303'; printf '\251 c'"
    result = await task(*sh(script))

    assert result.log == b"a\xff\xfe\x00b\xc3\xa9 c"
    assert result.report.exit_code == 0


async def test_a_log_over_the_limit_keeps_its_ends_and_says_so(task: Task) -> None:
    script = "echo begin; i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; echo end"
    result = await task(*sh(f"{script}; exit 3"), log_limit_bytes=10_000)

    assert result.report.exit_code == 3
    assert result.report.log.truncated
    assert result.report.log.bytes > 200_000
    assert result.log.startswith(b"begin\nline 0\n")
    assert result.log.endswith(b"line 19999\nend\n")
    assert len(result.log) < 10_500
    assert b"the log limit is exceeded" in result.log
    assert result.report.error == "container command failed (3): end"


async def test_no_output_is_an_empty_log(task: Task) -> None:
    result = await task("true")

    assert result.log == b""
    assert result.watcher.live == ""


async def test_a_stopped_task_has_its_grace_and_brings_back_what_it_has(task: Task) -> None:
    watcher = Watcher()
    stop = anyio.Event()

    async def stop_when_it_prints() -> None:
        await watcher.printed.wait()
        stop.set()

    script = (
        "trap 'echo saved > $ARTIFACT_DIR/saved; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_when_it_prints)
        with anyio.fail_after(60):
            result = await task(*sh(script), watcher=watcher, stop=stop)

    assert result.report.outcome is Outcome.CANCELLED
    assert result.report.error == "container execution was cancelled"
    assert result.artifact("saved") == "saved\n"
    assert result.log.startswith(b"up\n")


async def test_a_task_that_is_stopped_before_it_began_never_begins(task: Task) -> None:
    stop = anyio.Event()
    stop.set()
    result = await task(*sh("echo ran > $ARTIFACT_DIR/ran"), stop=stop)

    assert result.report.outcome is Outcome.CANCELLED
    assert result.report.exit_code is None
    assert result.report.artifacts.files == []
