"""Stopwatches, and the order in which sides take their turns."""

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.figures import Bound, Figure, Side

WARM_UPS = 2
"""Rounds that do not count."""

_MB = 1e6
_RESET_PEAK = "5"


class Watch:
    """Measures what happens in its context, and nothing around it.

    Attributes
    ----------
    seconds
        On the wall.
    cpu
        Of this process alone, in all its threads, user and system; in seconds.
    peak
        The most memory that was resident, in MB.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu = self.peak = 0.0

    def __enter__(self) -> Self:
        # Where this is forbidden, a peak is that since the process began.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        self._cpu = time.process_time()
        self._began = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._began
        self.cpu = time.process_time() - self._cpu
        self.peak = _memory("VmHWM")


def memory_now() -> float:
    """Say how much memory of this process is resident, in MB."""
    return _memory("VmRSS")


def _memory(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / _MB
    raise OSError("this kernel does not say how much memory a process had")


@dataclass(frozen=True, slots=True)
class Quantity:
    """What of a measurement counts."""

    unit: str
    of: Callable[[Watch], float]


SECONDS = Quantity("s", lambda watch: watch.seconds)
MILLISECONDS = Quantity("ms", lambda watch: watch.seconds * 1000)
CPU = Quantity("ms", lambda watch: watch.cpu * 1000)

Act = Callable[[Watch], Awaitable[None]]
"""Does its work within the watch, and puts up and clears away outside of it."""


@dataclass
class Measured:
    """What was measured of several sides, by their names."""

    watches: dict[str, list[Watch]] = field(default_factory=dict)

    def add(self, name: str, watch: Watch) -> None:
        """Keep a measurement."""
        self.watches.setdefault(name, []).append(watch)

    def figure(
        self,
        name: str,
        what: str,
        a: str,
        b: str,
        quantity: Quantity = SECONDS,
        bounds: tuple[Bound, ...] = (),
    ) -> Figure:
        """Make a figure of two sides.

        Parameters
        ----------
        quantity
            What of a measurement counts.
        """
        return Figure(
            name=name,
            what=what,
            unit=quantity.unit,
            a=Side.of(a, [quantity.of(watch) for watch in self.watches[a]]),
            b=Side.of(b, [quantity.of(watch) for watch in self.watches[b]]),
            n=len(self.watches[a]),
            bounds=bounds,
        )

    def memory(
        self, name: str, what: str, side: str, before: float, bounds: tuple[Bound, ...] = ()
    ) -> Figure:
        """Make a figure of one side's peaks, and of what the process had before.

        Two sides of one process cannot be told apart: what one has taken is not given back.
        """
        peaks = [watch.peak for watch in self.watches[side]]
        return Figure(
            name=name,
            what=f"{what}: our process's memory",
            unit="MB",
            a=Side.of(side, peaks),
            b=Side.of("before the first", [before]),
            n=len(peaks),
            bounds=bounds,
        )


async def side_by_side(
    sides: Mapping[str, Act], *, rounds: int, warm_ups: int = WARM_UPS
) -> Measured:
    """Let all sides take their turn in each round, each time another one first.

    What else the machine does, and what one leaves for the next, hits all alike.
    """
    measured = Measured()
    names = list(sides)
    for number in range(-warm_ups, rounds):
        at = number % len(names)
        for name in (*names[at:], *names[:at]):
            watch = Watch()
            await sides[name](watch)
            if number >= 0:
                measured.add(name, watch)
    return measured
