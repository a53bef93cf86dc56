"""Which engine is found, and what is said where there is none."""

import hashlib
import io
import os
import socket
import tarfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import anyio
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moonmind_ext.engine import session as module
from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.cli_session import SessionAddress
from moonmind_ext.engine.session import (
    EngineSession,
    NoEngineError,
    Way,
    docker_problem,
    open_session,
    ways,
)
from tests.engine.support import (
    SERVES_UNTIL_TOLD,
    Api,
    Place,
    QuietHandler,
    http_server,
    make_unreadable_as_program,
    says_address,
)

CLI_BIN = "_EXPERIMENTAL_DAGGER_CLI_BIN"
RUNNER_HOST = "_EXPERIMENTAL_DAGGER_RUNNER_HOST"


# --- ways ---


def test_the_ways_are_in_the_order_of_who_was_most_explicit(place: Place) -> None:
    cli = place.command("dagger")
    attached = {"DAGGER_SESSION_PORT": "4711", "DAGGER_SESSION_TOKEN": "t"}
    host = {RUNNER_HOST: "tcp://engine:1234"}

    session = Way("the attached session on port 4711", attached=SessionAddress(4711, "t"))
    runner = Way("the runner host tcp://engine:1234", cli=cli)
    docker = Way(f"{cli} with Docker", cli=cli, needs_docker=True)
    assert ways({**place.environment, **attached, **host}) == [session, runner]
    assert ways({**place.environment, **attached}) == [session, docker]
    assert ways({**place.environment, **host}) == [runner]
    assert ways(place.environment) == [docker]


def test_without_a_dagger_command_the_sdk_downloads_one(place: Place) -> None:
    download = Way("the SDK's own download with Docker", needs_docker=True)
    assert ways(place.environment) == [download]
    # The command is needed to reach a runner host too.
    assert ways({**place.environment, RUNNER_HOST: "unix:///run/x.sock"}) == [
        Way("the runner host unix:///run/x.sock", cli=None)
    ]


def test_a_command_that_is_named_goes_before_the_one_on_path(place: Place) -> None:
    place.command("dagger")
    assert [way.cli for way in ways({**place.environment, CLI_BIN: "/opt/dagger"})] == [
        "/opt/dagger"
    ]


def test_only_the_given_environment_counts(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.command("dagger")
    monkeypatch.setenv("PATH", str(place.bin))
    monkeypatch.setenv("DAGGER_SESSION_PORT", "1")
    monkeypatch.setenv(RUNNER_HOST, "tcp://elsewhere:1")

    assert ways({}) == ways({"PATH": ""})
    assert [way.how for way in ways({})] == ["the SDK's own download with Docker"]


def test_empty_variables_are_as_if_unset(place: Place) -> None:
    empty = {"DAGGER_SESSION_PORT": "", "DAGGER_SESSION_TOKEN": "", RUNNER_HOST: "", CLI_BIN: ""}
    assert ways({**place.environment, **empty}) == ways(place.environment)


def test_a_token_alone_is_no_session(place: Place) -> None:
    assert ways({**place.environment, "DAGGER_SESSION_TOKEN": "t"}) == ways(place.environment)


@given(port=st.text(min_size=1).filter(lambda text: not text.isdecimal()))
@example(port="http")
@example(port="-1")
@example(port="4711 ")
@example(port="²")
@example(port="0")
@example(port="65536")
@example(port="9" * 5000)
def test_a_port_that_is_none_is_an_error_that_names_the_variable(port: str) -> None:
    with pytest.raises(NoEngineError, match="DAGGER_SESSION_PORT"):
        ways({"DAGGER_SESSION_PORT": port, "DAGGER_SESSION_TOKEN": "t"})


@given(port=st.integers(1, 65535))
def test_every_port_can_be_attached_to(port: int) -> None:
    way = ways({"DAGGER_SESSION_PORT": str(port), "DAGGER_SESSION_TOKEN": "t"})[0]
    assert way.attached == SessionAddress(port, "t")


@pytest.mark.parametrize("token", [{}, {"DAGGER_SESSION_TOKEN": ""}], ids=["unset", "empty"])
def test_a_port_without_a_token_is_an_error_that_names_the_variable(token: dict[str, str]) -> None:
    with pytest.raises(NoEngineError, match="DAGGER_SESSION_TOKEN"):
        ways({"DAGGER_SESSION_PORT": "4711", **token})


# --- open_session, where an engine is to be had ---


def attached(api: Api) -> dict[str, str]:
    return {"DAGGER_SESSION_PORT": str(api.port), "DAGGER_SESSION_TOKEN": api.token}


async def test_an_attached_session_is_used_and_sends_no_live_records(
    place: Place, api: Api
) -> None:
    async with open_session(environment={**place.environment, **attached(api)}) as session:
        assert session.kind == "dagger"
        assert session.version == "v0.21.8"
        assert session.how == f"the attached session on port {api.port}"
        assert session.live is None
        await session.check()


@pytest.mark.parametrize("choice", [EngineChoice.AUTO, EngineChoice.DAGGER])
async def test_a_runner_host_is_reached_by_the_command_and_without_docker(
    place: Place, api: Api, choice: EngineChoice
) -> None:
    place.command("dagger", says_address(api.port), SERVES_UNTIL_TOLD)
    place.command("docker", f"echo called > {place.home}/docker")
    environment = {**place.environment, RUNNER_HOST: "tcp://engine:1"}
    async with open_session(choice, environment=environment) as session:
        assert (session.kind, session.how) == ("dagger", "the runner host tcp://engine:1")
        assert session.live is not None
        await session.check()
        assert place.processes()

    assert not (place.home / "docker").exists()
    assert await place.empties()


async def test_a_command_on_path_is_used_where_docker_answers(place: Place, api: Api) -> None:
    cli = place.command("dagger", says_address(api.port), SERVES_UNTIL_TOLD)
    place.command("docker", "echo 28.0.1")
    async with open_session(environment=place.environment) as session:
        assert session.how == f"{cli} with Docker"

    assert await place.empties()


async def test_the_next_way_is_taken_where_the_first_one_does_not_answer(
    place: Place, api: Api
) -> None:
    saved = place.home / "environ"
    place.command(
        "dagger", f"cat /proc/$$/environ > {saved}", says_address(api.port), SERVES_UNTIL_TOLD
    )
    environment = {
        **place.environment,
        "DAGGER_SESSION_PORT": str(closed_port()),
        "DAGGER_SESSION_TOKEN": "t",
        RUNNER_HOST: "tcp://engine:1",
    }
    async with open_session(environment=environment) as session:
        assert session.how == "the runner host tcp://engine:1"

    # With these, the command would make a session inside the one that does not answer.
    assert "DAGGER_SESSION_" not in saved.read_text()


async def test_the_session_gets_the_environment_and_is_told_where_to_send_its_records(
    place: Place, api: Api
) -> None:
    saved = place.home / "environ"
    place.command(
        "dagger",
        f"cat /proc/$$/environ > {saved}",
        says_address(api.port),
        SERVES_UNTIL_TOLD,
    )
    environment = {
        **place.environment,
        RUNNER_HOST: "tcp://engine:1",
        # Somebody's own collector must not be sent what we are to show.
        "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "http://collector:4318",
        "HTTPS_PROXY": "http://proxy:3128",
    }
    async with open_session(environment=environment) as session:
        assert session.live is not None
        endpoint = session.live.endpoint

    seen = dict(entry.split("=", 1) for entry in saved.read_text().rstrip("\0").split("\0"))
    assert environment.items() - seen.items() == {
        ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://collector:4318")
    }
    assert seen["OTEL_EXPORTER_OTLP_LOGS_ENDPOINT"] == endpoint
    assert seen["OTEL_EXPORTER_OTLP_LOGS_PROTOCOL"] == "http/protobuf"
    assert seen["DAGGER_LEAVE_OLD_ENGINE"] == "1"
    assert seen["DAGGER_SILENT"] == "1"


async def test_a_failed_query_is_not_sent_twice(place: Place, api: Api) -> None:
    def drops(handler: QuietHandler) -> bool:
        handler.close_connection = True
        return True

    async with open_session(environment={**place.environment, **attached(api)}) as session:
        before = api.asked
        api.misbehaves = drops
        with pytest.raises(Exception, match=r"(?i)disconnected|request"):
            await session.check()

    assert api.asked == before + 1


async def test_a_check_of_an_engine_that_hangs_ends(
    place: Place, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECK_SECONDS", 1)
    async with open_session(environment={**place.environment, **attached(api)}) as session:
        api.misbehaves = api.hang
        began = monotonic()
        with pytest.raises(TimeoutError):
            await session.check()
        assert monotonic() - began < 10


async def test_an_error_in_the_body_stays_itself_and_closes_the_session(
    place: Place, api: Api
) -> None:
    place.command("dagger", says_address(api.port), SERVES_UNTIL_TOLD)
    environment = {**place.environment, RUNNER_HOST: "tcp://engine:1"}
    reason = LookupError("the body's own")
    with pytest.raises(LookupError) as caught:
        async with open_session(environment=environment):
            raise reason

    assert caught.value is reason
    assert await place.empties()


async def test_a_no_engine_error_of_the_body_is_not_taken_for_its_own(
    place: Place, api: Api
) -> None:
    place.command("dagger", says_address(api.port), SERVES_UNTIL_TOLD)
    environment = {**place.environment, **attached(api), RUNNER_HOST: "tcp://engine:1"}
    opened: list[EngineSession] = []
    with pytest.raises(NoEngineError, match="^from elsewhere$"):
        async with open_session(environment=environment) as session:
            opened.append(session)
            raise NoEngineError("from elsewhere")

    assert len(opened) == 1


# --- the SDK's download ---


@contextmanager
def download_site(
    monkeypatch: pytest.MonkeyPatch, home: Path, cli_text: str | None
) -> Iterator[threading.Event]:
    """Play dl.dagger.io; without a text it does not answer until the event is set."""
    from dagger.provisioning._download import Downloader

    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        member = tarfile.TarInfo("dagger")
        content = (cli_text or "").encode()
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    digest = hashlib.sha256(archive.getvalue()).hexdigest()
    released = threading.Event()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            if cli_text is None:
                released.wait(60)
                self.close_connection = True
            elif self.path.endswith("/checksums.txt"):
                self.answer(200, f"{digest}  {Downloader().archive_name}\n".encode())
            elif cli_text:
                self.answer(200, archive.getvalue())
            else:
                self.answer(404)

    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    with http_server(Handler) as port:
        monkeypatch.setattr(Downloader, "CLI_BASE_URL", f"http://127.0.0.1:{port}")
        try:
            yield released
        finally:
            released.set()


async def test_the_sdk_downloads_a_command_where_there_is_none(
    place: Place, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.command("docker", "echo 28.0.1")
    script = "\n".join(["#!/bin/sh", "PATH=/usr/bin:/bin", says_address(api.port), "cat"])
    with download_site(monkeypatch, place.home, script):
        async with open_session(environment=place.environment) as session:
            assert session.how == "the SDK's own download with Docker"
            await session.check()

    assert await place.empties()


async def test_a_download_that_fails_is_a_reason(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.command("docker", "echo 28.0.1")
    with (
        download_site(monkeypatch, place.home, ""),
        pytest.raises(NoEngineError, match=r"own download with Docker: .*404"),
    ):
        async with open_session(environment=place.environment):
            pytest.fail("there is no engine")


async def test_a_download_that_hangs_ends_at_the_deadline(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.command("docker", "echo 28.0.1")
    with download_site(monkeypatch, place.home, None):
        began = monotonic()
        with pytest.raises(NoEngineError, match="no dagger command within 1s"):
            async with open_session(environment=place.environment, open_seconds=1):
                pytest.fail("there is no engine")
        # The SDK's own limit for one piece is 5 s, for the whole there is none.
        assert monotonic() - began < 4


# --- open_session, where none is to be had ---


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


async def no_engine(environment: dict[str, str], open_seconds: float = 20) -> str:
    """Try to open a session, with no success; returns what is said then."""
    with pytest.raises(NoEngineError) as caught:
        async with open_session(environment=environment, open_seconds=open_seconds):
            pytest.fail("there is no engine")
    shown = "".join(traceback.format_exception(caught.value))
    assert "During handling of" not in shown
    assert "direct cause" not in shown
    return str(caught.value)


def reasons(message: str) -> list[str]:
    first, *lines, last = message.splitlines()
    assert first == "no Dagger engine could be reached. Tried:"
    assert last.startswith("Start Docker, or ")
    assert all(line.startswith("  - ") for line in lines), "a reason is one line"
    return [line.removeprefix("  - ") for line in lines]


async def test_with_nothing_to_be_had_one_message_says_what_was_tried_and_what_to_do(
    place: Place,
) -> None:
    message = await no_engine(place.environment)

    assert reasons(message) == [
        "the SDK's own download with Docker: there is no docker command on PATH"
    ]
    assert message.startswith("no Dagger engine could be reached")
    assert RUNNER_HOST in message
    assert "--engine embedded" in message
    assert len(message.splitlines()) < 8


async def test_each_way_that_was_tried_is_listed_with_its_reason(place: Place) -> None:
    place.command("dagger", "echo connecting >&2", "echo 'no route to engine' >&2", "exit 1")
    port = closed_port()
    environment = {
        **place.environment,
        "DAGGER_SESSION_PORT": str(port),
        "DAGGER_SESSION_TOKEN": "t",
        RUNNER_HOST: "tcp://engine:1",
    }
    session, runner = reasons(await no_engine(environment))

    assert session.startswith(f"the attached session on port {port}: ")
    assert "connect" in session
    assert runner.startswith("the runner host tcp://engine:1: dagger session ended")
    assert runner.endswith("no route to engine")


async def test_the_embedded_engine_is_never_what_is_fallen_back_to(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def tempting(*_: object) -> EngineSession:
        pytest.fail("the embedded engine was opened")

    monkeypatch.setattr(module, "_open_embedded", tempting)
    for choice in (EngineChoice.AUTO, EngineChoice.DAGGER):
        with pytest.raises(NoEngineError):
            async with open_session(choice, environment=place.environment):
                pytest.fail("there is no engine")


async def test_a_broken_variable_is_said_before_anything_is_tried(place: Place) -> None:
    place.command("dagger", f"echo called > {place.home}/called")
    environment = {**place.environment, "DAGGER_SESSION_PORT": "1", RUNNER_HOST: "tcp://engine:1"}

    assert "DAGGER_SESSION_TOKEN" in await no_engine(environment)
    assert not (place.home / "called").exists()


async def test_a_named_command_that_does_not_exist_is_a_reason(place: Place) -> None:
    environment = {**place.environment, CLI_BIN: "/not/there", RUNNER_HOST: "tcp://engine:1"}
    (reason,) = reasons(await no_engine(environment))
    assert "/not/there: No such file" in reason


@pytest.mark.parametrize("sleep", ["exec sleep 600", "sleep 600; exit 0"], ids=["exec", "child"])
async def test_a_command_that_hangs_ends_at_the_deadline_and_leaves_no_process(
    place: Place, sleep: str
) -> None:
    place.command("dagger", "echo 'connecting to engine' >&2", sleep)
    began = monotonic()
    (reason,) = reasons(
        await no_engine({**place.environment, RUNNER_HOST: "tcp://engine:1"}, open_seconds=1)
    )

    assert monotonic() - began < 8
    assert "no port within 1s" in reason
    assert "connecting to engine" in reason
    assert await place.empties(), place.processes()


async def test_a_session_that_takes_no_query_ends_at_the_deadline_and_leaves_no_process(
    place: Place, api: Api
) -> None:
    api.misbehaves = api.hang
    place.command("dagger", says_address(api.port), SERVES_UNTIL_TOLD)
    began = monotonic()
    environment = {**place.environment, RUNNER_HOST: "tcp://engine:1"}
    (reason,) = reasons(await no_engine(environment, open_seconds=2))

    assert "no answer within 2s" in reason
    assert monotonic() - began < 15
    assert await place.empties()


def says_404(handler: QuietHandler) -> bool:
    handler.answer(404, b"<html>not here</html>", Content_Type="text/html")
    return True


def says_html(handler: QuietHandler) -> bool:
    handler.answer(200, b"<html>welcome</html>", Content_Type="text/html")
    return True


def says_errors(handler: QuietHandler) -> bool:
    body = b'{"errors": [{"message": "engine is shutting down"}]}'
    handler.answer(200, body, Content_Type="application/json")
    return True


def hangs_up(handler: QuietHandler) -> bool:
    handler.close_connection = True
    return True


@pytest.mark.parametrize("misbehaves", [says_404, says_html, says_errors, hangs_up])
async def test_what_is_no_engine_is_a_reason_of_one_line(
    place: Place, api: Api, misbehaves: Callable[[QuietHandler], bool]
) -> None:
    api.misbehaves = misbehaves
    (reason, _) = reasons(await no_engine({**place.environment, **attached(api)}))
    assert reason.startswith(f"the attached session on port {api.port}: ")


async def test_a_wrong_token_is_a_reason_and_is_not_repeated(place: Place, api: Api) -> None:
    environment = {**place.environment, **attached(api), "DAGGER_SESSION_TOKEN": "wr0ng-t0ken"}
    message = await no_engine(environment)

    assert "401" in reasons(message)[0]
    assert "wr0ng-t0ken" not in message


@pytest.mark.parametrize("when", ["before its port", "while it is connected to"])
async def test_a_cancellation_while_it_opens_leaves_no_process(
    place: Place, api: Api, when: str
) -> None:
    api.misbehaves = api.hang
    says = [says_address(api.port)] if when == "while it is connected to" else []
    place.command("dagger", *says, SERVES_UNTIL_TOLD)

    async def hold() -> None:
        async with open_session(environment={**place.environment, RUNNER_HOST: "tcp://engine:1"}):
            pytest.fail("there is no engine")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hold)
        with anyio.fail_after(30):
            while not (api.asked if says else place.processes()):
                await anyio.sleep(0.02)
        began = monotonic()
        tasks.cancel_scope.cancel()

    assert monotonic() - began < 8
    assert await place.empties(), place.processes()


# --- Docker ---


async def test_docker_that_answers_is_no_problem(place: Place) -> None:
    said = place.home / "said"
    place.command("docker", f'echo "$@" > {said}', "echo 28.0.1")

    assert await docker_problem(place.environment) is None
    assert said.read_text().startswith("version ")


async def test_docker_that_fails_says_why_in_its_last_line(place: Place) -> None:
    place.command(
        "docker",
        "echo 'Client: 28.0.1'",
        "echo 'WARNING: something' >&2",
        "echo 'Cannot connect to the Docker daemon. Is it running?' >&2",
        "exit 1",
    )
    place.command("dagger", f"echo called > {place.home}/called")
    (reason,) = reasons(await no_engine(place.environment))

    assert reason.endswith("with Docker: Cannot connect to the Docker daemon. Is it running?")
    assert not (place.home / "called").exists(), "without Docker it has nothing to look for"


async def test_docker_that_fails_without_a_word_is_a_problem(place: Place) -> None:
    place.command("docker", "exit 1")
    assert await docker_problem(place.environment) == "docker version failed"


@pytest.mark.parametrize("sleep", ["exec sleep 600", "sleep 600; exit 0"], ids=["exec", "child"])
async def test_docker_that_hangs_is_not_waited_for(
    place: Place, monkeypatch: pytest.MonkeyPatch, sleep: str
) -> None:
    monkeypatch.setattr(module, "DOCKER_SECONDS", 1)
    place.command("docker", sleep)
    began = monotonic()
    (reason,) = reasons(await no_engine(place.environment))

    assert reason.endswith("Docker gave no answer within 1s")
    assert monotonic() - began < 8
    assert not any("docker" in command for command in place.processes().values())


async def test_docker_that_cannot_be_started_is_a_problem(place: Place) -> None:
    make_unreadable_as_program(place.bin / "docker")
    (reason,) = reasons(await no_engine(place.environment))
    assert "docker" in reason
    assert "format" in reason.lower()


async def test_docker_gets_the_given_environment(place: Place) -> None:
    said = place.home / "said"
    place.command("docker", f'echo "$DOCKER_HOST" > {said}')
    await docker_problem({**place.environment, "DOCKER_HOST": "tcp://elsewhere:2375"})

    assert said.read_text() == "tcp://elsewhere:2375\n"
    assert os.environ.get("DOCKER_HOST") != "tcp://elsewhere:2375"


async def test_no_proxy_hears_of_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0.1)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)

        async with open_session(EngineChoice.EMBEDDED, environment=os.environ) as session:
            await session.check()

        # Its requests carry the session's token.
        with pytest.raises(TimeoutError):
            proxy.accept()
