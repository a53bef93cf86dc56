"""No process, file or directory outlives its owner, whatever ends it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import dagger
import httpx
import pytest

from moonmind_ext.embedded import serve
from tests.embedded.support import Connect, connected, host, shell
from tests.embedded.test_commands import running

NUMBERS = iter(range(860_000, 869_999))


@pytest.fixture
def marker() -> str:
    """An argument for `sleep` that nobody else has."""
    return f"{next(NUMBERS)}.{os.getpid()}"


async def eventually(condition: Callable[[], bool], seconds: float = 5) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        await anyio.sleep(0.005)
    return time.monotonic() - began


async def test_a_cancelled_query_kills_its_command_at_once(connect: Connect, marker: str) -> None:
    async with connect() as dag:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(shell(host(dag), f"setsid sleep {marker} & sleep {marker}").sync)
            await eventually(lambda: len(running(marker)) == 2)
            tasks.cancel_scope.cancel()
        assert await eventually(lambda: not running(marker)) < 0.5
        assert await shell(host(dag), "echo still here").stdout() == "still here\n"


async def test_a_cancelled_query_spares_a_command_that_another_waits_for(
    connect: Connect, marker: str
) -> None:
    async with connect() as dag:
        ran = shell(host(dag), f"sleep {marker} & sleep 1; echo done")
        outputs: list[str] = []

        async def wait() -> None:
            outputs.append(await ran.stdout())

        async with anyio.create_task_group() as both:
            both.start_soon(wait)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ran.stdout)
                await eventually(lambda: len(running(marker)) == 1)
                tasks.cancel_scope.cancel()
    assert outputs == ["done\n"]


async def test_a_command_that_was_cancelled_runs_when_it_is_asked_for_again(
    connect: Connect, marker: str
) -> None:
    async with connect() as dag:
        ran = shell(
            host(dag).with_mounted_cache("/c", dag.cache_volume("v")),
            f"test -e /c/x && echo second || {{ touch /c/x; sleep {marker}; }}",
        )
        with anyio.move_on_after(1):
            await ran.stdout()
        assert await ran.stdout() == "second\n"


async def test_the_end_of_the_session_kills_its_commands_and_removes_its_files(
    sandbox: None, tmp_path: Path, marker: str
) -> None:
    async with serve(state_dir=tmp_path) as engine, connected(engine) as dag:
        shut = "mkdir -p /w/a/b; touch /w/a/b/c; chmod 0 /w/a/b /w/a; echo left >/tmp/x"
        await shell(host(dag).with_mounted_directory("/w", dag.directory()), shut).sync()
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(shell(host(dag), f"sleep {marker}").sync())
            await eventually(lambda: bool(running(marker)))
            task.cancel()
        lost = asyncio.create_task(swallow(shell(host(dag), f"sleep 0 && sleep {marker}")))
        await eventually(lambda: bool(running(marker)))
    assert not running(marker)
    assert not list((tmp_path / "sessions").iterdir())
    await lost


async def swallow(container: dagger.Container) -> None:
    with pytest.raises((dagger.DaggerError, httpx.HTTPError)):
        await container.sync()


async def test_a_deep_tree_is_removed_too(sandbox: None, tmp_path: Path) -> None:
    async with serve(state_dir=tmp_path) as engine, connected(engine) as dag:
        if await shell(host(dag), "command -v python3", expect=dagger.ReturnType.ANY).exit_code():
            pytest.skip("needs a python3 on the host")
        # Deeper than a path can be long.
        deep = "import os\nfor _ in range(2000): os.mkdir('d' * 10); os.chdir('d' * 10)"
        await host(dag).with_workdir("/root/deep").with_exec(["python3", "-c", deep]).sync()
    assert not list((tmp_path / "sessions").iterdir())


async def test_kill_is_what_a_sigkill_is_to_a_real_engine(
    sandbox: None, tmp_path: Path, marker: str
) -> None:
    async with serve(state_dir=tmp_path) as engine, connected(engine) as dag:
        task = asyncio.create_task(swallow(shell(host(dag), f"sleep {marker}")))
        await eventually(lambda: bool(running(marker)))
        began = time.monotonic()
        await engine.kill()
        await task
        assert time.monotonic() - began < 2
        assert not running(marker)
        with pytest.raises((dagger.DaggerError, httpx.HTTPError)):
            await dag.version()
        with pytest.raises(httpx.ConnectError):
            async with httpx.AsyncClient(trust_env=False) as http:
                await http.get(f"http://127.0.0.1:{engine.port}/query")
        await engine.kill()


VICTIM = """
import anyio, sys
from pathlib import Path
from moonmind_ext.embedded import serve
sys.path.insert(0, sys.argv[3])
from tests.embedded.support import connected, host, shell

async def main():
    async with serve(state_dir=Path(sys.argv[1])) as engine, connected(engine) as dag:
        await shell(host(dag), f"sleep {sys.argv[2]}").sync()

anyio.run(main)
"""


async def test_after_a_sigkill_commands_die_and_the_next_session_clears_away(
    sandbox: None, tmp_path: Path, marker: str
) -> None:
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(tmp_path), marker, root], cwd=root
    ) as victim:
        await eventually(lambda: bool(running(marker)), 20)
        (left,) = (tmp_path / "sessions").iterdir()
        async with serve(state_dir=tmp_path):
            assert left.exists()  # It lives, so it is left alone.
        victim.send_signal(signal.SIGKILL)
    await eventually(lambda: not running(marker))
    async with serve(state_dir=tmp_path):
        assert not left.exists()
