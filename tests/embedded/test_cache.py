"""What runs again, and what does not."""

from pathlib import Path

import anyio
import dagger
import pytest
from dagger import ReturnType

from tests.embedded.support import Connect, host, shell

UNIQUE = "cat /proc/sys/kernel/random/uuid"


async def test_an_exec_with_the_same_inputs_is_answered_from_the_cache(connect: Connect) -> None:
    async with connect() as dag:
        container = host(dag).with_mounted_directory("/w", dag.directory().with_new_file("f", "1"))
        assert await shell(container, UNIQUE).stdout() == await shell(container, UNIQUE).stdout()


async def test_contents_count_and_not_where_they_come_from(
    connect: Connect, tmp_path: Path
) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "f").write_text("1")
    async with connect() as dag:

        async def run(directory: dagger.Directory) -> str:
            return await shell(host(dag).with_mounted_directory("/w", directory), UNIQUE).stdout()

        made = dag.directory().with_new_file("f", "1")
        assert await run(made) == await run(dag.host().directory(str(tmp_path / "w")))
        assert await run(made) != await run(made.with_new_file("f", "2"))
        assert await run(made) != await run(made.with_new_file("f", "1", permissions=0o600))


@pytest.mark.parametrize("change", ["variable", "user", "workdir", "stdin", "image", "mount"])
async def test_everything_else_counts_too(connect: Connect, change: str) -> None:
    async with connect() as dag:
        container = host(dag)
        other = {
            "variable": container.with_env_variable("A", "1"),
            "user": container.with_user("1000"),
            "workdir": container.with_workdir("/tmp"),
            "image": container.from_("docker.io/library/debian:12"),
            "mount": container.with_mounted_temp("/t"),
        }.get(change, container)
        stdin = "x" if change == "stdin" else ""
        first = await shell(container, UNIQUE).stdout()
        assert first != await shell(other, UNIQUE, stdin=stdin).stdout()


async def test_a_volatile_variable_is_seen_and_does_not_count(connect: Connect) -> None:
    async with connect() as dag:
        script = f"echo $RUN; {UNIQUE}"
        first = await shell(host(dag).with_volatile_variable("RUN", "1"), script).stdout()
        second = await shell(host(dag).with_volatile_variable("RUN", "2"), script).stdout()
        assert first.startswith("1\n")
        assert first == second


async def test_of_a_secret_only_the_name_counts(connect: Connect) -> None:
    async with connect() as dag:

        async def run(name: str, value: str) -> str:
            secret = dag.set_secret(name, value)
            return await shell(host(dag).with_secret_variable("S", secret), UNIQUE).stdout()

        assert await run("a", "value 1") == await run("a", "value 2")
        assert await run("a", "value 1") != await run("b", "value 1")


async def test_a_failure_that_was_not_expected_is_not_cached(connect: Connect) -> None:
    async with connect() as dag:
        ran = shell(
            host(dag).with_mounted_cache("/c", dag.cache_volume("v")),
            "test -e /c/x || { touch /c/x; exit 1; }",
        )
        with pytest.raises(dagger.ExecError):
            await ran.sync()
        await ran.sync()


async def test_a_failure_that_was_expected_is_cached(connect: Connect) -> None:
    async with connect() as dag:
        ran = shell(host(dag), f"{UNIQUE}; exit 1", expect=ReturnType.ANY)
        again = shell(host(dag), f"{UNIQUE}; exit 1", expect=ReturnType.ANY)
        assert await ran.stdout() == await again.stdout()


async def test_identical_execs_in_flight_are_one(connect: Connect) -> None:
    outputs: list[str] = []
    async with connect() as dag:

        async def run() -> None:
            outputs.append(await shell(host(dag), f"sleep 0.5; {UNIQUE}").stdout())

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(run)
    assert len(set(outputs)) == 1
    assert len(outputs) == 4


async def test_the_cache_ends_with_the_session(connect: Connect) -> None:
    outputs = []
    for _ in range(2):
        async with connect() as dag:
            outputs.append(await shell(host(dag), UNIQUE).stdout())
    assert outputs[0] != outputs[1]


async def test_a_cache_volume_lasts_from_one_session_to_the_next(connect: Connect) -> None:
    for number in range(2):
        async with connect() as dag:
            container = host(dag).with_mounted_cache("/c", dag.cache_volume("v"))
            assert (
                await shell(
                    container, "cat /c/* 2>/dev/null | wc -l; date >/c/$$-$RANDOM; date >>/c/f"
                ).stdout()
                >= f"{number}"
            )
            other = host(dag).with_mounted_cache("/c", dag.cache_volume("other"))
            assert await shell(other, "ls /c").stdout() == ""


async def test_a_locked_volume_has_one_user_at_a_time(connect: Connect) -> None:
    async with connect() as dag:
        volume = dag.cache_volume("v")
        container = host(dag).with_mounted_cache(
            "/c", volume, sharing=dagger.CacheSharingMode.LOCKED
        )
        async with anyio.create_task_group() as tasks:
            for number in range(3):
                script = f": {number}; mkdir /c/lock && sleep 0.2 && rmdir /c/lock"
                tasks.start_soon(shell(container, script).sync)


async def test_a_host_directory_is_read_once_unless_told_otherwise(
    connect: Connect, tmp_path: Path
) -> None:
    folder = tmp_path / "w"
    folder.mkdir()
    async with connect() as dag:
        assert await dag.host().directory(str(folder)).entries() == []
        (folder / "new").touch()
        assert await dag.host().directory(str(folder)).entries() == []
        fresh = await dag.host().directory(str(folder), no_cache=True).sync()
        assert await fresh.entries() == ["new"]
        (folder / "newer").touch()
        assert await fresh.entries() == ["new"]
        assert await dag.host().directory(str(folder), no_cache=True).entries() == ["new", "newer"]


async def test_a_host_file_that_is_written_in_place_is_read_again(
    connect: Connect, tmp_path: Path
) -> None:
    folder = tmp_path / "w"
    folder.mkdir()
    async with connect() as dag:
        for content in ("one", "two", "six"):
            (folder / "f").write_text(content)
            sent = dag.host().directory(str(folder), no_cache=True)
            assert await sent.file("f").contents() == content
