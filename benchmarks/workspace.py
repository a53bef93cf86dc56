"""Sending workspaces: as a base and what differs from it, against sending them whole."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from benchmarks.bench import Bench, Desk, desk, find_engine
from benchmarks.figures import Bound, Figure, Side
from benchmarks.measure import SECONDS, Measured, Watch
from benchmarks.workload import Repository
from moonmind_ext.workspace.bases import Bases
from moonmind_ext.workspace.manifest import look, read
from moonmind_ext.workspace.send import Size, send_workspace
from moonmind_ext.workspace.source import Standing
from pipelines.payload import WorkspaceFilter
from pipelines.report import Source

SIZES = (100, 1_000, 10_000, 20_000)
QUICK_SIZES = (100, 1_000)
GROWTH = (1_000, 20_000)

WHOLE = "sending it whole"
FIRST = "first send, kept as a base"
UNCHANGED = "unchanged"
CHANGED = "20 files changed"
FRESH = "fresh clone, 20 files changed"
HASHING = "hashing it"

CHANGED_BOUNDS = (Bound("ratio", 0.2), Bound("a", 0.8))
"""Of the largest, as a fresh clone."""


async def measure(bench: Bench) -> AsyncIterator[Figure]:
    """Measure each size in a session of its own: an engine keeps what a session made."""
    choice, problem = await find_engine()
    sizes = QUICK_SIZES if bench.quick else SIZES
    by_size: dict[int, Measured] = {}
    for files in SIZES:
        big = files == max(SIZES)
        size = f"{files:,} files" + (" and one of 200 MB" if big else "")
        if files in sizes and choice is not None:
            async with desk(bench, choice) as ours:
                by_size[files] = await _rounds(bench, ours, files, big=big)
        for name in (FIRST, UNCHANGED, CHANGED, FRESH):
            what = f"{size}: {name}"
            about = f"workspace/{files}/{name.split(',')[0].replace(' ', '-')}"
            bounds = CHANGED_BOUNDS if big and name is FRESH else ()
            if files in by_size:
                yield by_size[files].figure(about, what, name, WHOLE, SECONDS, bounds)
            else:
                missing = problem if choice is None else "is not in a quick run"
                yield Figure(name=about, what=what, bounds=bounds, missing=missing)
    yield _growth(by_size)


async def _rounds(bench: Bench, ours: Desk, files: int, *, big: bool) -> Measured:
    repository = Repository.make(bench.new_path("origin"), files=files, big=big)
    # Which job sends the base does not matter.
    clone = repository.clone(bench.new_path("clone"))
    await _send(ours, clone, ours.session.bases)
    shutil.rmtree(clone)
    measured = Measured()
    for number in range(bench.rounds):
        await _round(bench, ours, repository, measured, number)
    shutil.rmtree(repository.path)
    return measured


async def _round(
    bench: Bench, ours: Desk, repository: Repository, measured: Measured, number: int
) -> None:
    """Send one clone in all ways, so that a round has one clone to wait for."""

    async def timed(name: str, bases: Bases | None) -> None:
        with (watch := Watch()):
            await _send(ours, clone, bases)
        measured.add(name, watch)

    clone = repository.clone(bench.new_path("clone"))
    repository.change(clone, f"fresh {number}")
    await timed(FRESH, ours.session.bases)
    await timed(UNCHANGED, ours.session.bases)
    repository.change(clone, f"again {number}")
    await timed(CHANGED, ours.session.bases)
    for name in (WHOLE, FIRST) if number % 2 else (FIRST, WHOLE):
        # At a path that the engine has not seen: there it takes everything.
        clone = clone.rename(bench.new_path("clone"))
        await timed(name, Bases() if name is FIRST else None)
    with (watch := Watch()):
        read(clone, look(clone), {})
    measured.add(HASHING, watch)
    shutil.rmtree(clone)


async def _send(ours: Desk, workspace: Path, bases: Bases | None) -> Size:
    _, size = await send_workspace(
        ours.session.client,
        workspace,
        WorkspaceFilter(),
        bases=bases,
        standing=Standing(Source(repository="acme/widgets"), is_clone=True),
    )
    return size


def _growth(by_size: dict[int, Measured]) -> Figure:
    name = "workspace/growth"
    what = (
        f"growth from {GROWTH[0]:,} to {GROWTH[1]:,} files, {FRESH}, against that of hashing them"
    )
    bounds = (Bound("ratio", 1.0),)
    if not all(files in by_size for files in GROWTH):
        missing = "needs both sizes"
        return Figure(name=name, what=what, unit="", bounds=bounds, missing=missing)

    def growth(of: str) -> tuple[Side, int]:
        small, large = (by_size[files].watches[of] for files in GROWTH)
        values = [b.seconds / a.seconds for a, b in zip(small, large, strict=True)]
        return Side.of(of, values), len(values)

    (ours, n), (hashing, _) = growth(FRESH), growth(HASHING)
    return Figure(name=name, what=what, unit="times", a=ours, b=hashing, n=n, bounds=bounds)
