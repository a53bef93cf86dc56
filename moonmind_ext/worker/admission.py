"""Tasks run together only while what they ask for fits in what the engine has."""

import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio

from pipelines.payload import Resources


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine has.

    Attributes
    ----------
    memory_bytes
        Of main memory.
    """

    cpus: float
    memory_bytes: int

    @classmethod
    def of_this_host(cls) -> "Capacity":
        """Give what this host has, on which the engine commonly is."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return cls(os.cpu_count() or 1, memory)


class Admission:
    """Lets tasks in, first come first served: a big one is not overtaken for ever.

    A task that asks for nothing takes nothing; `concurrency` is what limits those.
    """

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._free_cpus = _thousandths(capacity.cpus)
        self._free_memory = capacity.memory_bytes
        self._queue: deque[anyio.Event] = deque()
        self._calm = anyio.Event()

    def refusal(self, resources: Resources | None) -> str | None:
        """Say why a task can never run here; None where it can."""
        cpus, memory = _requests(resources)
        if cpus > _thousandths(self._capacity.cpus):
            return (
                f"task.container.resources.cpus is {cpus / 1000:g}, and the engine of this worker "
                f"has {self._capacity.cpus:g}"
            )
        if memory > self._capacity.memory_bytes:
            return (
                f"task.container.resources.memory is {memory} bytes, and the engine of this "
                f"worker has {self._capacity.memory_bytes}"
            )
        return None

    async def calm(self) -> None:
        """Wait until no task waits to be let in."""
        while self._queue:
            await self._calm.wait()

    @asynccontextmanager
    async def admitted(self, resources: Resources | None) -> AsyncIterator[None]:
        """Wait for room, and take it for as long as the context lasts."""
        cpus, memory = _requests(resources)
        if self._queue or not self._fits(cpus, memory):
            await self._wait(cpus, memory)
        self._free_cpus -= cpus
        self._free_memory -= memory
        try:
            yield
        finally:
            self._free_cpus += cpus
            self._free_memory += memory
            self._wake()

    async def _wait(self, cpus: int, memory: int) -> None:
        turn = anyio.Event()
        self._queue.append(turn)
        try:
            while self._queue[0] is not turn or not self._fits(cpus, memory):
                await turn.wait()
                # Woken, but it may not fit yet: the next time needs an event of its own.
                place, turn = self._queue.index(turn), anyio.Event()
                self._queue[place] = turn
        finally:
            self._queue.remove(turn)
            self._wake()

    def _fits(self, cpus: int, memory: int) -> bool:
        return cpus <= self._free_cpus and memory <= self._free_memory

    def _wake(self) -> None:
        if self._queue:
            self._queue[0].set()
        else:
            self._calm.set()
            self._calm = anyio.Event()


def _requests(resources: Resources | None) -> tuple[int, int]:
    """Give what a task asks for: thousandths of CPUs, and bytes."""
    if resources is None:
        return 0, 0
    return _thousandths(resources.cpus or 0), resources.memory_bytes or 0


def _thousandths(cpus: float) -> int:
    # Whole numbers: taking and giving back floats would leave a rest.
    return round(cpus * 1000)
