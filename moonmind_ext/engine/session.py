"""Sessions with an engine: choose one, open it, check it, close it."""

import shutil
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import TYPE_CHECKING, Literal
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread
import httpx

from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.cli_session import PORTS, SessionAddress, SessionStartError, cli_session
from moonmind_ext.engine.live import LiveLogs, receive_live_logs
from pipelines.concurrency import together

if TYPE_CHECKING:
    import dagger

    from moonmind_ext.workspace.bases import Bases
    from pipelines.container_task import Image

DEFAULT_OPEN_SECONDS = 30.0
"""From nothing to an answered query. An engine that runs takes half a second, one
whose container Docker has to start some seconds more; pulling its image the first
time is `doctor`'s business, or a longer setting's."""

CHECK_SECONDS = 10
"""For one small query. A busy engine answers in well under a second."""

DOCKER_SECONDS = 5
"""For Docker to say that it is there."""

_PORT_DIGITS = 5


class NoEngineError(Exception):
    """No engine could be had; the message lists what was tried and what to do."""


@dataclass(frozen=True, slots=True)
class EngineSession:
    """A session with an engine that has answered.

    Attributes
    ----------
    kind
        `dagger` for a real engine.
    version
        As the engine says it.
    how
        How it was found, for people.
    client
        Isolated; never repeats a query.
    live
        What commands print while they run; None where the session was started by
        somebody else, who has asked for no records in our name.
    images
        Those that were brought into the engine, by how they were asked for: while the
        session is open it keeps them, and a tag means what it meant the first time.
    bases
        Workspaces that were sent, for the next to be sent as what differs; None in a
        session that is opened for one run.
    """

    kind: Literal["dagger", "embedded"]
    version: str
    how: str
    client: "dagger.Client"
    live: LiveLogs | None
    images: "dict[tuple[str, str], Image]" = field(default_factory=dict, repr=False, compare=False)
    bases: "Bases | None" = field(default=None, repr=False, compare=False)
    # Kept as long as somebody waits for or has one.
    _turns: "WeakValueDictionary[str, anyio.Lock]" = field(
        default_factory=WeakValueDictionary, repr=False, compare=False
    )

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Wait until no other run of this session has the same name.

        The engine merges identical commands that run at once, so one run's failure or
        stop would be the other's too.
        """
        lock = self._turns.get(name)
        if lock is None:
            lock = self._turns[name] = anyio.Lock()
        async with lock:
            yield

    async def check(self) -> None:
        """Ask the engine something, through the whole way.

        Raises
        ------
        TimeoutError
            After `CHECK_SECONDS`.
        Exception
            Whatever the SDK raises: the session is of no use any more.
        """
        with anyio.fail_after(CHECK_SECONDS):
            await self.client.version()


@dataclass(frozen=True, slots=True)
class Way:
    """One way to a real engine.

    Attributes
    ----------
    how
        For people.
    attached
        An address that somebody else's session serves.
    cli
        The `dagger` command to start a session with; None for the SDK's download.
    needs_docker
        Whether that command will look for an engine in Docker.
    """

    how: str
    attached: SessionAddress | None = None
    cli: str | None = None
    needs_docker: bool = False


def ways(environment: Mapping[str, str]) -> list[Way]:
    """List the ways to a real engine that an environment opens, in their order.

    Raises
    ------
    NoEngineError
        When a variable that names one is broken.
    """
    found: list[Way] = []
    if port := environment.get("DAGGER_SESSION_PORT"):
        token = environment.get("DAGGER_SESSION_TOKEN", "")
        if not _is_port(port) or not token:
            raise NoEngineError(
                "DAGGER_SESSION_PORT is set: it must be a port's number, with DAGGER_SESSION_TOKEN "
                "beside it. `dagger run` sets both; unset them to have a session of your own."
            )
        address = SessionAddress(int(port), token)
        found.append(Way(f"the attached session on port {port}", attached=address))
    cli = environment.get("_EXPERIMENTAL_DAGGER_CLI_BIN") or shutil.which(
        "dagger", path=environment.get("PATH", "")
    )
    if host := environment.get("_EXPERIMENTAL_DAGGER_RUNNER_HOST"):
        found.append(Way(f"the runner host {host}", cli=cli))
    elif cli:
        found.append(Way(f"{cli} with Docker", cli=cli, needs_docker=True))
    else:
        found.append(Way("the SDK's own download with Docker", needs_docker=True))
    return found


def _is_port(text: str) -> bool:
    return text.isdecimal() and len(text) <= _PORT_DIGITS and 0 < int(text) < PORTS


@asynccontextmanager
async def open_session(
    choice: EngineChoice = EngineChoice.AUTO,
    *,
    environment: Mapping[str, str],
    open_seconds: float = DEFAULT_OPEN_SECONDS,
    for_many: bool = False,
) -> AsyncIterator[EngineSession]:
    """Open a session with the first engine that answers.

    `auto` never means the embedded engine: that is asked for by name.

    Parameters
    ----------
    environment
        The variables that name an engine; also what `dagger session` gets.
    open_seconds
        For each way, from nothing to an answered query.
    for_many
        Whether many runs share it, on checkouts of the same repositories.

    Raises
    ------
    NoEngineError
        When none answers.
    """
    async with _open_first(choice, environment, open_seconds) as session:
        yield replace(session, bases=_no_bases()) if for_many else session


def _no_bases() -> "Bases":
    from moonmind_ext.workspace.bases import Bases

    return Bases()


@asynccontextmanager
async def _open_first(
    choice: EngineChoice, environment: Mapping[str, str], open_seconds: float
) -> AsyncIterator[EngineSession]:
    if choice is EngineChoice.EMBEDDED:
        async with AsyncExitStack() as stack:
            yield await _open_embedded(stack, open_seconds)
        return
    tried: list[str] = []
    for way in ways(environment):
        # Closes also when the attempt fails or is cancelled half-way.
        async with AsyncExitStack() as attempt:
            try:
                session = await _open(attempt, way, environment, open_seconds)
            except _NoAnswerError as error:
                tried.append(f"  - {way.how}: {' '.join(str(error).split())}")
                continue
            yield session
            return
    raise NoEngineError(
        "no Dagger engine could be reached. Tried:\n" + "\n".join(tried) + "\n"
        "Start Docker, or name an engine in _EXPERIMENTAL_DAGGER_RUNNER_HOST "
        "(unix:///path/to/engine.sock or tcp://host:port), or take the embedded "
        "engine with --engine embedded. `moonmind-ext doctor` shows more."
    )


class _NoAnswerError(Exception):
    """One way leads to no engine; the message says why."""


async def _open(
    stack: AsyncExitStack, way: Way, environment: Mapping[str, str], seconds: float
) -> EngineSession:
    if way.needs_docker and (problem := await docker_problem(environment)):
        raise _NoAnswerError(problem)
    ends = anyio.current_time() + seconds
    live = None
    address = way.attached
    if address is None:
        live = await stack.enter_async_context(receive_live_logs())
        try:
            with anyio.fail_after(seconds):
                cli = way.cli or await _download_cli()
            address = await stack.enter_async_context(
                cli_session(
                    cli,
                    environment=_session_environment(environment, live),
                    deadline=ends - anyio.current_time(),
                )
            )
        except SessionStartError as error:
            raise _NoAnswerError(str(error)) from error
        except TimeoutError:
            raise _NoAnswerError(f"no dagger command within {seconds:g}s") from None
    client, version = await _connect(stack, address, ends - anyio.current_time())
    return EngineSession("dagger", version, way.how, client, live)


async def _open_embedded(stack: AsyncExitStack, seconds: float) -> EngineSession:
    from moonmind_ext.embedded import sandbox_problem, serve

    if problem := await anyio.to_thread.run_sync(sandbox_problem):
        raise NoEngineError(f"the embedded engine cannot run here: {problem}")
    live = await stack.enter_async_context(receive_live_logs())
    engine = await stack.enter_async_context(serve(logs_endpoint=live.endpoint))
    try:
        address = SessionAddress(engine.port, engine.token)
        client, _ = await _connect(stack, address, seconds)
    except _NoAnswerError as error:
        raise NoEngineError(f"the embedded engine does not answer: {error}") from error
    # Its own version: what it answers is that of the API it speaks.
    version = metadata.version("moonmind-ext")
    return EngineSession("embedded", version, "the embedded engine", client, live)


async def _connect(
    stack: AsyncExitStack, address: SessionAddress, seconds: float
) -> "tuple[dagger.Client, str]":
    """Connect the SDK to a session and ask for the engine's version."""
    try:
        with anyio.fail_after(seconds):
            # Half a second of import; meanwhile the loop goes on reading what the session
            # says.
            await together(anyio.to_thread.run_sync(_import_dagger), _wake(address))
            return await _connect_sdk(stack, address)
    except TimeoutError:
        raise _NoAnswerError(f"no answer within {seconds:.0f}s") from None


async def _connect_sdk(
    stack: AsyncExitStack, address: SessionAddress
) -> "tuple[dagger.Client, str]":
    import dagger
    from dagger.client._config import ConnectConfig
    from dagger.client._session import ConnectParams, SingleConnection

    from moonmind_ext.engine.client import make_client

    params = ConnectParams(port=address.port, session_token=address.token)
    # No retry: a query whose transport failed may have started the command already.
    config = ConnectConfig(timeout=dagger.Timeout(None, connect=CHECK_SECONDS), retry=None)
    connection = SingleConnection(params, config)
    try:
        await connection.connect()
        stack.push_async_callback(connection.close)
        client = make_client(connection)
        return client, await client.version()
    except TimeoutError:
        raise
    except (dagger.DaggerError, OSError) as error:
        raise _NoAnswerError(str(error)) from error


def _import_dagger() -> None:
    import dagger  # noqa: F401


async def _wake(address: SessionAddress) -> None:
    """Ask something early: the first answer of a session takes 0.2 s.

    Whether there is an answer is found out afterwards.
    """
    with suppress(httpx.HTTPError):
        # The token is not for the proxy that a variable may name.
        async with httpx.AsyncClient(
            auth=(address.token, ""), timeout=CHECK_SECONDS, trust_env=False
        ) as http:
            await http.post(f"http://127.0.0.1:{address.port}/query", json={"query": "{ version }"})


async def _download_cli() -> str:
    # Imported here: half a second, and the loop goes on meanwhile.
    await anyio.to_thread.run_sync(_import_dagger)
    import dagger
    from dagger.provisioning._download import Downloader

    try:
        # Awaiting the SDK's downloader would wait for its thread, deadline or not.
        return await anyio.to_thread.run_sync(Downloader().get_sync, abandon_on_cancel=True)
    except (dagger.DaggerError, OSError, ValueError) as error:
        raise _NoAnswerError(f"no dagger command could be downloaded: {error}") from error


async def docker_problem(environment: Mapping[str, str]) -> str | None:
    """Say why Docker cannot be used; None where it can."""
    docker = shutil.which("docker", path=environment.get("PATH", ""))
    if docker is None:
        return "there is no docker command on PATH"
    command = [docker, "version", "--format", "{{.Server.Version}}"]
    try:
        with anyio.fail_after(DOCKER_SECONDS):
            result = await anyio.run_process(
                command, check=False, env=environment, stdin=subprocess.DEVNULL
            )
    except TimeoutError:
        return f"Docker gave no answer within {DOCKER_SECONDS}s"
    except OSError as error:
        return f"{docker}: {error.strerror}"
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "docker version failed"
    return None


def _session_environment(environment: Mapping[str, str], live: LiveLogs) -> dict[str, str]:
    # In an attached session that did not answer, the command would make one inside it.
    attached = {"DAGGER_SESSION_PORT", "DAGGER_SESSION_TOKEN"}
    return {
        **{name: value for name, value in environment.items() if name not in attached},
        "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": live.endpoint,
        "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_TRACES_LIVE": "1",
        # Another version's engine on this host may be running somebody's task.
        "DAGGER_LEAVE_OLD_ENGINE": "1",
        "DAGGER_NO_NAG": "1",
        "DO_NOT_TRACK": "1",
        # Keeps the telemetry of a long session out of its memory.
        "DAGGER_SILENT": "1",
    }
