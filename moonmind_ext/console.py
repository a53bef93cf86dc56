"""What a person, or a program, sees of a run."""

import json
import os
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.text import Text

from moonmind_ext.run.events import LOG, Event, Phase
from pipelines.report import Outcome, RunReport

_DOING = {
    Phase.WORKSPACE: "sending the workspace",
    Phase.IMAGE: "getting the image",
    Phase.EXECUTE: "running the command",
    Phase.EXPORT: "bringing the results back",
}


_SHOWN_REFUSED = 10


class ConsoleObserver:
    """Shows the command's output on stdout and the run's progress on stderr.

    Parameters
    ----------
    console
        On stderr. On a terminal it shows a spinner while there is nothing to read.
    as_json
        Stdout gets every event as a line of JSON, instead of the output.
    """

    def __init__(self, console: Console, *, as_json: bool) -> None:
        self._console = console
        self._as_json = as_json
        self._stdout: TextIO | None = sys.stdout
        if isinstance(sys.stdout, TextIOWrapper):
            # What a command prints need not be what this terminal can show.
            sys.stdout.reconfigure(errors="backslashreplace")
        self._running: list[Phase] = []
        self._status: Status | None = None
        # Whether the command's last line has no end yet.
        self._line_open = False

    def event(self, event: Event) -> None:
        """Take an event."""
        if self._as_json:
            self._print(json.dumps(event.to_dict(), ensure_ascii=False) + "\n")
        elif event.message == LOG:
            self._print(event.payload["text"])

    def report(self, report: RunReport) -> None:
        """End a stream of JSON with the content of `run.json`."""
        if self._as_json:
            self._print(report.model_dump_json(by_alias=True) + "\n")

    def phase_started(self, phase: Phase) -> None:
        """Note that a phase begins."""
        self._running.append(phase)
        if not self._console.is_terminal:
            self._console.print(f"{_DOING[phase]} ...")
        self._spin()

    def phase_finished(self, phase: Phase, seconds: float) -> None:
        """Note that a phase came to its end."""
        self._running.remove(phase)
        self._spin()
        if self._line_open:
            self._console.print()
            self._line_open = False
        style = "" if self._console.no_color else "dim"
        self._console.print(f"{_DOING[phase]}: {seconds:.2f} s", style=style, highlight=False)

    def _spin(self) -> None:
        """Show what is going on, except where the command's own output would be torn."""
        if self._status is not None:
            self._status.stop()
            self._status = None
        if self._running and Phase.EXECUTE not in self._running and self._console.is_terminal:
            text = " and ".join(_DOING[phase] for phase in self._running)
            self._status = self._console.status(text)
            self._status.start()

    def _print(self, text: str) -> None:
        if self._stdout is None:
            return
        self._line_open = not text.endswith("\n")
        try:
            self._stdout.write(text)
            self._stdout.flush()
        except OSError:
            # `… | head` has seen enough, or a disk is full; the run goes on. Nothing must
            # be left for the interpreter to write when it ends.
            self._stdout = None
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def closing_table(report: RunReport, output: Path, artifacts_subdir: str) -> Iterator[str]:
    """Say in a few lines how a run ended and where its files are.

    Yields
    ------
    str
        A line of rich's markup. Not a table of rich's: that would fold paths, which
        people copy and programs read.
    """
    style = "green" if report.outcome is Outcome.SUCCEEDED else "bold red"
    folder = output / artifacts_subdir
    log = folder / "logs" / "runner.log"
    size = sum(file.bytes for file in report.artifacts.files)
    rows = [("outcome", f"[{style}]{report.outcome}[/]")]
    if report.exit_code is not None:
        rows.append(("exit code", str(report.exit_code)))
    if report.error:
        rows.append(("error", escape(report.error)))
    cached = " (from the cache)" if report.cached else ""
    rows += [
        ("ran for", f"{report.duration_seconds:.2f} s{cached}"),
        ("engine", f"{report.engine.kind} {report.engine.version}"),
        ("artifacts", escape(f"{len(report.artifacts.files)} ({size:,} bytes) in {folder}")),
        *([("log", escape(str(log)))] if log.exists() else []),
        ("report", escape(str(folder / "metadata" / "run.json"))),
    ]
    refused = dict(report.artifacts.refused)
    back = report.workspace.written_back if report.workspace else None
    if back is not None:
        counts = (len(back.added), len(back.modified), len(back.removed))
        rows.append(("workspace", "{} added, {} changed, {} removed".format(*counts)))
        refused |= back.refused
    shown = list(refused.items())[:_SHOWN_REFUSED]
    rows += [("refused", escape(f"{path}: {reason}")) for path, reason in shown]
    if len(refused) > _SHOWN_REFUSED:
        rows.append(("refused", f"and {len(refused) - _SHOWN_REFUSED} more: see the report"))
    rows += [("[yellow]warning[/]", escape(warning)) for warning in report.warnings]
    for title, value in rows:
        # Markup takes no room on the screen.
        width = 11 + len(title) - len(Text.from_markup(title))
        yield f"{title:<{width}}{value}"
