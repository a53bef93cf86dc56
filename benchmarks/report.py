"""Puts the figures into docs/performance.md, so that none is there that was not measured."""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.plot import plot

BEGIN = "<!-- written by python -m benchmarks.report -->"
END = "<!-- until here -->"

_OF = {"a": "", "difference": " more", "ratio": " times"}


def main() -> None:
    """Write the part between the marks, and the plot beside the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--input", type=Path, default=Path("benchmarks/results.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    arguments = parser.parse_args()
    results = json.loads(arguments.input.read_text("utf-8"))
    page: Path = arguments.page
    head, _, rest = page.read_text("utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    picture = page.with_suffix(".svg")
    picture.write_text(plot(results["figures"]), "utf-8")
    text = render(results, picture.name)
    page.write_text(f"{head}{BEGIN}\n\n{text}\n{END}{tail}", "utf-8")


def render(results: dict[str, Any], picture: str) -> str:
    """Write the results as Markdown."""
    machine = results["machine"]
    minutes = sum(results["seconds"].values()) / 60
    where = (
        f"Measured on {results['began'][:10]} in {minutes:.0f} minutes: {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory_gb']:g} GB of memory, Linux "
        f"{machine['kernel']}, Python {machine['python']}; load {machine['load']:g} before. "
        f"Engine: {results['engine']}. Docker: {results['docker']}."
    )
    lines = [
        where,
        "",
        f"![The ratios, on a logarithmic scale]({picture})",
        "",
    ]
    if bounds := _bounds(results["figures"]):
        lines += ["| bound | at most | measured | |", "|---|---|---|---|", *bounds, ""]
    lines += ["| figure | what | A | B | A / B | n |", "|---|---|---|---|---|---|"]
    lines += [_row(figure) for figure in results["figures"]]
    return "\n".join([*lines, ""])


def _bounds(figures: list[dict[str, Any]]) -> list[str]:
    rows = []
    for figure in figures:
        for bound in figure["bounds"]:
            unit = (
                _OF[bound["of"]]
                if bound["of"] == "ratio"
                else f" {figure['unit']}{_OF[bound['of']]}"
            )
            verdict = {True: "met", False: "**missed**", None: "not measured"}[bound["met"]]
            value = "" if bound["value"] is None else f"{_number(bound['value'])}{unit}"
            limit = f"{bound['at_most']:g}{unit}"
            rows.append(f"| {_cell(figure['what'])} | {limit} | {value} | {verdict} |")
    return rows


def _row(figure: dict[str, Any]) -> str:
    begin = f"| {figure['name']} | {_cell(figure['what'])} |"
    if figure["a"] is None:
        return f"{begin} {_cell(figure['missing'] or '')} | | | |"
    ratio = "" if figure["ratio"] is None else f"{figure['ratio']:.2f}"
    a, b = (_side(figure[side], figure["unit"]) for side in ("a", "b"))
    return f"{begin} {a} | {b} | {ratio} | {figure['n']} |"


def _side(side: dict[str, Any] | None, unit: str) -> str:
    if side is None:
        return ""
    low, middle, high = (_number(side[key]) for key in ("low", "median", "high"))
    return f"{_cell(side['what'])}: {middle} {unit} ({low} to {high})"


def _number(value: float) -> str:
    """Three digits, and no powers of ten."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: PLR2004


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


if __name__ == "__main__":
    main()
