"""What this host has, and what to do about what it has not."""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from time import monotonic

import anyio
import anyio.to_thread

from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.session import (
    CHECK_SECONDS,
    NoEngineError,
    docker_problem,
    open_session,
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's table.

    Attributes
    ----------
    what
        What was looked at.
    good
        None for what is only told.
    found
        What is there, or what is wrong.
    advice
        What to do; empty where nothing needs to be done.
    """

    what: str
    good: bool | None
    found: str
    advice: str = ""


async def examine(environment: Mapping[str, str], open_seconds: float) -> list[Finding]:
    """Look at everything that a run may need.

    Parameters
    ----------
    environment
        The variables that name an engine.
    open_seconds
        For a session to open.
    """
    findings = [_python(), _sdk(), await _cli(environment), await _docker(environment)]
    findings += await _engine(environment, open_seconds)
    findings.append(await anyio.to_thread.run_sync(_sandbox))
    return findings


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", True, f"{version} on {os.uname().sysname} {os.uname().machine}")


def _sdk() -> Finding:
    return Finding("Dagger SDK", True, metadata.version("dagger-io"))


async def _cli(environment: Mapping[str, str]) -> Finding:
    cli = environment.get("_EXPERIMENTAL_DAGGER_CLI_BIN") or shutil.which(
        "dagger", path=environment.get("PATH")
    )
    if cli is None:
        return Finding(
            "Dagger CLI",
            None,
            "there is no dagger on PATH; the SDK downloads one of its own version",
            "to save the download, or without a network: install dagger, "
            "https://docs.dagger.io/install",
        )
    try:
        with anyio.fail_after(CHECK_SECONDS):
            result = await anyio.run_process([cli, "version"], check=False, env=environment)
    except (OSError, TimeoutError) as error:
        return Finding("Dagger CLI", False, f"{cli}: {error or 'no answer'}", "reinstall dagger")
    if result.returncode:
        said = result.stderr.decode(errors="replace").strip()
        return Finding("Dagger CLI", False, f"{cli}: {said}", "reinstall dagger")
    return Finding("Dagger CLI", True, f"{cli}: {result.stdout.decode(errors='replace').strip()}")


async def _docker(environment: Mapping[str, str]) -> Finding:
    problem = await docker_problem(environment)
    if problem is None:
        return Finding("Docker", True, "answers")
    if environment.get("_EXPERIMENTAL_DAGGER_RUNNER_HOST"):
        return Finding("Docker", None, f"{problem}; not needed with a runner host")
    return Finding(
        "Docker",
        False,
        problem,
        "start Docker and let this user use it, or name an engine in "
        "_EXPERIMENTAL_DAGGER_RUNNER_HOST",
    )


async def _engine(environment: Mapping[str, str], open_seconds: float) -> list[Finding]:
    began = monotonic()
    try:
        async with open_session(
            EngineChoice.DAGGER, environment=environment, open_seconds=open_seconds
        ) as session:
            opened = monotonic()
            await session.check()
            answered = monotonic()
            return [
                Finding("Dagger engine", True, f"{session.version}, by {session.how}"),
                Finding(
                    "session",
                    True,
                    f"open in {opened - began:.1f} s, "
                    f"a query in {1000 * (answered - opened):.0f} ms",
                ),
            ]
    except NoEngineError as error:
        found = str(error).partition("Tried:")[2].strip().splitlines()
        tried = "\n".join(line.strip(" -") for line in found if line.startswith("  -")) or str(
            error
        )
        return [
            Finding("Dagger engine", False, tried, "start one, or name one; see docs/engines.md")
        ]


def _sandbox() -> Finding:
    from moonmind_ext.embedded import sandbox_problem

    problem = sandbox_problem()
    if problem is None:
        return Finding("embedded engine", True, "its sandbox works here")
    return Finding("embedded engine", False, problem)
