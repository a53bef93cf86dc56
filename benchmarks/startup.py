"""How long a command takes to begin: against the interpreter alone."""

import subprocess
import sys
from collections.abc import AsyncIterator

import anyio

from benchmarks.bench import Bench
from benchmarks.figures import Figure
from benchmarks.measure import Act, Watch, side_by_side
from benchmarks.workload import write_payload

# What the console script does, with the code that is measured.
CLI = (sys.executable, "-c", "import sys; from moonmind_ext.cli import main; sys.exit(main())")

PYTHON = "python -c pass"


async def measure(bench: Bench) -> AsyncIterator[Figure]:
    """Measure the commands that need no engine."""
    payload = str(write_payload(bench.new_path("payload"), bench.image, ["true"]))
    for name, arguments in (
        ("help", ["--help"]),
        ("validate", ["validate", payload]),
        ("plan", ["plan", payload]),
    ):
        ours = f"moonmind-ext {arguments[0]}"
        measured = await side_by_side(
            {ours: command(*CLI, *arguments), PYTHON: command(sys.executable, "-c", "pass")},
            rounds=bench.rounds,
            warm_ups=1,
        )
        yield measured.figure(f"startup/{name}", f"`{ours}`", ours, PYTHON)


class CommandError(Exception):
    """A command that is to be timed failed; the message has the end of what it said."""


def command(*arguments: str) -> Act:
    """Time a command; one that fails is an error."""

    async def act(watch: Watch) -> None:
        with watch:
            ended = await anyio.run_process(arguments, check=False, stdin=subprocess.DEVNULL)
        if ended.returncode:
            said = (ended.stderr or ended.stdout).decode(errors="replace").strip()[-500:]
            raise CommandError(f"{' '.join(arguments[:4])}: {said}")

    return act
