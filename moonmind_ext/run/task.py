"""One run: what the pipeline decided becomes events and files on disk."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import dagger

from moonmind_ext.engine.live import joined, traced
from moonmind_ext.engine.session import EngineSession
from moonmind_ext.run.events import FINISHED, STARTED, Event, Level, Observer, Phase, Stopwatch
from moonmind_ext.run.export import Exporter, Results
from moonmind_ext.run.log import LiveOutput, end_of
from moonmind_ext.run.output import OutputError, clear_output
from moonmind_ext.run.stage_log import StageLog
from moonmind_ext.workspace.errors import WorkspaceError
from moonmind_ext.workspace.journal import OURS, recover
from moonmind_ext.workspace.send import Size, send_workspace
from moonmind_ext.workspace.source import Standing, read_standing
from pipelines.artifacts import RESERVED_DIRECTORIES
from pipelines.concurrency import task_group, together, unless
from pipelines.container_task import (
    Execution,
    Image,
    engine_failures,
    request_stop,
    resolve_image,
    run_command,
    secret_of,
)
from pipelines.masking import Masker
from pipelines.payload import CacheMode, PullMode, TaskPayload, publishable, warnings_of
from pipelines.plan import DEFAULT_HELPER_IMAGE, Plan
from pipelines.report import (
    LOG_LIMIT_BYTES,
    EngineFailedError,
    EngineInfo,
    Findings,
    Outcome,
    RunFailedError,
    RunReport,
    Source,
    Timings,
    WorkspaceInfo,
    last_line,
    make_report,
    run_warnings,
)

STOP_MARGIN_SECONDS = 15
"""Above the grace period, for a stopped command's container to answer: the stop
itself is a query, and the supervisor looks for it ten times a second."""

PHASE_SECONDS = 1800
"""For every phase but the command's own: tens of GB on a local disk take minutes, and an
engine that hangs would be waited for without end."""

STOP_AGAIN_SECONDS = 1.0
"""A command whose container is just being made misses the first stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What to run, on what, and where its result goes.

    Attributes
    ----------
    payload, plan
        The payload, and the plan that was made of it.
    workspace
        Absolute; becomes the repository directory in the container.
    output
        Absolute; gets `logs/` and `<artifactsSubdir>/`.
    secrets
        The values of the payload's `secretEnv`, by name.
    log_limit_bytes
        Of `runner.log`; above it, head and tail are kept.
    helper_image
        Lends its busybox to images without a shell.
    is_clone
        Whether nobody but git has written to the workspace: then its index is believed,
        and jobs of one repository share what was sent by what it says.
    """

    payload: TaskPayload
    plan: Plan
    workspace: Path
    output: Path
    secrets: Mapping[str, str] = field(default_factory=dict)
    log_limit_bytes: int = LOG_LIMIT_BYTES
    helper_image: str = DEFAULT_HELPER_IMAGE
    is_clone: bool = False


async def run_task(
    session: EngineSession,
    request: RunRequest,
    observer: Observer,
    *,
    stop: anyio.Event | None = None,
) -> RunReport:
    """Run a container task.

    When this returns the result is complete on disk, also after a failure of the
    engine.

    Parameters
    ----------
    observer
        Told of every event and phase.
    stop
        When set, the command is stopped (SIGTERM, its grace period, SIGKILL), and
        what it left comes back.

    Returns
    -------
    RunReport
        The content of `run.json`.

    Raises
    ------
    OutputError
        When the output directory holds something that no run has left.
    WorkspaceError
        When the workspace cannot be read.
    """
    with joined() as trace_id:
        run = _Run(session, request, observer, stop or anyio.Event(), trace_id)
        return await run.run()


@dataclass(slots=True)
class _Progress:
    """How far a run has come."""

    standing: Standing
    size: Size | None = None
    image: Image | None = None
    execution: Execution | None = None
    results: Results = field(default_factory=Results)
    failure: RunFailedError | None = None


class _Run:
    """One run while it happens."""

    def __init__(
        self,
        session: EngineSession,
        request: RunRequest,
        observer: Observer,
        stop: anyio.Event,
        trace_id: str,
    ) -> None:
        self.session = session
        self.request = request
        self.observer = observer
        self.stop = stop
        self.trace_id = trace_id
        self.plan = request.plan
        self.hidden = {**self.plan.secret_values, **request.secrets}
        self.masker = Masker(self.hidden.values())
        self.watch = Stopwatch(observer)
        self.progress = _Progress(Standing(Source(repository=self.plan.repository)))
        self.began = datetime.now(UTC)
        self.unreadable: WorkspaceError | None = None
        self.standing_read = anyio.Event()
        # Whether the output was seen live; what was not is shown at the end.
        self.shown = False

    async def run(self) -> RunReport:
        """Go through the run from its first event to its last file."""
        output, subdir = self.request.output, self.plan.artifacts_subdir
        await anyio.to_thread.run_sync(clear_output, output, subdir)
        if self.plan.write_back and not os.access(self.request.workspace, os.W_OK):
            raise WorkspaceError(f"{self.request.workspace}: cannot be written to, for writeBack")
        try:
            stage_log = StageLog(output / "logs" / "execute.log", self.masker)
        except OSError as error:
            raise OutputError(f"output {error.filename}: {error.strerror}") from error
        with stage_log:
            self.say = stage_log.line
            self._emit(STARTED, self._started())
            # On the file system of the output, so that moving into place is one step.
            with tempfile.TemporaryDirectory(prefix=".moonmind-", dir=output) as folder:
                staging = Path(folder)
                with self._failures():
                    await self._phases(staging)
                report = self._report(staging / "runner.log")
                self._publish(staging, output / subdir, report)
            level = Level.INFO if report.outcome is Outcome.SUCCEEDED else Level.ERROR
            self._emit(FINISHED, _finished(report, self.plan), level)
            self.say(
                f"{report.outcome}: exit code {report.exit_code}, {report.error or 'no error'}"
            )
        if self.unreadable is not None:
            raise self.unreadable
        return report

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Keep what ended the phases; the run itself goes on to its report."""
        try:
            yield
        except RunFailedError as error:
            self.progress.failure = error
        except WorkspaceError as error:
            self.progress.failure = EngineFailedError(str(error))
            self.progress.failure.retryable = False
            self.unreadable = error
        except OSError as error:
            # A full disk, mostly. The task has no part in it.
            self.progress.failure = EngineFailedError(
                f"{error.filename or 'output'}: {error.strerror or error}"
            )

    async def _phases(self, staging: Path) -> None:
        ready = await self._prepare()
        if ready is None:
            return
        before, image = ready
        assert self.progress.size is not None
        with self._phase(Phase.EXECUTE):
            execution = await self._execute(before, image)
        self.progress.execution = execution
        if execution is None:
            return
        exporter = Exporter(
            client=self.session.client,
            plan=self.plan,
            image=image,
            before=before,
            size=self.progress.size,
            workspace=self.request.workspace,
            masker=self.masker,
            log_limit_bytes=self.request.log_limit_bytes,
            helper_image=self.request.helper_image,
            archives=self.session.kind == "dagger",
        )
        with self._phase(Phase.EXPORT):
            await exporter.export(execution, self.progress.results, staging)
        if not self.shown:
            live = LiveOutput(Masker(), self.observer.event)
            live.feed((staging / "runner.log").read_text("utf-8", "replace"))
            live.finish()

    async def _prepare(self) -> tuple[dagger.Directory, Image] | None:
        """Send the workspace and bring the image; None when stopped meanwhile."""
        ready = await unless(
            self.stop, together(self._send(), self._resolve(), self._read_standing())
        )
        if ready is None:
            self.say("stopped before the command began")
            return None
        return ready[:2]

    async def _read_standing(self) -> None:
        self.progress.standing = await read_standing(self.request.workspace, self.plan.repository)
        self.standing_read.set()

    async def _send(self) -> dagger.Directory:
        workspace = self.request.workspace
        with self._phase(Phase.WORKSPACE), engine_failures("sending the workspace"):
            if self.session.bases is None and self.session.kind == "dagger":
                await self.standing_read.wait()
            if await anyio.to_thread.run_sync(recover, workspace):
                self.progress.results.warnings.append(
                    "an earlier run was killed while it wrote back; its changes were completed"
                )
            directory, self.progress.size = await send_workspace(
                self.session.client,
                workspace,
                self.plan.workspace,
                # An output directory in the workspace is not part of it: it changes
                # while it is sent.
                leave_out=[
                    self.request.output,
                    # What another run is just writing back.
                    *workspace.glob(f"{OURS}*"),
                ],
                bases=self.session.bases,
                standing=replace(self.progress.standing, is_clone=self.request.is_clone),
            )
            return directory

    async def _resolve(self) -> Image:
        with self._phase(Phase.IMAGE):
            reference = self.plan.image
            if self.plan.pull is PullMode.ALWAYS and self.session.kind == "dagger":
                reference = await anyio.to_thread.run_sync(
                    _current_reference, reference, abandon_on_cancel=True
                )
            key = reference, self.request.helper_image
            image = self.session.images.get(key)
            if image is None:
                image = await resolve_image(self.session.client, key[0], helper_image=key[1])
                self.session.images[key] = image
            self.progress.image = image
            return image

    async def _execute(self, before: dagger.Directory, image: Image) -> Execution | None:
        """Run the command; None when it was to stop and gave no answer."""
        client = self.session.client
        secrets = {
            name: secret_of(client, self.plan, name, value)
            for name, value in self.request.secrets.items()
        }
        async with AsyncExitStack() as held:
            if self.plan.cache is CacheMode.REUSE:
                turn = self.session.turn(self.plan.stop_name)
                await unless(self.stop, held.enter_async_context(turn))
                if self.stop.is_set():
                    return None
            return await self._run_command(before, image, secrets)

    async def _run_command(
        self, before: dagger.Directory, image: Image, secrets: Mapping[str, dagger.Secret]
    ) -> Execution | None:
        execution = None
        async with task_group() as tasks:
            tasks.start_soon(self._stop_command, image, tasks.cancel_scope)
            live = LiveOutput(self.masker, self.observer.event)
            with self._following(live):
                execution = await run_command(
                    self.session.client,
                    self.plan,
                    image,
                    before,
                    secrets,
                    stopping=self.stop.is_set,
                )
                if self.session.live is not None and not execution.ending.cached:
                    missing = await live.settle(execution.log_bytes)
                    self._note_missing(missing, execution.log_bytes)
            tasks.cancel_scope.cancel()
        return execution

    def _following(self, live: LiveOutput) -> AbstractContextManager[None]:
        if self.session.live is None:
            return nullcontext()
        return self.session.live.follow(self.trace_id, live.feed)

    def _note_missing(self, missing: int, total: int) -> None:
        self.shown = missing < total or not total
        if self.shown and missing > 0:
            self.progress.results.warnings.append(
                f"{missing} bytes of output were not seen live, mostly since they are not UTF-8; "
                "the log has them"
            )

    async def _stop_command(self, image: Image, scope: anyio.CancelScope) -> None:
        """Wait for the stop, pass it on, and end the query if nothing comes of it."""
        await self.stop.wait()
        self.say("stopping the command")
        try:
            with anyio.fail_after(self.plan.grace_seconds + STOP_MARGIN_SECONDS), traced():
                while True:
                    # Again and again: a stop counts for a command that has begun.
                    await request_stop(self.session.client, self.plan, image)
                    await anyio.sleep(STOP_AGAIN_SECONDS)
        except (RunFailedError, TimeoutError):
            self.say("the command did not stop; its container is killed and its files are lost")
            scope.cancel()

    @contextmanager
    def _phase(self, phase: Phase) -> Iterator[None]:
        self.say(f"{phase}: started")
        limit = inf if phase is Phase.EXECUTE else PHASE_SECONDS
        try:
            with self.watch.phase(phase), anyio.fail_after(limit):
                yield
        except TimeoutError as error:
            raise EngineFailedError(f"{phase}: the engine gave no end to it in {limit}s") from error
        self.say(f"{phase}: {self.watch.seconds[phase.value]:.3f}s")

    def _emit(self, message: str, payload: dict[str, Any], level: Level = Level.INFO) -> None:
        self.observer.event(Event(message, payload, level))

    def _started(self) -> dict[str, Any]:
        plan = self.plan
        self.say(
            f"job {plan.job_id}: {plan.image}, {plan.command_summary!r}, "
            f"at most {plan.timeout_seconds}s, in {plan.workdir}, "
            f"on {self.session.how} ({self.session.version})"
        )
        return {
            "image": plan.image,
            "command": self.masker.mask(plan.command_summary),
            "pullMode": plan.pull.value,
            "timeoutSeconds": plan.timeout_seconds,
        }

    def _report(self, log: Path) -> RunReport:
        plan, progress, results = self.plan, self.progress, self.progress.results
        size = progress.size
        engine = EngineInfo(kind=self.session.kind, version=self.session.version)
        warnings = [
            *warnings_of(self.request.payload),
            *run_warnings(plan, hidden=self.hidden, engine=engine),
            *results.warnings,
        ]
        if self.session.live is None:
            warnings.append("no live output: the engine's session was started by somebody else")
        findings = Findings(
            began=self.began,
            ending=progress.execution.ending if progress.execution else None,
            failure=progress.failure,
            engine=engine,
            reference=progress.image.reference if progress.image else plan.image,
            last_line=last_line(end_of(log)) if log.exists() else "",
            timings=Timings(**self.watch.seconds),
            workspace=WorkspaceInfo(
                files=size.files if size else None,
                bytes=size.bytes if size else None,
                uploaded_bytes=size.uploaded_bytes if size else None,
                written_back=results.written_back,
            ),
            source=progress.standing.source,
            warnings=warnings,
            artifacts=results.artifacts,
            log=results.log,
            trace_id=self.trace_id,
        )
        return make_report(plan, findings, self.masker)

    def _publish(self, staging: Path, target: Path, report: RunReport) -> None:
        """Put our own files beside the artifacts, and move all into place."""
        artifacts = staging / "artifacts"
        artifacts.mkdir(exist_ok=True)
        for name in RESERVED_DIRECTORIES:
            (artifacts / name).mkdir(exist_ok=True)
        if (staging / "runner.log").exists():
            (staging / "runner.log").rename(artifacts / "logs" / "runner.log")
        payload = self.masker.mask_json(publishable(self.request.payload))
        text = json.dumps(payload, indent=2, ensure_ascii=False) + "\n"
        (artifacts / "metadata" / "payload.json").write_text(text, "utf-8", "replace")
        (artifacts / "metadata" / "run.json").write_text(report.to_json(), "utf-8")
        artifacts.rename(target)


def _current_reference(reference: str) -> str:
    # What talks to registries takes longer to import than a short task takes.
    from moonmind_ext.engine.registry import current_reference

    return current_reference(reference)


def _finished(report: RunReport, plan: Plan) -> dict[str, Any]:
    return {
        "containerName": report.container_name,
        "image": report.image,
        "command": report.command_summary,
        "timedOut": report.timed_out,
        "exitCode": report.exit_code,
        "durationSeconds": report.duration_seconds,
        "artifactsSubdir": plan.artifacts_subdir,
        "outcome": report.outcome.value,
    }
