"""Things that are computed once, however many ask for them."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
from anyio.abc import TaskGroup

T = TypeVar("T")


class ClosedError(Exception):
    """The session ended before the answer was there."""


@dataclass(slots=True, eq=False)
class _Flight:
    """A computation under way, and how many wait for it."""

    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    landed: anyio.Event = field(default_factory=anyio.Event)
    waiting: int = 0
    result: Any = None
    error: Exception | None = None


class Once:
    """Answers by key; a key that is being computed is waited for.

    A computation lives while somebody waits for it: when the last one goes, it is
    cancelled. Only successes are kept.

    Parameters
    ----------
    tasks
        Owns the computations.
    """

    def __init__(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        self._answers: dict[str, Any] = {}
        self._flights: dict[str, _Flight] = {}

    async def get(self, key: str, compute: Callable[[], Awaitable[T]]) -> T:
        """Give the answer for a key.

        Raises
        ------
        Exception
            Whatever `compute` raises, to everybody who waits.
        ClosedError
            When the owner of the computations ends first.
        """
        if key in self._answers:
            answer: T = self._answers[key]
            return answer
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight()
            self._tasks.start_soon(self._fly, key, compute, flight)
        flight.waiting += 1
        try:
            await flight.landed.wait()
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.landed.is_set():
                # Who comes now must not join a flight that is going down.
                self._forget(key, flight)
                flight.scope.cancel()
        if flight.error is not None:
            raise flight.error
        result: T = flight.result
        return result

    async def _fly(self, key: str, compute: Callable[[], Awaitable[Any]], flight: _Flight) -> None:
        flight.error = ClosedError("the session is closed")
        try:
            with flight.scope:
                try:
                    flight.result = self._answers[key] = await compute()
                    flight.error = None
                except Exception as error:  # noqa: BLE001
                    flight.error = error  # It is raised where it is waited for.
        finally:
            self._forget(key, flight)
            flight.landed.set()

    def _forget(self, key: str, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
