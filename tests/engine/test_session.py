"""Sessions with a real engine, where one is found."""

import os
import shutil
import signal
from contextlib import suppress
from uuid import uuid4

import anyio
import dagger
import pytest

from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.cli_session import cli_session
from moonmind_ext.engine.live import traced
from moonmind_ext.engine.session import CHECK_SECONDS, EngineSession, NoEngineError, open_session
from tests.engine.support import MARK, Place

pytestmark = pytest.mark.usefixtures("real_engine")

IMAGE = f"{os.environ.get('MOONMIND_TEST_REGISTRY', 'docker.io/library')}/busybox:1.36"


@pytest.fixture
def environment(place: Place) -> dict[str, str]:
    """What finds the engine, and a mark on the processes that it starts."""
    return {**os.environ, MARK: place.mark}


async def says(session: EngineSession, *command: str) -> str:
    """Run a command that no earlier test run has run: real engines remember."""
    container = session.client.container().from_(IMAGE)
    container = container.with_env_variable("UNIQUE", uuid4().hex)
    return await container.with_exec(list(command)).stdout()


@pytest.mark.parametrize("choice", [EngineChoice.AUTO, EngineChoice.DAGGER])
async def test_a_session_says_what_it_is_and_answers(
    environment: dict[str, str], choice: EngineChoice
) -> None:
    async with open_session(choice, environment=environment) as session:
        assert session.kind == "dagger"
        assert session.version.lstrip("v")[0].isdecimal()
        assert session.version == await session.client.version()
        assert session.how
        await session.check()
        assert await says(session, "echo", "hello") == "hello\n"


async def test_it_closes_soon_and_leaves_no_process(
    environment: dict[str, str], place: Place
) -> None:
    async with open_session(environment=environment) as session:
        await says(session, "true")
        assert place.processes()
        began = anyio.current_time()

    assert anyio.current_time() - began < 8
    assert await place.empties(), place.processes()


async def test_it_closes_soon_while_a_command_runs(
    environment: dict[str, str], place: Place
) -> None:
    async with open_session(environment=environment) as session:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(says, session, "sleep", "300")
            await anyio.sleep(2)
            tasks.cancel_scope.cancel()
        began = anyio.current_time()

    assert anyio.current_time() - began < 8
    assert await place.empties(), place.processes()


async def test_two_commands_at_once_are_told_apart_while_they_run(
    environment: dict[str, str],
) -> None:
    class Follower:
        def __init__(self) -> None:
            self.texts: list[str] = []
            self.has_some = anyio.Event()
            self.has_last = anyio.Event()
            self.answer: str | None = None

        def take(self, text: str) -> None:
            self.texts.append(text)
            self.has_some.set()
            if "6\n" in text:
                self.has_last.set()

    async def run(session: EngineSession, word: str, follower: Follower) -> None:
        assert session.live is not None
        with traced() as trace_id, session.live.follow(trace_id, follower.take):
            script = f"for i in 1 2 3 4 5 6; do echo {word} $i; sleep 1; done"
            follower.answer = await says(session, "sh", "-c", script)
            with anyio.fail_after(30):
                await follower.has_last.wait()

    followers = {"owl": Follower(), "fox": Follower()}
    async with open_session(environment=environment) as session, anyio.create_task_group() as tasks:
        for word, follower in followers.items():
            tasks.start_soon(run, session, word, follower)
        with anyio.fail_after(60):
            for follower in followers.values():
                await follower.has_some.wait()
        # Five seconds before the commands' ends.
        assert [follower.answer for follower in followers.values()] == [None, None]

    for word, follower in followers.items():
        expected = "".join(f"{word} {number}\n" for number in range(1, 7))
        assert follower.answer == expected
        assert "".join(follower.texts) == expected


async def test_what_goes_to_the_other_stream_or_is_answered_is_no_live_output(
    environment: dict[str, str],
) -> None:
    got: list[str] = []
    async with open_session(environment=environment) as session:
        assert session.live is not None
        with traced() as trace_id, session.live.follow(trace_id, got.append):
            await says(session, "sh", "-c", "echo to stderr >&2; echo to stdout")
            await session.check()
            # Records come 0.1 s after what they tell of.
            await anyio.sleep(1)

    assert "".join(got) == "to stdout\n"


async def test_output_without_a_trace_is_nobodys(environment: dict[str, str]) -> None:
    got: list[str] = []
    async with open_session(environment=environment) as session:
        assert session.live is not None
        with traced() as trace_id, session.live.follow(trace_id, got.append):
            pass
        with session.live.follow(trace_id, got.append):
            await says(session, "echo", "unseen")
            await anyio.sleep(1)

    assert got == []


async def test_sessions_of_one_process_are_separate(
    environment: dict[str, str], place: Place
) -> None:
    async with open_session(environment=environment) as first:
        async with open_session(environment=environment) as second:
            assert await says(second, "echo", "second") == "second\n"
        await first.check()
        assert await says(first, "echo", "first") == "first\n"

    assert await place.empties(), place.processes()


@pytest.mark.parametrize(
    "raised", [LookupError("the body's own"), NoEngineError("the body's own")], ids=type
)
async def test_an_error_in_the_body_stays_itself_and_leaves_no_process(
    environment: dict[str, str], place: Place, raised: Exception
) -> None:
    with pytest.raises(type(raised)) as caught:
        async with open_session(environment=environment):
            raise raised

    assert caught.value is raised
    assert await place.empties(), place.processes()


async def test_a_check_tells_that_the_session_has_died(
    environment: dict[str, str], place: Place
) -> None:
    async with open_session(environment=environment) as session:
        await session.check()
        for pid in place.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        began = anyio.current_time()
        with pytest.raises((TimeoutError, dagger.DaggerError)):
            await session.check()
        assert anyio.current_time() - began < CHECK_SECONDS + 5
        began = anyio.current_time()

    assert anyio.current_time() - began < 8


async def test_a_host_without_an_engine_is_no_engine(
    environment: dict[str, str], place: Place
) -> None:
    nowhere = {"_EXPERIMENTAL_DAGGER_RUNNER_HOST": f"unix://{place.home}/engine.sock"}
    began = anyio.current_time()
    with pytest.raises(NoEngineError, match=r"runner host unix://.*/engine\.sock: "):
        async with open_session(environment={**environment, **nowhere}, open_seconds=5):
            pytest.fail("there is no engine")

    assert anyio.current_time() - began < 20
    assert await place.empties(), place.processes()


@pytest.fixture
def cli(environment: dict[str, str]) -> str:
    named = environment.get("_EXPERIMENTAL_DAGGER_CLI_BIN") or shutil.which("dagger")
    if named is None:
        pytest.skip("there is no dagger command to attach to a session of")
    return named


async def test_a_session_that_somebody_else_has_started_is_used_and_left_running(
    environment: dict[str, str], cli: str, place: Place
) -> None:
    async with cli_session(cli, environment=environment, deadline=30) as address:
        attached = {
            **environment,
            "DAGGER_SESSION_PORT": str(address.port),
            "DAGGER_SESSION_TOKEN": address.token,
        }
        theirs = set(place.processes())
        for _ in range(2):
            async with open_session(environment=attached) as session:
                assert session.how == f"the attached session on port {address.port}"
                assert (session.kind, session.live) == ("dagger", None)
                assert set(place.processes()) == theirs, "it needs no command of its own"
                await session.check()
                assert await says(session, "echo", "attached") == "attached\n"

    assert await place.empties(), place.processes()


async def test_a_broken_attached_session_is_followed_by_the_next_way(
    environment: dict[str, str], cli: str
) -> None:
    async with cli_session(cli, environment=environment, deadline=30) as address:
        attached = {
            **environment,
            "DAGGER_SESSION_PORT": str(address.port),
            "DAGGER_SESSION_TOKEN": "not the token",
        }
        async with open_session(environment=attached) as session:
            assert "attached" not in session.how
            assert session.live is not None
            await session.check()
