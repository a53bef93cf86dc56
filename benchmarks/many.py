"""Several tasks at once in one session: how many a second, and what they take of us."""

from collections.abc import AsyncIterator

from benchmarks.bare import Bare, bare
from benchmarks.bench import Bench, Desk, desk, find_engine
from benchmarks.figures import Figure
from benchmarks.measure import Act, Quantity, Watch, memory_now, side_by_side
from pipelines.concurrency import together

COUNTS = (1, 4, 16, 64)
QUICK_COUNTS = (1, 4)

OURS = "tasks"
BARE = "bare engine calls"


async def measure(bench: Bench) -> AsyncIterator[Figure]:
    """Measure batches that begin together, until the last has ended."""
    choice, problem = await find_engine()
    if choice is None:
        yield Figure(name="many", what="several tasks at once", missing=problem)
        return
    for count in QUICK_COUNTS if bench.quick else COUNTS:
        # An engine slows down with what a session has made.
        async with desk(bench, choice) as ours, bare(ours) as floor:
            before = memory_now()
            measured = await side_by_side(
                {OURS: _ours(ours, count), BARE: _bare(ours, floor, count)},
                rounds=bench.rounds,
                warm_ups=1,
            )
        name, what = f"many/{count}", f"{count} at once" if count > 1 else "one at a time"
        yield measured.figure(f"{name}/rate", what, OURS, BARE, _rate(count))
        about = f"{what}: our process's CPU for each"
        yield measured.figure(f"{name}/cpu", about, OURS, BARE, _cpu(count))
        yield measured.memory(f"{name}/memory", what, OURS, before)


def _ours(desk: Desk, count: int) -> Act:
    async def act(watch: Watch) -> None:
        with watch:
            await together(*(desk.run("true") for _ in range(count)))

    return act


def _bare(desk: Desk, floor: Bare, count: int) -> Act:
    async def act(watch: Watch) -> None:
        outputs = [desk.bench.new_path("bare") for _ in range(count)]
        with watch:
            await together(
                *(floor.run("true", workspace=desk.workspace, output=path) for path in outputs)
            )

    return act


def _rate(count: int) -> Quantity:
    return Quantity("tasks/s", lambda watch: count / watch.seconds)


def _cpu(count: int) -> Quantity:
    return Quantity("ms", lambda watch: watch.cpu * 1000 / count)
