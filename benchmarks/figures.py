"""A figure: two sides that were measured in turn, their ratio, and its bounds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Bound:
    """What a figure may be at most.

    Attributes
    ----------
    of
        Side A itself, what it has more than side B, or how many times B it is.
    """

    of: Literal["a", "difference", "ratio"]
    at_most: float


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a figure.

    Attributes
    ----------
    what
        Whose it is.
    low, high
        The quartiles.
    """

    what: str
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, what: str, values: Sequence[float]) -> "Side":
        """Take median and quartiles."""
        low, middle, high = (
            quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
        )
        assert middle == median(values)
        return cls(what, middle, low, high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the results.

    Attributes
    ----------
    name
        Unique; its first part is that of its group.
    what
        In words.
    unit
        Of both sides: `s`, `ms`, `MB`, `tasks/s`, or nothing for a number.
    a, b
        Ours, and what it is compared with; none where there is no such thing, or not
        here.
    n
        How often each side was measured.
    missing
        Why there are no numbers, or not all.
    """

    name: str
    what: str
    unit: str = "s"
    a: Side | None = None
    b: Side | None = None
    n: int = 0
    bounds: tuple[Bound, ...] = ()
    missing: str | None = None

    @property
    def ratio(self) -> float | None:
        """How many times B is A."""
        return self.a.median / self.b.median if self.a and self.b and self.b.median else None

    def to_dict(self) -> dict[str, Any]:
        """Give it with its ratio, and with each bound's number and whether it is met."""
        return {
            **asdict(self),
            "ratio": self.ratio,
            "bounds": [
                {
                    **asdict(bound),
                    "value": value,
                    "met": None if value is None else value <= bound.at_most,
                }
                for bound in self.bounds
                for value in [self._value(bound)]
            ],
        }

    def _value(self, bound: Bound) -> float | None:
        if bound.of == "ratio":
            return self.ratio
        if self.a is None or (bound.of == "difference" and self.b is None):
            return None
        return self.a.median - (self.b.median if self.b and bound.of == "difference" else 0)
