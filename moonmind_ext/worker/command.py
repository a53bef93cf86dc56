"""`moonmind-ext worker`."""

import os
import re
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.exits import (
    EXIT_ENGINE,
    EXIT_FOREIGN_JOB,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    ExitError,
)
from moonmind_ext.worker.settings import (
    DEFAULT_CAPABILITIES,
    DEFAULT_DRAIN_SECONDS,
    SettingsError,
    WorkerSettings,
    check_number,
    check_token,
    check_types,
    check_url,
    check_workdir,
    check_worker_id,
    read_memory,
    read_patterns,
    read_vault,
    split_list,
)
from pipelines.payload import DEFAULT_TIMEOUT_SECONDS, MAX_SECONDS
from pipelines.plan import DEFAULT_HELPER_IMAGE, DEFAULT_WORKDIR

if TYPE_CHECKING:
    import anyio

    from moonmind_ext.worker.service import End, Limits
    from moonmind_ext.worker.telemetry import LogFormat

_MAX_PORT = 65535


def worker(
    *,
    url: Annotated[
        str, typer.Option(envvar="MOONMIND_URL", help="Address of MoonMind's API. Required.")
    ] = "",
    worker_id: Annotated[
        str,
        typer.Option(envvar="MOONMIND_WORKER_ID", help="Default: this host's name."),
    ] = "",
    engine: Annotated[
        EngineChoice,
        typer.Option(
            envvar="MOONMIND_WORKER_ENGINE",
            help="auto takes the first Dagger engine that answers; embedded needs no Docker "
            "and pulls no images.",
        ),
    ] = EngineChoice.AUTO,
    workdir: Annotated[
        str, typer.Option(envvar="MOONMIND_WORKDIR", help="Absolute; holds the jobs' directories.")
    ] = DEFAULT_WORKDIR,
    concurrency: Annotated[
        int,
        typer.Option(envvar="MOONMIND_WORKER_CONCURRENCY", min=1, help="Jobs at once, at most."),
    ] = 1,
    capabilities: Annotated[
        str,
        typer.Option(
            envvar="MOONMIND_WORKER_CAPABILITIES",
            metavar="LIST",
            help=f"With commas. Default: {','.join(DEFAULT_CAPABILITIES)}, gh where it is found.",
        ),
    ] = "",
    allowed_types: Annotated[
        str,
        typer.Option(envvar="MOONMIND_WORKER_ALLOWED_TYPES", help="Only task can be allowed."),
    ] = "task",
    allowed_images: Annotated[
        str,
        typer.Option(
            envvar="MOONMIND_WORKER_ALLOWED_IMAGES",
            metavar="PATTERNS",
            help="With commas, e.g. ghcr.io/acme/*,python:*. Other images are refused.",
        ),
    ] = "*",
    allowed_secrets: Annotated[
        str,
        typer.Option(
            envvar="MOONMIND_WORKER_ALLOWED_SECRETS",
            metavar="PATTERNS",
            help="With commas: references that a payload's secretEnv may name, e.g. "
            "env://NPM_TOKEN,file:///run/secrets/ci-*.",
        ),
    ] = "vault://*",
    poll_interval_ms: Annotated[
        int,
        typer.Option(envvar="MOONMIND_POLL_INTERVAL_MS", min=1, help="While the queue is empty."),
    ] = 1500,
    lease_seconds: Annotated[
        int,
        typer.Option(
            envvar="MOONMIND_LEASE_SECONDS",
            min=1,
            max=MAX_SECONDS,
            help="After so long without a heartbeat a job is somebody else's.",
        ),
    ] = 120,
    timeout_seconds: Annotated[
        int,
        typer.Option(
            envvar="MOONMIND_CONTAINER_TIMEOUT_SECONDS",
            min=1,
            max=MAX_SECONDS,
            help="Time limit of a command whose payload names none.",
        ),
    ] = DEFAULT_TIMEOUT_SECONDS,
    drain_seconds: Annotated[
        float,
        typer.Option(
            envvar="MOONMIND_WORKER_DRAIN_SECONDS",
            min=0,
            help="For running jobs after SIGTERM; then they go back to the queue.",
        ),
    ] = DEFAULT_DRAIN_SECONDS,
    cpus: Annotated[
        float,
        typer.Option(
            envvar="MOONMIND_ENGINE_CPUS", min=0, help="What the engine has. Default: this host's."
        ),
    ] = 0,
    memory: Annotated[
        str,
        typer.Option(
            envvar="MOONMIND_ENGINE_MEMORY",
            help="What the engine has, e.g. 16g. Default: this host's.",
        ),
    ] = "",
    engine_open_seconds: Annotated[
        float,
        typer.Option(
            envvar="MOONMIND_ENGINE_OPEN_SECONDS",
            min=1,
            help="How long an engine may take to open a session.",
        ),
    ] = 30,
    metrics_port: Annotated[
        int,
        typer.Option(
            envvar="MOONMIND_WORKER_METRICS_PORT",
            min=0,
            max=_MAX_PORT,
            help="Serves /metrics and /healthz. Default: nowhere.",
        ),
    ] = 0,
    log_format: Annotated[
        str, typer.Option(envvar="MOONMIND_LOG_FORMAT", help="text or json.")
    ] = "text",
    once: Annotated[bool, typer.Option("--once", help="Ask for one job, do it, and end.")] = False,
    max_jobs: Annotated[
        int, typer.Option(min=0, help="End after so many jobs. Default: never.")
    ] = 0,
) -> None:
    """Take container tasks from MoonMind's queue, and run them.

    Credentials are read from the environment alone: MOONMIND_WORKER_TOKEN,
    GITHUB_TOKEN, and MOONMIND_VAULT_ADDR with MOONMIND_VAULT_TOKEN or
    MOONMIND_VAULT_TOKEN_FILE.

    SIGTERM lets running jobs end, a second one stops at once.

    Exit codes: 0 after a drain, --once and --max-jobs; 65 the queue has jobs of another
    kind, 2 a wrong setting, 75 no engine or (with --once) no queue, 130 stopped at once.
    """
    environment = os.environ
    try:
        check_types(split_list(allowed_types))
        settings = WorkerSettings(
            url=check_url(url.strip()),
            worker_id=check_worker_id(worker_id.strip() or socket.gethostname()),
            token=check_token(
                "MOONMIND_WORKER_TOKEN", environment.get("MOONMIND_WORKER_TOKEN", "")
            ),
            poll_seconds=poll_interval_ms / 1000,
            lease_seconds=lease_seconds,
            workdir=check_workdir(workdir),
            capabilities=split_list(capabilities) or _default_capabilities(environment),
            allowed_images=read_patterns(
                "MOONMIND_WORKER_ALLOWED_IMAGES", environment, allowed_images
            ),
            allowed_secrets=read_patterns(
                "MOONMIND_WORKER_ALLOWED_SECRETS", environment, allowed_secrets, may_be_none=True
            ),
            timeout_seconds=timeout_seconds,
            concurrency=concurrency,
            drain_seconds=check_number("MOONMIND_WORKER_DRAIN_SECONDS", drain_seconds),
            cpus=check_number("MOONMIND_ENGINE_CPUS", cpus) or None,
            memory_bytes=read_memory(memory),
            engine=engine,
            engine_open_seconds=check_number("MOONMIND_ENGINE_OPEN_SECONDS", engine_open_seconds),
            github_token=check_token("GITHUB_TOKEN", environment.get("GITHUB_TOKEN", "")),
            github_host=environment.get("GH_HOST", "").strip() or "github.com",
            vault=read_vault(environment),
            helper_image=environment.get("MOONMIND_HELPER_IMAGE") or DEFAULT_HELPER_IMAGE,
            module=environment.get("MOONMIND_MODULE") or ".",
        )
        form = _log_format(log_format)
    except SettingsError as error:
        raise ExitError(EXIT_USAGE, str(error)) from None
    _work(settings, form, once=once, max_jobs=max_jobs or None, metrics_port=metrics_port or None)


def _work(
    settings: WorkerSettings,
    form: "LogFormat",
    *,
    once: bool,
    max_jobs: int | None,
    metrics_port: int | None,
) -> None:
    import anyio

    from moonmind_ext.engine.session import NoEngineError
    from moonmind_ext.worker.queue import QueueError
    from moonmind_ext.worker.service import End, Limits
    from moonmind_ext.worker.telemetry import configure_logging, tracing
    from pipelines.masking import Masker

    configure_logging(form, Masker(settings.credentials))
    limits = Limits(claims=1 if once else None, jobs=max_jobs)
    try:
        with tracing(os.environ):
            end = anyio.run(_until_told, settings, limits, metrics_port)
    except (NoEngineError, QueueError) as error:
        raise ExitError(EXIT_ENGINE, str(error)) from None
    except OSError as error:
        raise ExitError(EXIT_ENGINE, f"{error.filename or 'worker'}: {error.strerror}") from None
    match end:
        case None:
            raise ExitError(EXIT_INTERRUPTED, "stopped at once; its jobs wait for their leases")
        case End.FOREIGN_JOB:
            raise ExitError(
                EXIT_FOREIGN_JOB,
                "this queue has jobs that are no container tasks. A mixed queue needs MoonMind's "
                "own worker with the drop-in: see docs/moonmind.md",
            )
        case End.EMPTY_QUEUE:
            typer.echo("moonmind-ext: the queue has no job for this worker", err=True)


async def _until_told(
    settings: WorkerSettings, limits: "Limits", metrics_port: int | None
) -> "End | None":
    """Work until the end, or a signal's; None when it was to stop at once."""
    import anyio

    from moonmind_ext.worker.service import run_worker

    draining = anyio.Event()
    async with _drain_on_signals(draining):
        return await run_worker(settings, draining, limits=limits, metrics_port=metrics_port)
    return None


@asynccontextmanager
async def _drain_on_signals(draining: "anyio.Event") -> AsyncIterator[None]:
    """Turn the first SIGTERM or Ctrl-C into a drain, and the second into an end at once."""
    import anyio
    import structlog

    from pipelines.concurrency import task_group

    log = structlog.get_logger()

    async def watch(scope: anyio.CancelScope) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                if draining.is_set():
                    log.warning("stopping at once")
                    scope.cancel()
                else:
                    log.info("draining; once more to stop at once")
                    draining.set()

    async with task_group() as tasks:
        tasks.start_soon(watch, tasks.cancel_scope)
        yield
        tasks.cancel_scope.cancel()


def _default_capabilities(environment: Mapping[str, str]) -> tuple[str, ...]:
    gh = shutil.which("gh", path=environment.get("PATH", ""))
    return (*DEFAULT_CAPABILITIES, *(["gh"] if gh else []))


def _log_format(text: str) -> "LogFormat":
    if not re.fullmatch("text|json", text.strip().lower()):
        raise SettingsError("MOONMIND_LOG_FORMAT: must be text or json")
    from moonmind_ext.worker.telemetry import LogFormat

    return LogFormat(text.strip().lower())
