"""`dagger session` as a child, played by small scripts."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic
from typing import Any

import anyio
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moonmind_ext.engine import cli_session as module
from moonmind_ext.engine.cli_session import SessionAddress, SessionStartError, cli_session
from tests.engine.support import SERVES_UNTIL_TOLD, Place, appears, put_command, says_address


async def test_it_tells_the_port_and_the_token_and_ends_when_its_input_does(place: Place) -> None:
    ended = place.home / "ended"
    cli = place.command("dagger", says_address(4711, "t-1"), SERVES_UNTIL_TOLD, f"echo y > {ended}")
    async with cli_session(cli, environment=place.environment, deadline=20) as address:
        assert address == SessionAddress(4711, "t-1")
        assert place.processes()
        assert not ended.exists()

    assert ended.exists(), "it was not ended gently"
    assert await place.empties()


async def test_it_is_called_as_the_session_of_this_sdk(place: Place) -> None:
    said = place.home / "arguments"
    cli = place.command("dagger", f'printf "%s\\n" "$@" > {said}', says_address())
    async with cli_session(cli, environment=place.environment, deadline=20):
        pass

    command, *labels = said.read_text().splitlines()
    assert command == "session"
    assert labels[:2] == ["--label", "dagger.io/sdk.name:python"]
    assert labels[3].startswith("dagger.io/sdk.version:0.")


async def test_it_gets_exactly_the_environment_that_was_given(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURS_ALONE", "must not be seen")
    environment = {**place.environment, "EMPTY": "", "MULTI": "two\nlines", "U": "Grüße 🌙"}
    saved = place.home / "environ"
    # Not `env`: the shell has added some of its own by then.
    cli = place.command("dagger", f"cat /proc/$$/environ > {saved}", says_address())
    async with cli_session(cli, environment=environment, deadline=20):
        pass

    entries = saved.read_bytes().decode().rstrip("\0").split("\0")
    assert dict(entry.split("=", 1) for entry in entries) == environment


async def test_the_last_words_of_one_that_dies_at_once_are_in_the_error(place: Place) -> None:
    cli = place.command("dagger", "echo starting >&2", "echo no such engine >&2", "exit 3")
    began = monotonic()
    with pytest.raises(SessionStartError, match="ended.*starting; no such engine"):
        async with cli_session(cli, environment=place.environment, deadline=60):
            pytest.fail("there is no session")

    assert monotonic() - began < 20, "its end was not noticed"


async def test_last_words_without_an_end_of_line_are_in_the_error_too(place: Place) -> None:
    cli = place.command("dagger", "printf 'no such engine' >&2", "exit 3")
    with pytest.raises(SessionStartError, match="no such engine"):
        async with cli_session(cli, environment=place.environment, deadline=20):
            pytest.fail("there is no session")


async def test_the_error_keeps_the_end_of_many_words_and_stays_short(place: Place) -> None:
    cli = place.command(
        "dagger",
        # 4 MB in lines of 40 kB.
        'line=$(head -c 40000 /dev/zero | tr "\\0" x)',
        'i=0; while [ $i -lt 100 ]; do echo "$line" >&2; i=$((i + 1)); done',
        "echo the reason >&2",
        "exit 1",
    )
    with pytest.raises(SessionStartError, match="the reason$") as caught:
        async with cli_session(cli, environment=place.environment, deadline=60):
            pytest.fail("there is no session")

    assert len(str(caught.value)) < 300_000


async def test_words_that_are_no_text_do_no_harm(place: Place) -> None:
    cli = place.command("dagger", "printf 'bad \\377\\376 bytes\\n' >&2", "exit 1")
    with pytest.raises(SessionStartError, match=r"bad .* bytes"):
        async with cli_session(cli, environment=place.environment, deadline=20):
            pytest.fail("there is no session")


@pytest.mark.parametrize("path", ["not-there", "folder", "mode", "format"])
async def test_what_cannot_be_started_is_an_error_that_names_it(place: Place, path: str) -> None:
    (place.bin / "folder").mkdir()
    (place.bin / "mode").write_text("#!/bin/sh\n")
    (place.bin / "format").write_text("no interpreter is named here")
    (place.bin / "format").chmod(0o755)
    with pytest.raises(SessionStartError, match=f"bin/{path}: "):
        async with cli_session(str(place.bin / path), environment=place.environment, deadline=20):
            pytest.fail("there is no session")


RUBBISH = {
    "text": "echo Usage: dagger COMMAND",
    "two values": "echo '{} {}'",
    "a list": "echo '[1, 2]'",
    "a number": "echo 17",
    "no port": """echo '{"session_token": "t"}'""",
    "no token": """echo '{"port": 5}'""",
    "port of letters": """echo '{"port": "http", "session_token": "t"}'""",
    "an empty line": "echo",
    "bytes": "printf '\\377\\000\\n'",
    "a long line": "head -c 100000 /dev/zero; echo",
    "a line that never ends": "head -c 100000 /dev/zero | tr '\\0' x",
    "half a line": """printf '{"port": 5, "session_token": "t"}'; exec cat""",
}


@pytest.mark.parametrize("line", RUBBISH.values(), ids=RUBBISH.keys())
async def test_rubbish_is_no_address(place: Place, line: str) -> None:
    cli = place.command("dagger", line, "echo oh dear >&2", SERVES_UNTIL_TOLD)
    with pytest.raises(SessionStartError, match="dagger session"):
        async with cli_session(cli, environment=place.environment, deadline=2):
            pytest.fail("there is no session")

    assert await place.empties()


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
_lines = st.one_of(
    st.binary(max_size=200),
    _json.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({"port": _json, "session_token": _json}).map(
        lambda value: json.dumps(value).encode()
    ),
)


@settings(max_examples=40, deadline=None)
@given(line=_lines)
@example(line=b'{"port": 0, "session_token": "t"}')
@example(line=b'{"port": 70000, "session_token": "t"}')
@example(line=b'{"port": Infinity, "session_token": "t"}')
def test_whatever_it_prints_is_an_address_that_can_be_used_or_an_error(line: bytes) -> None:
    async def start() -> SessionAddress | None:
        with tempfile.TemporaryDirectory() as folder:
            said = Path(folder, "said")
            said.write_bytes(line + b"\n")
            cli = put_command(Path(folder, "dagger"), f"cat {said}")
            try:
                async with cli_session(cli, environment={}, deadline=20) as address:
                    return address
            except SessionStartError:
                return None

    address = anyio.run(start)
    assert address is None or 0 < address.port < 65536


async def test_one_that_says_nothing_ends_at_the_deadline(place: Place) -> None:
    cli = place.command("dagger", SERVES_UNTIL_TOLD)
    began = monotonic()
    with pytest.raises(SessionStartError, match=r"no port within 1s: it said nothing"):
        async with cli_session(cli, environment=place.environment, deadline=1):
            pytest.fail("there is no session")

    assert 0.9 < monotonic() - began < 8
    assert await place.empties()


async def test_one_that_is_stuck_is_not_waited_for_after_the_deadline(place: Place) -> None:
    # Neither the shell nor its child care for their input.
    cli = place.command("dagger", "echo connecting >&2", "sleep 600", "exit 0")
    began = monotonic()
    with pytest.raises(SessionStartError, match="no port within 1s: connecting"):
        async with cli_session(cli, environment=place.environment, deadline=1):
            pytest.fail("there is no session")

    assert monotonic() - began < 8
    assert await place.empties(), place.processes()


@pytest.mark.parametrize("lines", [True, False], ids=["in lines", "without an end of line"])
@pytest.mark.parametrize("stream", [1, 2], ids=["stdout", "stderr"])
async def test_a_flood_of_words_does_not_block_it(place: Place, stream: int, lines: bool) -> None:
    done = place.home / "done"
    text = "yes 'a line of some length, as progress output has them'" if lines else "cat /dev/zero"
    cli = place.command(
        "dagger",
        says_address(),
        f"{text} | head -c 20000000 >&{stream}",
        f"echo y > {done}",
        SERVES_UNTIL_TOLD,
    )
    async with cli_session(cli, environment=place.environment, deadline=20):
        await appears(done, seconds=60)

    assert await place.empties()


async def test_a_flood_before_the_address_does_not_block_it(place: Place) -> None:
    cli = place.command(
        "dagger", "yes pulling | head -c 5000000 >&2", says_address(7), SERVES_UNTIL_TOLD
    )
    async with cli_session(cli, environment=place.environment, deadline=60) as address:
        assert address.port == 7


async def test_one_that_ignores_the_end_of_its_input_is_killed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOSE_SECONDS", 1)
    cli = place.command("dagger", "trap '' TERM INT HUP", says_address(), "exec sleep 600")
    async with cli_session(cli, environment=place.environment, deadline=20):
        began = monotonic()

    assert 0.9 < monotonic() - began < 10
    assert await place.empties()


async def test_what_it_has_started_is_killed_with_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOSE_SECONDS", 1)
    cli = place.command("dagger", says_address(), "sleep 600", "exit 0")
    async with cli_session(cli, environment=place.environment, deadline=20):
        began = monotonic()

    assert monotonic() - began < 10
    assert await place.empties(), place.processes()


async def test_a_child_that_outlives_it_does_not_hold_the_end_up(place: Place) -> None:
    # It has our pipes: they stay open while it lives.
    cli = place.command("dagger", "sleep 600 &", says_address(), SERVES_UNTIL_TOLD)
    async with cli_session(cli, environment=place.environment, deadline=20):
        began = monotonic()

    assert monotonic() - began < 8
    assert await place.empties(), place.processes()


async def test_one_that_died_meanwhile_does_not_spoil_the_end(place: Place) -> None:
    cli = place.command("dagger", says_address(), "exit 1")
    async with cli_session(cli, environment=place.environment, deadline=20):
        assert await place.empties()


async def test_it_is_gone_after_an_error_which_stays_itself(place: Place) -> None:
    cli = place.command("dagger", says_address(), SERVES_UNTIL_TOLD)
    reason = LookupError("the body's own")
    with pytest.raises(LookupError) as caught:
        async with cli_session(cli, environment=place.environment, deadline=20):
            raise reason

    assert caught.value is reason
    assert await place.empties()


@pytest.mark.parametrize("when", ["in the body", "before it says its port"])
async def test_it_is_gone_after_a_cancellation(place: Place, when: str) -> None:
    address = [says_address()] if when == "in the body" else []
    cli = place.command("dagger", *address, SERVES_UNTIL_TOLD)
    reached_the_end = False

    async def hold() -> None:
        nonlocal reached_the_end
        async with cli_session(cli, environment=place.environment, deadline=60):
            await anyio.sleep(60)
        reached_the_end = True

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hold)
        with anyio.fail_after(20):
            while not place.processes():
                await anyio.sleep(0.02)
        await anyio.sleep(0.3)
        began = monotonic()
        tasks.cancel_scope.cancel()

    assert monotonic() - began < 8
    assert not reached_the_end
    assert await place.empties()


async def test_one_that_is_stuck_is_gone_after_a_cancellation(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOSE_SECONDS", 1)
    cli = place.command("dagger", says_address(), "sleep 600", "exit 0")
    with anyio.move_on_after(0.5) as scope:
        async with cli_session(cli, environment=place.environment, deadline=20):
            await anyio.sleep(60)

    assert scope.cancelled_caught
    assert await place.empties(), place.processes()


async def test_many_at_once_do_not_disturb_each_other(place: Place) -> None:
    async def one(number: int) -> None:
        name = f"dagger-{number}"
        cli = place.command(name, says_address(number), SERVES_UNTIL_TOLD)
        async with cli_session(cli, environment=place.environment, deadline=60) as address:
            await everybody.wait()
            ports.add(address.port)

    ports: set[int] = set()
    everybody = anyio.Event()
    async with anyio.create_task_group() as tasks:
        for number in range(1, 9):
            tasks.start_soon(one, number)
        with anyio.fail_after(60):
            while len(place.processes()) < 8:
                await anyio.sleep(0.05)
        everybody.set()

    assert ports == set(range(1, 9))
    assert await place.empties()


_DRIVER = """
import signal, sys
import anyio
from moonmind_ext.engine.cli_session import cli_session

signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))

async def main():
    async with cli_session(sys.argv[1], environment={}, deadline=30):
        print("ready", flush=True)
        await anyio.to_thread.run_sync(sys.stdin.readline)
    print("closed", flush=True)

anyio.run(main)
"""


def test_ctrl_c_in_the_terminal_does_not_reach_it(place: Place) -> None:
    got, ended = place.home / "got", place.home / "ended"
    cli = place.command(
        "dagger",
        f"trap 'echo INT > {got}' INT",
        says_address(),
        # A builtin, so that the trap would run at once.
        "read line",
        f"echo y > {ended}",
    )
    root = Path(__file__).parents[2]
    # A process group of its own, as a terminal gives to a command; the signal goes to
    # all of it, as Ctrl-C does.
    driver: subprocess.Popen[Any] = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, cli],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **place.environment, "PYTHONPATH": str(root)},
        start_new_session=True,
    )
    with driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        os.killpg(driver.pid, signal.SIGINT)
        assert driver.stdout.readline() == "interrupted\n"
        assert not ended.exists()
        driver.stdin.write("\n")
        driver.stdin.flush()
        assert driver.stdout.readline() == "closed\n"

    assert driver.returncode == 0
    assert ended.exists()
    assert not got.exists()
