"""Tasks run together while what they ask for fits, and each gets its turn."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.abc import TaskGroup
from hypothesis import given, settings
from hypothesis import strategies as st

from moonmind_ext.worker.admission import Admission, Capacity
from pipelines.payload import Resources

GIB = 1 << 30
ENGINE_HAS = "and the engine of this worker has"


def asks(cpus: float | None = None, memory: int | None = None) -> Resources:
    return Resources(cpus=cpus, memory=None if memory is None else f"{memory}g")


class Task:
    """A task that stays inside until it is told to go, or its waiting is ended."""

    def __init__(self, resources: Resources | None) -> None:
        self.resources = resources
        self.is_in = False
        self.is_done = False
        self._go = anyio.Event()
        self._scope = anyio.CancelScope()

    async def run(self, admission: Admission) -> None:
        with self._scope:
            async with admission.admitted(self.resources):
                self.is_in = True
                await self._go.wait()
        self.is_in = False
        self.is_done = True

    def go(self) -> None:
        self._go.set()

    def give_up(self) -> None:
        self._scope.cancel()


@asynccontextmanager
async def office(cpus: float, gib: int) -> AsyncIterator[tuple[Admission, TaskGroup]]:
    async with anyio.create_task_group() as tasks:
        yield Admission(Capacity(cpus, gib * GIB)), tasks
        tasks.cancel_scope.cancel()


async def settled() -> None:
    """Let everybody come as far as they get: there is no clock in this."""
    for _ in range(50):
        await anyio.lowlevel.checkpoint()


async def enter(admission: Admission, tasks: TaskGroup, *wishes: Resources | None) -> list[Task]:
    found = [Task(wish) for wish in wishes]
    for task in found:
        tasks.start_soon(task.run, admission)
        await settled()
    return found


def inside(tasks: list[Task]) -> list[bool]:
    return [task.is_in for task in tasks]


async def test_tasks_run_together_while_they_fit() -> None:
    async with office(4, 8) as (admission, tasks):
        many = await enter(admission, tasks, asks(2, 2), asks(2, 2), asks(1, 1), asks(1, 1))
        assert inside(many) == [True, True, False, False]
        many[0].go()
        await settled()
        assert inside(many) == [False, True, True, True]


async def test_memory_alone_keeps_a_task_out() -> None:
    async with office(100, 4) as (admission, tasks):
        many = await enter(admission, tasks, asks(1, 3), asks(1, 3))
        assert inside(many) == [True, False]
        many[0].go()
        await settled()
        assert inside(many) == [False, True]


async def test_a_task_that_asks_for_nothing_takes_nothing() -> None:
    async with office(1, 1) as (admission, tasks):
        many = await enter(admission, tasks, asks(1, 1), None, Resources(), None)
        assert inside(many) == [True] * 4


async def test_a_big_task_is_not_overtaken_by_small_ones() -> None:
    async with office(4, 8) as (admission, tasks):
        many = await enter(admission, tasks, asks(1), asks(1), asks(4), asks(1), None)
        # There would be room for the last two, but then for the big one never.
        assert inside(many) == [True, True, False, False, False]
        many[0].go()
        await settled()
        assert inside(many) == [False, True, False, False, False]
        many[1].go()
        await settled()
        assert inside(many) == [False, False, True, False, False]
        many[2].go()
        await settled()
        assert inside(many) == [False, False, False, True, True]


async def test_one_that_gives_up_waiting_lets_those_behind_it_in() -> None:
    async with office(4, 8) as (admission, tasks):
        many = await enter(admission, tasks, asks(2), asks(4), asks(1), asks(1))
        assert inside(many) == [True, False, False, False]
        many[1].give_up()
        await settled()
        assert inside(many) == [True, False, True, True]


async def test_it_is_calm_when_nobody_waits() -> None:
    async with office(2, 8) as (admission, tasks):
        with anyio.fail_after(5):
            await admission.calm()
        many = await enter(admission, tasks, asks(2), asks(1), asks(1))
        calm = anyio.Event()

        async def wait() -> None:
            await admission.calm()
            calm.set()

        tasks.start_soon(wait)
        await settled()
        assert not calm.is_set()
        many[1].give_up()
        await settled()
        assert not calm.is_set()
        many[0].go()
        with anyio.fail_after(5):
            await calm.wait()
        assert many[2].is_in


async def test_what_failed_inside_is_given_back() -> None:
    async with office(2, 8) as (admission, _):
        for _attempt in range(3):
            with pytest.raises(RuntimeError, match="inside"):
                async with admission.admitted(asks(2, 8)):
                    raise RuntimeError("inside")
        with anyio.fail_after(5):
            async with admission.admitted(asks(2, 8)):
                pass


_WISHES = st.lists(
    st.tuples(st.sampled_from([None, 0.1, 0.3, 1, 2, 3]), st.sampled_from([None, 1, 3, 5])),
    min_size=1,
    max_size=12,
)


# The first example starts an event loop, which may take longer than hypothesis likes.
@settings(deadline=None, max_examples=60)
@given(wishes=_WISHES, ends=st.lists(st.tuples(st.integers(0, 11), st.booleans()), max_size=20))
def test_capacity_is_never_exceeded_and_everybody_gets_a_turn(
    wishes: list[tuple[float | None, int | None]], ends: list[tuple[int, bool]]
) -> None:
    async def check() -> None:
        async with office(3, 5) as (admission, tasks):
            many = await enter(admission, tasks, *(asks(*wish) for wish in wishes))
            for number, gives_up in ends:
                task = many[number % len(many)]
                if gives_up:
                    task.give_up()
                elif task.is_in:
                    task.go()
                await settled()
                _check(many)
            # Whoever is in goes: then everybody else comes in, in the order of arrival.
            while any(waiting := [task for task in many if not (task.is_done or task.is_in)]):
                present = [task for task in many if task.is_in]
                assert present, "nobody is in, and somebody waits"
                present[0].go()
                await settled()
                _check(many)
                assert [task.is_in for task in waiting] == sorted(
                    (task.is_in for task in waiting), reverse=True
                )
            for task in many:
                task.go()
            await settled()
            # Nothing is left of them: a task that asks for all of it comes in at once.
            last = await enter(admission, tasks, asks(3, 5))
            assert inside(last) == [True]

    anyio.run(check)


def _check(many: list[Task]) -> None:
    present = [task.resources for task in many if task.is_in and task.resources]
    assert sum(wish.cpus or 0 for wish in present) <= 3 + 1e-9
    assert sum(wish.memory_bytes or 0 for wish in present) <= 5 * GIB


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (None, None),
        (Resources(), None),
        (asks(2, 4), None),
        (
            asks(2.5, 1),
            f"task.container.resources.cpus is 2.5, {ENGINE_HAS} 2",
        ),
        (
            asks(1, 5),
            f"task.container.resources.memory is {5 * GIB} bytes, {ENGINE_HAS} {4 * GIB}",
        ),
    ],
)
def test_a_task_that_never_fits_is_refused_by_field_and_figures(
    wish: Resources | None, reason: str | None
) -> None:
    assert Admission(Capacity(2, 4 * GIB)).refusal(wish) == reason


async def test_a_refusal_looks_at_what_there_is_not_at_what_is_free() -> None:
    async with office(2, 4) as (admission, tasks):
        await enter(admission, tasks, asks(2, 4))
        assert admission.refusal(asks(2, 4)) is None


def test_this_host_has_cpus_and_memory() -> None:
    host = Capacity.of_this_host()
    assert host.cpus == os.cpu_count()
    assert host.memory_bytes > 100 << 20
