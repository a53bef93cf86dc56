"""The command: measures the groups that are asked for, and writes the figures as JSON."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import anyio

from benchmarks.bench import QUICK_ROUNDS, ROUNDS, Bench, find_docker, find_engine
from benchmarks.figures import Figure
from benchmarks.machine import describe

GROUPS = ("startup", "session", "task", "many", "output", "artifacts", "workspace", "again")
"""Modules of this package with a `measure`."""

WITHOUT_ENGINE = ("startup",)
"""Those that need neither an engine nor Docker, so neither is looked for."""


def main() -> int:
    """Measure, and say what came of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=GROUPS, help="a group; repeatable")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing large")
    parser.add_argument("--rounds", type=int, help=f"how often each side is measured, {ROUNDS}")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results.json"))
    arguments = parser.parse_args()
    groups = arguments.only or GROUPS
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    if len(groups) == 1:
        results = anyio.run(_measure, groups[0], arguments.quick, rounds)
    else:
        results = _separately(groups, ["--rounds", str(rounds), *["--quick"] * arguments.quick])
    arguments.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return int(any(figure.get("failed") for figure in results["figures"]))


def _separately(groups: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
    """Measure each group in a process of its own, whose memory no other has used."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="moonmind-bench-") as folder:
        for group in groups:
            output = Path(folder, f"{group}.json")
            command = [sys.executable, "-m", "benchmarks", "--only", group, "--output", str(output)]
            subprocess.run([*command, *options], check=False)
            if not output.exists():
                what = f"all of {group}"
                failed = _failed(Figure(name=group, what=what, missing="its process ended"))
                results.setdefault("figures", []).append(failed)
                continue
            found = json.loads(output.read_text("utf-8"))
            figures = [*results.get("figures", []), *found["figures"]]
            seconds = {**results.get("seconds", {}), **found["seconds"]}
            # The machine as it was at first; engine and Docker by those that needed them.
            first: dict[str, Any] = {
                name: results[name] for name in ("began", "machine") if name in results
            }
            results = {**results, **found, **first, "figures": figures, "seconds": seconds}
    return results


async def _measure(group: str, quick: bool, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="moonmind-bench-") as folder:
        bench = Bench(Path(folder), quick, rounds)
        results: dict[str, Any] = {
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "quick": quick,
            "machine": describe(),
            "engine": "not needed",
            "docker": "not needed",
        }
        if group not in WITHOUT_ENGINE:
            results["engine"] = (await find_engine())[1]
            results["docker"] = (await find_docker(bench.image))[1]
        began = time.monotonic()
        figures: list[dict[str, Any]] = []
        try:
            async for figure in import_module(f"benchmarks.{group}").measure(bench):
                figures.append(figure.to_dict())
                _say(figures[-1])
        except Exception as error:  # noqa: BLE001
            # The rest is worth having all the same.
            missing = f"it failed: {type(error).__name__}: {error}"
            figures.append(
                _failed(Figure(name=group, what=f"the rest of {group}", missing=missing))
            )
            _say(figures[-1])
        seconds = {group: round(time.monotonic() - began, 1)}
        return {**results, "seconds": seconds, "figures": figures}


def _failed(figure: Figure) -> dict[str, Any]:
    return {**figure.to_dict(), "failed": True}


def _say(figure: dict[str, Any]) -> None:
    a, b, ratio = figure["a"], figure["b"], figure["ratio"]
    line = figure["missing"] or " against ".join(
        f"{side['median']:.4g} {figure['unit']}" for side in (a, b) if side
    )
    if ratio is not None:
        line += f": {ratio:.2f}"
    for bound in figure["bounds"]:
        if bound["met"] is not None:
            line += f", {'met' if bound['met'] else 'MISSED'}"
    sys.stderr.write(f"{figure['name']}: {line}\n")


if __name__ == "__main__":
    sys.exit(main())
