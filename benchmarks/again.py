"""One directory sent again and again, each time in a session of its own: as on the command line."""

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from benchmarks.bench import NOT_QUICK, Bench
from benchmarks.figures import Figure
from benchmarks.measure import Measured, Watch
from benchmarks.workload import Repository
from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.session import NoEngineError, open_session
from moonmind_ext.workspace.send import send_workspace
from moonmind_ext.workspace.source import read_standing
from pipelines.payload import WorkspaceFilter

SIZES = (1_000, 10_000, 20_000)
QUICK_SIZES = (1_000,)
WARM_UPS = 2

BARE = "sending it whole"
CASES = {"unchanged": "unchanged", "changed": "20 files changed again"}


async def measure(bench: Bench) -> AsyncIterator[Figure]:
    """Measure each size; the embedded engine keeps nothing from session to session."""
    problem = ""
    try:
        async with open_session(EngineChoice.DAGGER, environment=os.environ):
            pass
    except NoEngineError as error:
        problem = " ".join(str(error).split())
    for files in SIZES:
        missing = problem or (NOT_QUICK if bench.quick and files not in QUICK_SIZES else "")
        measured = None if missing else await _rounds(bench, files)
        for case, says in CASES.items():
            name, what = f"again/{files}/{case}", f"{files:,} files in a new session: {says}"
            if measured is None:
                yield Figure(name=name, what=what, missing=missing)
            else:
                yield measured.figure(name, what, says, f"{BARE}, {says}")


async def _rounds(bench: Bench, files: int) -> Measured:
    repository = Repository.make(bench.new_path("origin"), files=files)
    # Each side has a directory that the engine knows from that side alone.
    ours, bare = (repository.clone(bench.new_path("clone")) for _ in range(2))
    measured = Measured()
    for number in range(-WARM_UPS, bench.rounds):
        for case, says in CASES.items():
            if case == "changed":
                for clone in (ours, bare):
                    repository.change(clone, f"again {number}")
            sides = [(says, ours), (f"{BARE}, {says}", bare)]
            for name, clone in sides if number % 2 else reversed(sides):
                watch = await (_send(clone) if clone is ours else _send_whole(clone))
                if number >= 0:
                    measured.add(name, watch)
    for path in (repository.path, ours, bare):
        shutil.rmtree(path)
    return measured


async def _send(workspace: Path) -> Watch:
    async with open_session(EngineChoice.DAGGER, environment=os.environ) as session:
        with (watch := Watch()):
            standing = await read_standing(workspace, "acme/widgets")
            await send_workspace(session.client, workspace, WorkspaceFilter(), standing=standing)
    return watch


async def _send_whole(workspace: Path) -> Watch:
    async with open_session(EngineChoice.DAGGER, environment=os.environ) as session:
        with (watch := Watch()):
            await session.client.host().directory(os.fspath(workspace), no_cache=True).sync()
    return watch
