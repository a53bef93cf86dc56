"""A bar chart of the ratios, as SVG."""

from collections.abc import Sequence
from html import escape
from math import log10
from typing import Any

LABELS = 300
BARS = 420
ROW = 18
TOP = 40
_MARGIN = 60

_STYLE = (
    "text{font:12px sans-serif;fill:#24292f}.bar{fill:#0969da}.missed{fill:#cf222e}"
    ".line{stroke:#57606a;stroke-dasharray:3}.bound{stroke:#24292f;stroke-width:2}"
    # On a page of either colour.
    ".page{fill:#fff}"
)


def plot(figures: Sequence[dict[str, Any]]) -> str:
    """Draw each figure's ratio from 1, on a logarithmic scale, with its bound."""
    shown = [figure for figure in figures if figure["ratio"]]
    ratios = [figure["ratio"] for figure in shown] + [0.1, 10]
    low, high = log10(min(ratios)), log10(max(ratios))

    def at(ratio: float) -> float:
        return LABELS + BARS * (log10(ratio) - low) / (high - low)

    width, height = LABELS + BARS + _MARGIN, TOP + ROW * len(shown) + 10
    size = f'width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {size}>',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" {size}/>',
    ]
    for mark in (0.01, 0.1, 1, 10, 100):
        if low <= log10(mark) <= high:
            x = at(mark)
            parts.append(
                f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{height}"/>'
            )
            parts.append(f'<text x="{x:.1f}" y="{TOP - 14}" text-anchor="middle">{mark:g}</text>')
    for row, figure in enumerate(shown):
        parts += _row(figure, TOP + ROW * row, at)
    return "\n".join([*parts, "</svg>", ""])


def _row(figure: dict[str, Any], top: float, at: Any) -> list[str]:
    one, end, middle = at(1), at(figure["ratio"]), top + ROW / 2 + 4
    bounds = [bound for bound in figure["bounds"] if bound["of"] == "ratio"]
    look = "bar missed" if any(bound["met"] is False for bound in bounds) else "bar"
    beside = max(one, end) + 6
    size = f'width="{max(abs(end - one), 1):.1f}" height="{ROW - 5}"'
    parts = [
        f'<text x="{LABELS - 12}" y="{middle}" text-anchor="end">{escape(figure["name"])}</text>',
        f'<rect class="{look}" x="{min(one, end):.1f}" y="{top + 2}" {size}/>',
    ]
    for bound in bounds:
        x = at(bound["at_most"])
        beside = max(beside, x + 6)
        parts.append(
            f'<line class="bound" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + ROW - 1}"/>'
        )
    parts.append(f'<text x="{beside:.1f}" y="{middle}">{figure["ratio"]:.2g}</text>')
    return parts
