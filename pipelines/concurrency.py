"""Several things at once, with errors as if there had been one."""

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
from anyio.abc import TaskGroup

T = TypeVar("T")


@asynccontextmanager
async def task_group() -> AsyncIterator[TaskGroup]:
    """Open a task group whose first failure is raised itself, not in a group.

    What is caught further up is one kind of error; the others ended because of it.
    """
    try:
        async with anyio.create_task_group() as tasks:
            yield tasks
    except ExceptionGroup as failures:
        first: Exception = failures
        while isinstance(first, ExceptionGroup):
            first = first.exceptions[0]
        raise first from first.__cause__


async def together(*awaitables: Awaitable[Any]) -> tuple[Any, ...]:
    """Wait for all of them at once; the first failure ends the others.

    Returns
    -------
    tuple
        The results, in the order of the arguments.
    """
    results: list[Any] = [None] * len(awaitables)

    async def keep(index: int, awaitable: Awaitable[Any]) -> None:
        results[index] = await awaitable

    async with task_group() as tasks:
        for index, awaitable in enumerate(awaitables):
            tasks.start_soon(keep, index, awaitable)
    return tuple(results)


async def unless(stop: anyio.Event, awaitable: Awaitable[T]) -> T | None:
    """Wait for something; None when `stop` is set first, and then it is cancelled."""
    result = None

    async def cancel() -> None:
        await stop.wait()
        tasks.cancel_scope.cancel()

    async with task_group() as tasks:
        tasks.start_soon(cancel)
        result = await awaitable
        tasks.cancel_scope.cancel()
    return result
