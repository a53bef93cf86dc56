"""Opening a session, and whole commands that open one: `moonmind-ext run`, `dagger call`."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import dagger

from benchmarks.bench import NOT_QUICK, Bench
from benchmarks.figures import Figure
from benchmarks.measure import Watch, side_by_side
from benchmarks.startup import CLI, CommandError, command
from benchmarks.workload import write_payload
from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.session import NoEngineError, open_session

OURS = "a session"
SDK = "a session of the SDK's"
RUN = "moonmind-ext run"
CALL = "dagger call"

MODULE = os.environ.get("MOONMIND_MODULE", str(Path(__file__).parent.parent))


async def measure(bench: Bench) -> AsyncIterator[Figure]:
    """Measure everything that begins with no session."""
    name, what = "session/open", "opening a session, up to its first answer"
    try:
        async with open_session(EngineChoice.DAGGER, environment=os.environ):
            pass
    except NoEngineError as error:
        missing = " ".join(str(error).split())
        yield Figure(name=name, what=what, missing=missing)
        yield Figure(name=_CALL_NAME, what=_CALL_WHAT, missing=missing)
        return
    measured = await side_by_side({OURS: _open, SDK: _connect}, rounds=bench.rounds)
    yield measured.figure(name, what, OURS, SDK)
    yield await _run_and_call(bench)


async def _open(watch: Watch) -> None:
    async with AsyncExitStack() as stack:
        with watch:
            session = open_session(EngineChoice.DAGGER, environment=os.environ)
            await stack.enter_async_context(session)


async def _connect(watch: Watch) -> None:
    async with AsyncExitStack() as stack:
        with watch:
            client = await stack.enter_async_context(dagger.Connection(dagger.Config()))
            await client.version()


_CALL_NAME = "session/run"
_CALL_WHAT = "`moonmind-ext run` of an empty task beside `dagger call`, from start to end"


async def _run_and_call(bench: Bench) -> Figure:
    cli = os.environ.get("_EXPERIMENTAL_DAGGER_CLI_BIN") or shutil.which("dagger")
    if bench.quick or cli is None:
        missing = NOT_QUICK if bench.quick else "there is no dagger command on PATH"
        return Figure(name=_CALL_NAME, what=_CALL_WHAT, missing=missing)
    payload = str(write_payload(bench.new_path("payload"), bench.image, ["true"]))
    workspace = bench.new_path("workspace")
    workspace.mkdir()
    (workspace / "README.md").write_text("# Widgets\n")
    output = bench.new_path("output")
    run = command(*CLI, "run", payload, "--workspace", str(workspace), "--output", str(output))
    call = command(
        *(cli, "--silent", "--mod", MODULE, "call"),
        *(f"--helper-image={bench.image}", "run"),
        *(f"--payload={payload}", f"--workspace={workspace}", "check"),
    )
    try:
        # The first call builds the module's runtime, which needs a package index.
        await call(Watch())
    except CommandError as error:
        return Figure(name=_CALL_NAME, what=_CALL_WHAT, missing=str(error))
    measured = await side_by_side({RUN: run, CALL: call}, rounds=bench.rounds, warm_ups=1)
    return measured.figure(_CALL_NAME, _CALL_WHAT, RUN, CALL)
