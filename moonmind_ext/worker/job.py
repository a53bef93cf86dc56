"""The life of one job, from the claim to the last call."""

import json
import os
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import structlog
from opentelemetry import trace

from moonmind_ext.engine.session import NoEngineError
from moonmind_ext.run.events import LOG, Event, Level, Phase
from moonmind_ext.run.output import OutputError
from moonmind_ext.run.secrets import SecretError
from moonmind_ext.run.stage_log import StageLog
from moonmind_ext.run.task import RunRequest, run_task
from moonmind_ext.worker import stages
from moonmind_ext.worker.admission import Admission
from moonmind_ext.worker.checkout import REPO, BranchError, Checkout, check_out
from moonmind_ext.worker.claim import Claim
from moonmind_ext.worker.directory import DirectoryBusyError, job_directory
from moonmind_ext.worker.ending import (
    Call,
    Ending,
    JobEndedError,
    cancelled,
    completed,
    failed,
    failed_run,
    given_back,
)
from moonmind_ext.worker.engine import EngineKeeper
from moonmind_ext.worker.feed import Feed
from moonmind_ext.worker.git import Credential, clone_url, git_environment
from moonmind_ext.worker.metrics import Metrics
from moonmind_ext.worker.policy import image_refusal, secret_refusal, subdir_refusal
from moonmind_ext.worker.process import CommandError, Runner
from moonmind_ext.worker.publish import Published, PublishError, publish, separate_git
from moonmind_ext.worker.queue import QueueClient
from moonmind_ext.worker.secrets import payload_secrets
from moonmind_ext.worker.settings import WorkerSettings
from moonmind_ext.worker.telemetry import begin_span, job_trace, span
from moonmind_ext.worker.uploads import Uploader, job_files
from moonmind_ext.worker.vault import VaultError, read_secret
from moonmind_ext.workspace.errors import WorkspaceError
from pipelines.concurrency import task_group, unless
from pipelines.masking import Masker
from pipelines.payload import (
    DEFAULT_ARTIFACTS_SUBDIR,
    PublishMode,
    TaskContractError,
    TaskPayload,
    WriteBack,
    parse_payload,
)
from pipelines.plan import Defaults, Plan, plan_task
from pipelines.report import Outcome

MAX_NAMED = 100
"""Files in one event: a name has up to 512 characters."""

PUBLISH_SECONDS = 3600.0
"""For all of a publish, its attempts included: one under way is finished, also when the
worker drains or the job is cancelled."""

INVALID = Outcome.INVALID_PAYLOAD.value

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Shop:
    """What all jobs of a worker share."""

    settings: WorkerSettings
    queue: QueueClient
    engines: EngineKeeper
    admission: Admission
    metrics: Metrics


class JobLife:
    """One job while this worker has it.

    Attributes
    ----------
    claim
        The hold on it.
    foreign
        Why it is not one for this worker, and is only given back; None for one that is.
    """

    def __init__(self, shop: Shop, claim: Claim, foreign: str | None = None) -> None:
        self._shop = shop
        self.foreign = foreign
        self.claim = claim
        self._job = claim.job
        self._feed = Feed(shop.queue, self._job.id)
        self._stop = anyio.Event()
        self._stop_reason: str | None = None
        self._hidden = list(shop.settings.credentials)
        self._masker = Masker(self._hidden)
        # What every event of MoonMind's says of the job; known with its payload.
        self._about: dict[str, Any] = {"jobType": self._job.type}
        # Of the artifacts; known with the payload too.
        self._subdir = DEFAULT_ARTIFACTS_SUBDIR
        # Whether another attempt may be made; with the command it depends on the payload.
        self._may_repeat = True

    def stop(self, reason: str) -> None:
        """Stop what runs, bring back what there is, and give the job back.

        Parameters
        ----------
        reason
            For whoever reads why the job came back.
        """
        self._stop_reason = self._stop_reason or reason
        self._stop.set()

    def masked(self, error: Exception) -> str:
        """Give an exception with its traceback, for the worker's own log."""
        return self._masker.mask("".join(traceback.format_exception(error)))

    async def live(self) -> str:
        """Do the job to its last call, and give its outcome.

        When this is cancelled, nothing more is reported: the lease runs out.
        """
        with self._shop.metrics.job_running(), job_trace(self._job.id, self._job.attempt):
            log.info("claimed a job", attempt=self._job.attempt)
            outcome = "lost"
            async with task_group() as background:
                background.start_soon(self._feed.run)
                background.start_soon(self.claim.keep)
                ending = await unless(self.claim.lost, self._to_the_end())
                if ending is not None:
                    outcome = ending.outcome
                background.cancel_scope.cancel()
            self._shop.metrics.job_ended(outcome)
            log.info("done with the job", outcome=outcome)
        return outcome

    async def _to_the_end(self) -> Ending | None:
        """Do the job and report; None when the report was not taken."""
        async with task_group() as tasks:
            tasks.start_soon(self._watch_cancellation)
            if self.foreign is not None:
                ending = given_back(self._job, self.foreign)
                taken = await self._report(ending)
            else:
                ending, taken = await self._in_directory()
            tasks.cancel_scope.cancel()
        return ending if taken else None

    async def _watch_cancellation(self) -> None:
        await self.claim.cancelled.wait()
        self._emit(Event(stages.CANCEL_REQUESTED, self._about, Level.WARN))
        self._stop.set()

    async def _in_directory(self) -> tuple[Ending, bool]:
        """Do the job in a directory of its own, and report before that is removed."""
        settings = self._shop.settings
        reported: tuple[Ending, bool] | None = None
        try:
            async with job_directory(settings.workdir, self._job.id) as directory:
                ending = await self._attempt(directory)
                await self._upload(directory)
                reported = ending, await self._report(ending)
        except DirectoryBusyError as error:
            ending = given_back(self._job, str(error))
        except OSError as error:
            if reported is not None:
                # A second report would be one on the job's next attempt. The next start
                # of a worker sweeps what is left.
                log.warning("cannot remove the job's directory", error=_os_error(error))
                return reported
            ending = failed("engine-failed", _os_error(error), retryable=self._may_repeat)
        return reported or (ending, await self._report(ending))

    async def _attempt(self, directory: Path) -> Ending:
        """Go through the stages; whatever goes wrong is an ending."""
        try:
            return await self._stages(directory)
        except JobEndedError as error:
            return error.ending
        except OSError as error:
            # A full disk, mostly.
            return failed("engine-failed", _os_error(error), retryable=self._may_repeat)
        except Exception as error:  # noqa: BLE001
            # A fault of this program. It must not take the other jobs with it.
            log.error("the worker failed", exception=self.masked(error))  # noqa: TRY400
            message = f"the worker failed: {error!r}"
            return failed("engine-failed", message, retryable=self._may_repeat)

    async def _stages(self, directory: Path) -> Ending:
        payload, plan = self._accept()
        self._about |= stages.describe(self._job.type, payload)
        runtime = {"targetRuntime": payload.target_runtime}
        self._emit(Event(stages.CLAIMED, {**self._about, **runtime}))
        self._emit(Event(stages.PLAN, {**self._about, "stages": stages.stages_of(payload)}))

        artifacts = directory / "artifacts"
        for path in (artifacts / "logs", directory / "home"):
            path.mkdir(parents=True)
        with self._stage(stages.PREPARE) as about:
            secrets = await self._secrets(plan)
            checkout = await self._prepare(directory, payload)
            about.update(checkout.branches.to_dict())
        self._go_on_unless_stopped()

        with self._stage(stages.EXECUTE) as about:
            await self._execute(directory, payload, plan, secrets)
            about["summary"] = completed(None).message
        if self.claim.cancelled.is_set():
            # The command came to its end before it could be stopped; nobody wants
            # its changes published any more.
            return cancelled()
        return completed(await self._publish(directory, payload, plan, checkout))

    def _accept(self) -> tuple[TaskPayload, Plan]:
        """Read the payload, and refuse what can or may not run here."""
        settings = self._shop.settings
        try:
            payload = parse_payload(self._job.payload)
            publishes = payload.task.publish.mode is not PublishMode.NONE
            plan = plan_task(
                payload,
                job_id=self._job.id,
                defaults=Defaults(
                    workdir=str(settings.workdir),
                    timeout_seconds=settings.timeout_seconds,
                    write_back=WriteBack.CHANGES if publishes else WriteBack.NONE,
                    module=settings.module,
                ),
            )
            clone_url(payload.repository)
        except (TaskContractError, ValueError) as error:
            self._emit(Event(stages.INVALID, {**self._about, "error": str(error)}, Level.ERROR))
            message = f"invalid job payload: {error}"
            raise JobEndedError(failed(INVALID, message, retryable=False)) from error
        self._hide(*plan.secret_values.values())
        self._subdir = plan.artifacts_subdir
        refusals = [
            subdir_refusal(plan.artifacts_subdir),
            image_refusal(plan.image, settings.allowed_images),
            self._shop.admission.refusal(plan.resources),
            *(
                secret_refusal(name, reference, settings.allowed_secrets)
                for name, reference in plan.secret_env.items()
            ),
        ]
        if found := [refusal for refusal in refusals if refusal is not None]:
            raise JobEndedError(failed(INVALID, "\n".join(found), retryable=False))
        return payload, plan

    async def _secrets(self, plan: Plan) -> dict[str, str]:
        """Resolve the payload's references; from now on their values are masked."""
        try:
            secrets = await payload_secrets(plan.secret_env, self._shop.settings)
        except SecretError as error:
            raise JobEndedError(failed(INVALID, str(error), retryable=False)) from error
        except VaultError as error:
            outcome = "engine-failed" if error.may_pass else INVALID
            raise JobEndedError(failed(outcome, str(error), retryable=error.may_pass)) from error
        self._hide(*secrets.values())
        return secrets

    async def _credential(self, reference: str | None) -> tuple[Credential | None, str]:
        """Find the credential for git, and say where it is from."""
        settings = self._shop.settings
        if reference is not None:
            try:
                secret = await read_secret(settings.vault, reference)
            except VaultError as error:
                retryable = error.may_pass and self._may_repeat
                ending = failed("engine-failed", str(error), retryable=retryable)
                raise JobEndedError(ending) from error
            found = Credential(secret.value.strip(), secret.username, secret.host)
            source = f"vault:{reference}"
        elif settings.github_token:
            found = Credential(settings.github_token, host=settings.github_host)
            source = "env:GITHUB_TOKEN"
        else:
            return None, "none"
        self._hide(found.token, found.header)
        return found, source

    async def _prepare(self, directory: Path, payload: TaskPayload) -> Checkout:
        auth, task = payload.auth, payload.task
        credential, source = await self._credential(auth.repo_auth_ref if auth else None)
        with self._runner(directory, "prepare", credential) as runner:
            runner.log.line(f"repo auth source: {source}")
            try:
                checkout = await unless(
                    self._stop,
                    check_out(
                        runner,
                        clone_url(payload.repository),
                        task.git,
                        job_id=self._job.id,
                        skill=task.skill.id,
                        day=self._job.created_at or datetime.now(UTC),
                    ),
                )
            except BranchError as error:
                raise JobEndedError(failed(INVALID, str(error), retryable=False)) from error
            except CommandError as error:
                # The network, the server, a full disk; or a token that does not reach
                # this repository, which looks the same and is found in a few attempts.
                message = self._masker.mask(f"prepare failed: {error}")
                raise JobEndedError(failed("engine-failed", message, retryable=True)) from error
        if checkout is None:
            self._go_on_unless_stopped()
        assert checkout is not None
        self._emit(Event(stages.BRANCHES, checkout.branches.to_dict()))
        context = _task_context(payload, checkout, directory, source)
        _write_json(directory / "artifacts" / "task_context.json", self._masker.mask_json(context))
        return checkout

    async def _execute(
        self, directory: Path, payload: TaskPayload, plan: Plan, secrets: Mapping[str, str]
    ) -> None:
        """Run the task; raises how the job ends unless it succeeded."""
        shop = self._shop
        request = RunRequest(
            payload=payload,
            plan=plan,
            workspace=directory / REPO,
            output=directory / "artifacts",
            secrets=secrets,
            helper_image=shop.settings.helper_image,
            is_clone=True,
        )
        observer = _Observer(self._emit, shop.metrics)
        try:
            async with AsyncExitStack() as held:
                # For a stop neither the others' ends nor an engine is waited for.
                room = shop.admission.admitted(plan.resources)
                await unless(self._stop, held.enter_async_context(room))
                self._go_on_unless_stopped()
                engine = shop.engines.session()
                session = await unless(self._stop, held.enter_async_context(engine))
                self._go_on_unless_stopped()
                assert session is not None
                self._may_repeat = plan.retryable
                report = await run_task(session, request, observer, stop=self._stop)
                if report.outcome is Outcome.ENGINE_FAILED:
                    await shop.engines.suspect(session)
        except NoEngineError as error:
            # The command has not begun, so it may whatever the payload says of that.
            raise JobEndedError(failed("engine-failed", str(error), retryable=True)) from error
        except (WorkspaceError, OutputError) as error:
            # A full disk, or a workspace that cannot be sent however often.
            retryable = isinstance(error.__cause__, OSError) and self._may_repeat
            ending = failed("engine-failed", str(error), retryable=retryable)
            raise JobEndedError(ending) from error
        if report.outcome is Outcome.CANCELLED:
            # A command that has not begun may begin elsewhere, whatever the payload says.
            self._may_repeat = self._may_repeat or report.timings.execute is None
            self._go_on_unless_stopped()
        if report.outcome is not Outcome.SUCCEEDED:
            raise JobEndedError(failed_run(report))

    async def _publish(
        self, directory: Path, payload: TaskPayload, plan: Plan, checkout: Checkout
    ) -> str | None:
        """Publish what the task has changed; gives a note for the summary."""
        publishing = payload.task.publish
        if publishing.mode is PublishMode.NONE:
            skipped = {"status": "skipped", "reason": "publish mode is none"}
            self._emit(Event(stages.PUBLISH, {**self._about, **skipped}))
            return None
        auth = payload.auth
        reference = (auth.publish_auth_ref or auth.repo_auth_ref) if auth else None
        with self._stage(stages.PUBLISH, mode=publishing.mode.value) as about:
            credential, _ = await self._credential(reference)
            variables = separate_git(directory, checkout)
            with self._runner(directory, "publish", credential, variables) as runner:
                runner.log.line(f"publish mode: {publishing.mode}")
                runner.log.line(f"working branch: {checkout.branches.working}")
                try:
                    with anyio.fail_after(PUBLISH_SECONDS):
                        published = await publish(runner, publishing, checkout, _gh())
                except TimeoutError as error:
                    message = f"publish failed: no end within {PUBLISH_SECONDS:g}s"
                    ending = failed("publish-failed", message, retryable=plan.retryable)
                    raise JobEndedError(ending) from error
                except PublishError as error:
                    retryable = plan.retryable and not error.is_refused
                    message = self._masker.mask(str(error))
                    ending = failed("publish-failed", message, retryable=retryable)
                    raise JobEndedError(ending) from error
            result = self._masker.mask_json(published.to_dict())
            try:
                _write_json(directory / "artifacts" / "publish_result.json", result)
            except OSError as error:
                # It is published: nothing that goes wrong here makes it a failure.
                log.warning("cannot write publish_result.json", error=_os_error(error))
            about.update(workingBranch=published.branch, prUrl=published.url)
            if published.skipped:
                about["skipped"] = True
        self._emit(Event(stages.PUBLISH, {**self._about, **_publish_status(published)}))
        return published.note

    async def _upload(self, directory: Path) -> None:
        """Store what there is; what could not be is said, and nothing else comes of it."""
        with self._shop.metrics.timed("upload"), span("upload"):
            try:
                artifacts = directory / "artifacts"
                files = await anyio.to_thread.run_sync(job_files, artifacts, self._subdir)
            except OSError as error:
                log.warning("cannot list what there is to upload", error=_os_error(error))
                return
            uploader = Uploader(self._shop.queue, self._job.id, self._masker)
            uploaded = await uploader.upload(files)
        if uploaded.parts or uploaded.missing:
            # Of very many the first tell enough.
            payload: dict[str, Any] = {
                "parts": dict(islice(uploaded.parts.items(), MAX_NAMED)),
                "missing": dict(islice(uploaded.missing.items(), MAX_NAMED)),
            }
            if len(uploaded.missing) > MAX_NAMED:
                payload["missingCount"] = len(uploaded.missing)
            self._emit(Event(stages.UPLOADED, payload, Level.WARN))
            log.warning("not all files were stored as they are", **payload)

    async def _report(self, ending: Ending) -> bool:
        """Make the last call; whether it was taken."""
        queue, job_id = self._shop.queue, self._job.id
        message = self._masker.mask(ending.message)
        about = {**self._about, "error": message}
        # What happened comes before how it ended.
        await self._feed.flush()
        match ending.call:
            case Call.COMPLETE:
                taken = await self.claim.end(lambda: queue.complete(job_id, message))
                last = Event(stages.COMPLETED, {**self._about, "summary": message})
            case Call.FAIL:
                retryable = ending.retryable
                taken = await self.claim.end(
                    lambda: queue.fail(job_id, message, retryable=retryable)
                )
                about["retryable"] = retryable
                last = Event(stages.FAILED, about, Level.ERROR)
            case Call.ACKNOWLEDGE:
                taken = await self.claim.end(lambda: queue.acknowledge(job_id, message))
                last = Event(stages.CANCELLED, about, Level.WARN)
        if taken:
            self._emit(last)
            await self._feed.flush()
        return taken

    def _hide(self, *values: str) -> None:
        """Mask these too, from now on."""
        self._hidden += values
        self._masker = Masker(self._hidden)

    def _go_on_unless_stopped(self) -> None:
        if self.claim.cancelled.is_set():
            raise JobEndedError(cancelled())
        if self._stop.is_set():
            why = self._stop_reason or "the worker stops"
            raise JobEndedError(given_back(self._job, why, may_repeat=self._may_repeat))

    @contextmanager
    def _stage(self, name: str, **more: Any) -> Iterator[dict[str, Any]]:
        """Say that a stage began, and how it ended; what is put in is in the last event."""
        short = name.rpartition(".")[2]
        self._emit(stages.stage_event(name, "started", {**self._about, **more}))
        about = {**self._about, **more}
        try:
            with self._shop.metrics.timed(short), span(short):
                yield about
        except Exception as error:
            about["error"] = self._masker.mask(str(error))
            self._emit(stages.stage_event(name, "failed", about))
            raise
        self._emit(stages.stage_event(name, "finished", about))

    @contextmanager
    def _runner(
        self,
        directory: Path,
        stage: str,
        credential: Credential | None,
        variables: Mapping[str, str] | None = None,
    ) -> Iterator[Runner]:
        """Run programs of a stage, into its log."""
        log_file = directory / "artifacts" / "logs" / f"{stage}.log"
        environment = {**git_environment(os.environ, credential), **(variables or {})}
        with StageLog(log_file, self._masker) as stage_log:
            yield Runner(directory, environment, stage_log)

    def _emit(self, event: Event) -> None:
        self._feed.put(event)


class _Observer:
    """Passes on what a run says: to the queue, the metrics and the trace."""

    def __init__(self, emit: Any, metrics: Metrics) -> None:
        self._emit = emit
        self._metrics = metrics
        self._spans: dict[Phase, trace.Span] = {}

    def event(self, event: Event) -> None:
        if event.message == LOG:
            self._metrics.log_bytes(len(event.payload["text"].encode()))
        self._emit(event)

    def phase_started(self, phase: Phase) -> None:
        self._spans[phase] = begin_span(phase.value)

    def phase_finished(self, phase: Phase, seconds: float) -> None:
        self._spans.pop(phase).end()
        self._metrics.phase(f"run.{phase}", seconds)


def _gh() -> str:
    return shutil.which("gh") or "gh"


def _os_error(error: OSError) -> str:
    return f"{error.filename or 'the disk'}: {error.strerror or error}"


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def _publish_status(published: Published) -> dict[str, Any]:
    if published.skipped:
        return {"status": "skipped", "reason": "no local changes"}
    return {
        "status": "published",
        "mode": published.mode.value,
        "workingBranch": published.branch,
        "prUrl": published.url,
    }


def _task_context(
    payload: TaskPayload, checkout: Checkout, directory: Path, auth_source: str
) -> dict[str, Any]:
    """Give MoonMind's `task_context.json`."""
    task, branches, auth = payload.task, checkout.branches, payload.auth
    return {
        "repository": payload.repository,
        "runtime": payload.target_runtime,
        "skill": {"id": task.skill.id, "args": task.skill.args},
        "workdirMode": "fresh_clone",
        "publishMode": task.publish.mode.value,
        "auth": {
            "repoAuthRef": auth and auth.repo_auth_ref,
            "publishAuthRef": auth and auth.publish_auth_ref,
            "repoAuthSource": auth_source,
        },
        "resolved": {
            "defaultBranch": branches.default,
            "startingBranch": {
                "value": branches.starting,
                "explicit": task.git.starting_branch is not None,
            },
            "newBranch": {"value": branches.new, "explicit": task.git.new_branch is not None},
            "workingBranch": branches.working,
        },
        "workspace": {
            "jobRoot": str(directory),
            "repo": str(directory / REPO),
            "home": str(directory / "home"),
            "artifacts": str(directory / "artifacts"),
        },
        "timestamp": datetime.now(UTC).isoformat(),
    }
