"""What a command sees, and what is known of it afterwards."""

import os
import time
from pathlib import Path

import anyio
import dagger
import pytest
from dagger import ReturnType

from tests.embedded.support import Connect, host, shell


async def test_a_command_prints_and_ends(connect: Connect) -> None:
    async with connect() as dag:
        ran = shell(host(dag), "echo out; echo err >&2; exit 3", expect=ReturnType.ANY)
        assert await ran.stdout() == "out\n"
        assert await ran.stderr() == "err\n"
        assert await ran.exit_code() == 3
        assert sorted((await ran.combined_output()).split()) == ["err", "out"]


async def test_a_failure_is_an_exec_error_with_everything_in_it(connect: Connect) -> None:
    async with connect() as dag:
        with pytest.raises(dagger.ExecError, match="exit code: 3") as raised:
            await shell(host(dag), "echo out; echo err >&2; exit 3").sync()
    error = raised.value
    assert (error.exit_code, error.stdout, error.stderr) == (3, "out", "err")
    assert error.command == ["sh", "-c", "echo out; echo err >&2; exit 3"]


async def test_an_exec_error_carries_the_end_of_a_long_output(connect: Connect) -> None:
    async with connect() as dag:
        with pytest.raises(dagger.ExecError) as raised:
            await shell(
                host(dag), "head -c 300000 /dev/zero | tr '\\0' x; echo; echo last; exit 1"
            ).sync()
    assert raised.value.stdout.endswith("last")
    assert len(raised.value.stdout) <= 100 << 10


@pytest.mark.parametrize(
    ("expect", "code", "fine"),
    [
        (ReturnType.SUCCESS, 0, True),
        (ReturnType.SUCCESS, 1, False),
        (ReturnType.FAILURE, 0, False),
        (ReturnType.FAILURE, 127, True),
        (ReturnType.FAILURE, 150, False),
        (ReturnType.ANY, 127, True),
        (ReturnType.ANY, 130, False),
        (ReturnType.ANY, 200, True),
    ],
)
async def test_an_exit_code_is_held_against_what_is_expected(
    connect: Connect, expect: ReturnType, code: int, *, fine: bool
) -> None:
    async with connect() as dag:
        ran = shell(host(dag), f"exit {code}", expect=expect)
        if fine:
            assert await ran.exit_code() == code
        else:
            with pytest.raises(dagger.ExecError) as raised:
                await ran.exit_code()
            assert raised.value.exit_code == code


async def test_a_signal_is_128_and_more_and_never_expected(connect: Connect) -> None:
    async with connect() as dag:
        with pytest.raises(dagger.ExecError, match="137"):
            await shell(host(dag), "kill -9 $$", expect=ReturnType.ANY).sync()


async def test_a_missing_program_is_127_and_is_named(connect: Connect) -> None:
    async with connect() as dag:
        ran = host(dag).with_exec(["no-such-program"], expect=ReturnType.ANY)
        assert await ran.exit_code() == 127
        assert "no-such-program" in await ran.stderr()


async def test_nothing_of_our_environment_gets_in(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUR_SECRET", "leaked")
    async with connect() as dag:
        container = host(dag).with_env_variable("MINE", "yes").with_env_variable("MINE", "yes!")
        seen = await container.with_exec(["env"]).stdout()
    names = {line.partition("=")[0] for line in seen.splitlines()}
    assert "MINE=yes!" in seen.splitlines()
    assert f"PATH={os.environ['PATH']}" in seen.splitlines()
    assert names <= {"PATH", "HOME", "LANG", "LC_ALL", "MINE", "PWD"}


async def test_variables_expand_and_go_away(connect: Connect) -> None:
    async with connect() as dag:
        container = (
            host(dag).with_env_variable("A", "1").with_env_variable("B", "$A-${A}-$Q", expand=True)
        )
        assert await container.env_variable("B") == "1-1-"
        assert await container.without_env_variable("B").env_variable("B") is None
        variables = [(await v.name(), await v.value()) for v in await container.env_variables()]
        assert ("A", "1") in variables


async def test_a_command_has_its_own_processes_and_its_own_names(connect: Connect) -> None:
    async with connect() as dag:
        seen = await shell(
            host(dag), "ls -d /proc/[0-9]* | wc -l; cat /proc/1/comm; hostname"
        ).stdout()
    processes, init, name = seen.split()
    assert int(processes) <= 4
    assert init == "bwrap"
    assert name == "dagger"


async def test_a_signal_to_everybody_reaches_only_the_tasks_own_processes(connect: Connect) -> None:
    async with connect() as dag:
        script = "trap : TERM; sleep 60 & sleep 0.3; kill -TERM -1; wait; echo still here"
        assert await shell(host(dag), script).stdout() == "still here\n"


async def test_a_background_child_that_holds_the_output_does_not_delay_the_end(
    connect: Connect,
) -> None:
    async with connect() as dag:
        began = time.monotonic()
        assert (
            await shell(host(dag), "(trap '' TERM HUP; sleep 60) & echo done").stdout() == "done\n"
        )
        assert time.monotonic() - began < 5


async def test_when_the_answer_is_there_no_process_is_left(connect: Connect) -> None:
    async with connect() as dag:
        marker = f"86{os.getpid()}"
        await shell(host(dag), f"setsid sleep {marker} >/dev/null 2>&1 & sleep 0.1").sync()
        assert not running(marker)


def running(marker: str) -> list[str]:
    """Find processes of this host by an argument that only they have."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[:1] == [b"sleep"] and marker.encode() in words:
            found.append(path.parent.name)
    return found


async def test_the_working_directory_is_made(connect: Connect) -> None:
    async with connect() as dag:
        ran = host(dag).with_workdir("/made/here").with_exec(["pwd"])
        assert await ran.stdout() == "/made/here\n"
        assert await ran.exists("/made/here")
        assert await host(dag).with_workdir("/a").with_workdir("b").workdir() == "/a/b"


async def test_standard_input_is_a_string_a_file_or_empty(connect: Connect) -> None:
    async with connect() as dag:
        container = host(dag).with_new_file("/in", "from a file")
        assert await container.with_exec(["cat"], stdin="from a string").stdout() == "from a string"
        assert await container.with_exec(["cat"], redirect_stdin="/in").stdout() == "from a file"
        assert await container.with_exec(["cat"]).stdout() == ""


async def test_a_command_sees_what_the_one_before_it_changed_in_the_root(connect: Connect) -> None:
    async with connect() as dag:
        first = shell(host(dag), "echo 1 >/tmp/a; mkdir -p /root/deep; echo 2 >/root/deep/b")
        second = shell(first, "cat /tmp/a /root/deep/b; rm /tmp/a; echo 3 >/root/deep/c")
        assert await second.stdout() == "1\n2\n"
        assert await second.file("/root/deep/c").contents() == "3\n"
        assert await second.directory("/root").entries() == ["deep/"]
        assert not await second.exists("/tmp/a")
        assert await first.exists("/tmp/a")


async def test_the_hosts_own_root_stays_as_it_is(connect: Connect) -> None:
    async with connect() as dag:
        ran = shell(host(dag), "touch /etc/by-a-task /by-a-task; rm -f /etc/passwd; true")
        await ran.sync()
        assert await ran.exists("/by-a-task")
    assert not Path("/etc/by-a-task").exists()
    assert not Path("/by-a-task").exists()
    assert Path("/etc/passwd").exists()


async def test_a_command_does_not_see_the_hosts_home_and_temporary_files(
    connect: Connect, tmp_path: Path
) -> None:
    async with connect() as dag:
        seen = await shell(host(dag), "ls -A /tmp /home /root; touch /tmp/mine").stdout()
    assert [line for line in seen.splitlines() if line and not line.endswith(":")] == []


async def test_mounts_may_be_deep_where_nothing_is(connect: Connect) -> None:
    async with connect() as dag:
        directory = dag.directory().with_new_file("f", "content")
        container = host(dag).with_mounted_directory("/work/agent_jobs/id/repo", directory)
        ran = container.with_exec(["cat", "/work/agent_jobs/id/repo/f"])
        assert await ran.stdout() == "content"
        assert not await ran.without_mount("/work/agent_jobs/id/repo").exists("/work/agent_jobs/id")


async def test_a_mounted_directory_is_a_copy(connect: Connect) -> None:
    async with connect() as dag:
        before = dag.directory().with_new_file("f", "before")
        ran = shell(
            host(dag).with_mounted_directory("/w", before), "echo after >/w/f; touch /w/new"
        )
        assert await ran.directory("/w").entries() == ["f", "new"]
        assert await ran.file("/w/f").contents() == "after\n"
        assert await before.file("f").contents() == "before"


async def test_a_read_only_directory_stays_as_it_is(connect: Connect) -> None:
    async with connect() as dag:
        directory = dag.directory().with_new_file("f", "before")
        container = host(dag).with_mounted_directory("/w", directory, read_only=True)
        with pytest.raises(dagger.ExecError, match="exit code"):
            await shell(container, "echo after >/w/f").sync()
        assert await shell(container, "cat /w/f").stdout() == "before"


async def test_a_file_can_be_mounted(connect: Connect) -> None:
    async with connect() as dag:
        container = host(dag).with_mounted_file("/x/f", dag.file("f", "1"))
        ran = shell(container, "echo 2 >>/x/f; cat /x/f")
        assert await ran.stdout() == "12\n"
        assert await ran.file("/x/f").contents() == "12\n"


async def test_a_temporary_directory_is_empty_and_cannot_be_fetched(connect: Connect) -> None:
    async with connect() as dag:
        container = host(dag).with_mounted_temp("/t", size=1 << 20)
        ran = shell(container, "ls -A /t; touch /t/x; df -k /t | tail -1")
        assert "1024" in await ran.stdout()
        with pytest.raises(dagger.QueryError, match="/t: cannot retrieve path from tmpfs"):
            await ran.directory("/t").entries()
        assert await container.mounts() == ["/t"]


async def test_what_is_put_into_a_container_is_in_its_root_or_in_its_mount(
    connect: Connect,
) -> None:
    async with connect() as dag:
        container = (
            host(dag)
            .with_mounted_directory("/w", dag.directory())
            .with_new_file("/w/new", "1")
            .with_file("/opt/tool", dag.file("tool", "#!/bin/sh\necho runs\n"), permissions=0o755)
            .with_directory(
                "/data",
                dag.directory().with_new_file("a", "").with_new_file("b", ""),
                exclude=["b"],
            )
        )
        assert await container.with_exec(["/opt/tool"]).stdout() == "runs\n"
        assert await shell(container, "ls /w /data").stdout() == "/data:\na\n\n/w:\nnew\n"


async def test_commands_run_at_the_same_time(connect: Connect) -> None:
    async with connect() as dag:
        began = time.monotonic()
        async with anyio.create_task_group() as tasks:
            for number in range(6):
                tasks.start_soon(shell(host(dag), f"sleep 1; : {number}").sync)
        assert time.monotonic() - began < 4


@pytest.mark.skipif(os.geteuid() == 0, reason="needs an ordinary user")
async def test_an_ordinary_user_is_root_inside(connect: Connect) -> None:
    async with connect() as dag:
        assert await host(dag).with_exec(["id", "-u"]).stdout() == "0\n"


async def test_a_command_runs_as_the_user_that_is_asked_for(connect: Connect) -> None:
    async with connect() as dag:
        ran = shell(host(dag).with_user("1234:4321"), "id -u; id -g; echo $HOME; touch /tmp/mine")
        assert await ran.stdout() == "1234\n4321\n/\n"
        with pytest.raises(dagger.ExecError, match="nobody-knows"):
            await host(dag).with_user("nobody-knows").with_exec(["true"]).sync()


async def test_privileges_are_refused(connect: Connect) -> None:
    async with connect() as dag:
        with pytest.raises(dagger.QueryError, match="insecureRootCapabilities"):
            await host(dag).with_exec(["true"], insecure_root_capabilities=True).sync()
        with pytest.raises(dagger.QueryError, match="experimentalPrivilegedNesting"):
            await host(dag).with_exec(["true"], experimental_privileged_nesting=True).sync()


async def test_no_value_can_become_an_option_of_the_sandbox(connect: Connect) -> None:
    async with connect() as dag:
        container = host(dag).with_env_variable("A", "x\0--bind\0/\0/outside")
        with pytest.raises(dagger.ExecError, match="NUL"):
            await container.with_exec(["ls", "/outside"]).sync()
        with pytest.raises(dagger.ExecError, match="NUL"):
            await host(dag).with_exec(["echo", "a\0b"]).sync()


async def test_the_kernels_settings_cannot_be_written(connect: Connect) -> None:
    async with connect() as dag:
        for container in (host(dag), host(dag).with_user("1000")):
            ran = shell(container, "test -w /proc/sys/kernel/core_pattern", expect=ReturnType.ANY)
            assert await ran.exit_code() == 1


async def test_a_working_directory_is_not_made_outside_through_a_link(
    connect: Connect, tmp_path: Path
) -> None:
    outside = "../" * 20 + str(tmp_path).lstrip("/")
    async with connect() as dag:
        directory = (
            dag.directory().with_symlink(outside, "link").with_symlink(str(tmp_path), "absolute")
        )
        for name in ("link", "absolute"):
            container = host(dag).with_mounted_directory("/w", directory)
            with pytest.raises(dagger.QueryError):
                await container.with_workdir(f"/w/{name}/made").with_exec(["pwd"]).sync()
            volume = host(dag).with_mounted_cache("/c", dag.cache_volume("v"))
            target = outside if name == "link" else str(tmp_path)
            await volume.with_exec(["ln", "-s", target, f"/c/{name}"]).sync()
            with pytest.raises(dagger.QueryError):
                await volume.with_workdir(f"/c/{name}/made").with_exec(["pwd"]).sync()
    assert not (tmp_path / "made").exists()


async def test_what_was_removed_from_the_root_can_be_made_again(connect: Connect) -> None:
    async with connect() as dag:
        gone = shell(host(dag), "rm -rf /etc/ssl /etc/passwd /tmp; true")
        if await gone.exists("/etc/ssl"):
            pytest.skip("the host's /etc cannot be written by an ordinary user")
        again = gone.with_workdir("/etc/ssl").with_mounted_file(
            "/etc/passwd", dag.file("p", "mine")
        )
        assert await shell(again, "ls -A; cat /etc/passwd").stdout() == "mine"
        assert await again.with_new_file("/etc/ssl/a", "").directory("/etc/ssl").entries() == ["a"]


async def test_where_nothing_ran_there_is_no_output(connect: Connect) -> None:
    async with connect() as dag:
        with pytest.raises(dagger.QueryError, match="no command has been set"):
            await host(dag).stdout()


async def test_the_entrypoint_and_the_default_arguments_are_used_when_asked_for(
    connect: Connect,
) -> None:
    async with connect() as dag:
        container = host(dag).with_entrypoint(["echo", "entry"]).with_default_args(["default"])
        assert await container.with_exec([], use_entrypoint=True).stdout() == "entry default\n"
        assert await container.with_exec(["x"], use_entrypoint=True).stdout() == "entry x\n"
        assert await container.entrypoint() == ["echo", "entry"]
        assert await container.with_entrypoint(["echo"]).default_args() == []
