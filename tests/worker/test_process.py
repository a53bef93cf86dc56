"""Programs of a job's stages: their limits, their children, and what the log says."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from moonmind_ext.run.stage_log import StageLog
from moonmind_ext.worker.process import OUTPUT_BYTES, CommandError, Runner
from pipelines.masking import Masker
from tests.worker.servers import until

SECRET = "s3cret-0123456789"


@contextmanager
def runner_in(folder: Path, **variables: str) -> Iterator[Runner]:
    environment = {"PATH": os.environ["PATH"], **variables}
    with StageLog(folder / "stage.log", Masker([SECRET])) as log:
        yield Runner(folder, environment, log)


def is_running(pid: int) -> bool:
    """Whether a process is there; one that nobody has waited for yet is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def pids(file: Path, count: int) -> list[int]:
    found = [int(word) for word in file.read_text().split()] if file.is_file() else []
    return found if len(found) == count else []


FAMILY = """
sh -c 'sleep 600 & echo $! >>pids; wait' &
echo $! >>pids
echo $$ >>pids
wait
"""
"""A shell, its child, and the child's own child."""


async def test_a_program_gives_its_standard_output(tmp_path: Path) -> None:
    with runner_in(tmp_path) as runner:
        assert await runner.run("sh", "-c", "echo out; echo err >&2", seconds=30) == "out\n"
    log = (tmp_path / "stage.log").read_text()
    assert "$ sh -c echo out; echo err >&2\n" in log
    assert "  out\n" in log
    assert "  err\n" in log


async def test_a_program_runs_in_its_directory_with_its_environment_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONMIND_WORKER_TOKEN", SECRET)
    with runner_in(tmp_path, NAME="value") as runner:
        code = "import os; print(os.getcwd(), sorted(set(os.environ) - {'LC_CTYPE'}))"
        said = await runner.run(sys.executable, "-c", code, seconds=30)
    assert said == f"{tmp_path} ['NAME', 'PATH']\n"


async def test_a_program_has_nothing_to_read(tmp_path: Path) -> None:
    with runner_in(tmp_path) as runner:
        assert await runner.run("cat", seconds=30) == ""


async def test_a_failure_says_program_code_and_last_line(tmp_path: Path) -> None:
    with runner_in(tmp_path) as runner:
        with pytest.raises(CommandError) as error:
            await runner.run("sh", "-c", "echo o; printf 'a\\nwhy\\n\\n' >&2; exit 7", seconds=30)
        assert str(error.value) == "sh -c failed (7): why"
        assert error.value.output == "o\na\nwhy\n\n"
        # Some say what is wrong on their standard output.
        with pytest.raises(CommandError, match=r"^sh -c failed \(3\): the reason$"):
            await runner.run("sh", "-c", "echo the reason; exit 3", seconds=30)
        with pytest.raises(CommandError, match=r"^sh -c failed \(-9\): $"):
            await runner.run("sh", "-c", "kill -9 $$", seconds=30)


async def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with runner_in(tmp_path) as runner:
        with pytest.raises(CommandError, match=r"^no-such-program: No such file or directory$"):
            await runner.run("no-such-program", "--option", seconds=30)
        (tmp_path / "plain").write_text("")
        with pytest.raises(CommandError, match=r"plain: Permission denied$"):
            await runner.run(str(tmp_path / "plain"), seconds=30)


@pytest.mark.parametrize("argument", ["a\0b", "\ud800", "x" * (1 << 20)])
async def test_an_argument_that_no_program_can_get_is_a_failure_of_the_program(
    tmp_path: Path, argument: str
) -> None:
    # Names of branches and messages come from payloads.
    with runner_in(tmp_path) as runner, pytest.raises(CommandError, match=r"^echo: "):
        await runner.run("echo", argument, seconds=30)


async def test_the_limit_ends_a_program_with_its_children_and_theirs(tmp_path: Path) -> None:
    too_long = pytest.raises(CommandError, match=r"^sh: no end within 1s$")
    with runner_in(tmp_path) as runner, too_long:
        await runner.run("sh", "-c", FAMILY, seconds=1)
    family = pids(tmp_path / "pids", 3)
    assert family
    await until(lambda: not any(map(is_running, family)))


async def test_a_program_that_is_stopped_takes_its_children_with_it(tmp_path: Path) -> None:
    with runner_in(tmp_path) as runner:
        async with anyio.create_task_group() as tasks:

            async def run() -> None:
                await runner.run("sh", "-c", FAMILY, seconds=600)

            tasks.start_soon(run)
            await until(lambda: bool(pids(tmp_path / "pids", 3)))
            family = pids(tmp_path / "pids", 3)
            assert all(map(is_running, family))
            tasks.cancel_scope.cancel()
    await until(lambda: not any(map(is_running, family)))


async def test_what_a_program_leaves_behind_neither_holds_it_up_nor_lives_on(
    tmp_path: Path,
) -> None:
    # git and ssh like to leave a process in the background, with the output open.
    with runner_in(tmp_path) as runner:
        script = "sleep 600 & echo $! >pids; echo done"
        assert await runner.run("sh", "-c", script, seconds=60) == "done\n"
    left = pids(tmp_path / "pids", 1)
    assert left
    await until(lambda: not is_running(left[0]))


async def test_no_secret_gets_into_the_log(tmp_path: Path) -> None:
    with runner_in(tmp_path) as runner:
        script = f"echo token {SECRET}; echo again {SECRET} >&2"
        # The caller gets it as it is.
        assert SECRET in await runner.run("sh", "-c", script, seconds=30)
    log = (tmp_path / "stage.log").read_text()
    assert SECRET not in log
    assert "token ***" in log
    assert "again ***" in log


async def test_output_is_kept_up_to_a_limit_and_read_to_its_end(tmp_path: Path) -> None:
    with runner_in(tmp_path) as runner:
        # With a line break, so that the log has lines.
        script = f"yes | head -c {3 * OUTPUT_BYTES}; echo end >&2; exit 1"
        with pytest.raises(CommandError, match="end$") as error:
            await runner.run("sh", "-c", script, seconds=60)
    assert len(error.value.output) == OUTPUT_BYTES + len("end\n")


async def test_output_that_is_no_text_is_no_failure(tmp_path: Path) -> None:
    with runner_in(tmp_path) as runner:
        said = await runner.run("printf", r"a\377b", seconds=30)
    assert said == "a\N{REPLACEMENT CHARACTER}b"
