"""Tasks that print much: against the same by the bare engine calls; and 1 GB for its memory."""

from collections.abc import AsyncIterator

from benchmarks.bare import Bare, bare
from benchmarks.bench import NOT_QUICK, Bench, Desk, desk, find_engine
from benchmarks.figures import Bound, Figure
from benchmarks.measure import Act, Measured, Watch, memory_now, side_by_side

SIZES_MB = (1, 10, 100)
QUICK_SIZES_MB = (1,)
HUGE_MB = 1000
HUGE = "output/memory"
HUGE_WHAT = "a task that prints 1 GB"
HUGE_BOUNDS = (Bound("a", 300),)

OURS = "a task"
BARE = "bare engine calls"
LINE = "0123456789" * 8


async def measure(bench: Bench) -> AsyncIterator[Figure]:
    """Measure each size, and the largest once: a peak is a peak."""
    choice, problem = await find_engine()
    if choice is None:
        yield Figure(name=HUGE, what=HUGE_WHAT, bounds=HUGE_BOUNDS, missing=problem)
        return
    async with desk(bench, choice) as ours, bare(ours) as floor:
        before = memory_now()
        for megabytes in QUICK_SIZES_MB if bench.quick else SIZES_MB:
            command = _command(megabytes)
            measured = await side_by_side(
                {OURS: _ours(ours, command), BARE: _bare(bench, floor, command)},
                rounds=bench.rounds,
                warm_ups=1,
            )
            what = f"a task that prints {megabytes} MB"
            yield measured.figure(f"output/{megabytes}", what, OURS, BARE)
        if bench.quick:
            yield Figure(name=HUGE, what=HUGE_WHAT, bounds=HUGE_BOUNDS, missing=NOT_QUICK)
            return
        huge = Measured()
        await _ours(ours, _command(HUGE_MB))(watch := Watch())
        huge.add(OURS, watch)
        yield huge.memory(HUGE, HUGE_WHAT, OURS, before, HUGE_BOUNDS)


def _command(megabytes: int) -> tuple[str, ...]:
    return ("sh", "-c", f"yes {LINE} | head -c {megabytes}000000")


def _ours(desk: Desk, command: tuple[str, ...]) -> Act:
    async def act(watch: Watch) -> None:
        with watch:
            await desk.run(*command)

    return act


def _bare(bench: Bench, floor: Bare, command: tuple[str, ...]) -> Act:
    async def act(watch: Watch) -> None:
        output = bench.new_path("bare")
        with watch:
            await floor.print(*command, output=output)
        output.unlink()

    return act
