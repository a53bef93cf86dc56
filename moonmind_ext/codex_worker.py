"""The drop-in: MoonMind's own worker with its container tasks run as Dagger pipelines.

`install` is for MoonMind's `CodexWorker` at feature 020. Nothing of MoonMind is
imported; what is needed of it is found on the worker itself. docs/moonmind.md has the
lines to start such a worker with.
"""

import functools
import inspect
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import anyio.to_thread

from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.session import NoEngineError
from moonmind_ext.run.events import Event, Level, Phase
from moonmind_ext.run.output import OutputError
from moonmind_ext.run.secrets import SecretError
from moonmind_ext.run.task import RunRequest, run_task
from moonmind_ext.worker import stages
from moonmind_ext.worker.ending import completed
from moonmind_ext.worker.engine import EngineKeeper
from moonmind_ext.worker.feed import Feed
from moonmind_ext.worker.metrics import Metrics
from moonmind_ext.worker.policy import image_refusal, secret_refusal
from moonmind_ext.worker.queue import without_nul
from moonmind_ext.worker.secrets import payload_secrets
from moonmind_ext.worker.settings import (
    SettingsError,
    VaultSettings,
    WorkerSettings,
    read_patterns,
)
from moonmind_ext.worker.uploads import (
    NAME_TOO_LONG,
    PART_TYPE,
    Upload,
    is_too_long,
    job_files,
    part_names,
    read_part,
)
from moonmind_ext.worker.vault import VaultError
from moonmind_ext.workspace.errors import WorkspaceError
from pipelines.concurrency import task_group
from pipelines.masking import Masker
from pipelines.payload import (
    PublishMode,
    TaskContractError,
    TaskPayload,
    WriteBack,
    parse_payload,
)
from pipelines.plan import DEFAULT_HELPER_IMAGE, Defaults, Plan, plan_task
from pipelines.report import Outcome

_STAGE = "_run_container_execute_stage"
_STAGE_TAKES = ["job_id", "canonical_payload", "prepared", "container_spec"]
_RESULT, _UPLOAD = "WorkerExecutionResult", "ArtifactUpload"


class WorkerMismatchError(TypeError):
    """The object is no worker that the drop-in fits; the message says why."""


class PreparedWorkspace(Protocol):
    """What MoonMind's prepare stage has made, as far as it is used here."""

    @property
    def job_root(self) -> Path:
        """The job's directory; the one that holds it holds those of all jobs."""

    @property
    def repo_dir(self) -> Path:
        """The checkout."""

    @property
    def artifacts_dir(self) -> Path:
        """What is uploaded is below it."""


def install(worker: Any, *, engine: EngineChoice | None = None) -> None:
    """Let a worker of MoonMind run its container tasks as Dagger pipelines.

    To be called once, before the worker runs. A session with the engine is open
    exactly as long as `run_forever` or `run_once` is under way.

    Parameters
    ----------
    worker
        MoonMind's `CodexWorker`, or one of a class derived from it.
    engine
        Where commands run. Default: what `MOONMIND_WORKER_ENGINE` says, or `auto`.

    Raises
    ------
    SettingsError
        When a setting in the environment is broken.
    WorkerMismatchError
        When the worker has not the interface of feature 020, or the drop-in already.
    """
    _check(worker)
    drop_in = _DropIn(worker, _settings_of(worker, engine), _Results.of(worker))
    worker.run_forever = drop_in.with_engine(worker.run_forever)
    worker.run_once = drop_in.with_engine(worker.run_once)
    setattr(worker, _STAGE, drop_in.execute)


def _check(worker: Any) -> None:
    """Refuse at start-up what would fail at the first job."""
    wanted = ("run_forever", "run_once", "_emit_event", "_config", _STAGE)
    if missing := [name for name in wanted if not hasattr(worker, name)]:
        raise WorkerMismatchError(
            f"{type(worker).__name__} has no {', '.join(missing)}; the drop-in is for MoonMind's "
            "CodexWorker at feature 020"
        )
    if _STAGE in vars(worker):
        raise WorkerMismatchError("the container stage of this worker is replaced already")
    takes = list(inspect.signature(getattr(worker, _STAGE)).parameters)
    if takes != _STAGE_TAKES:
        raise WorkerMismatchError(
            f"{_STAGE} takes {', '.join(takes)}; at feature 020 it takes {', '.join(_STAGE_TAKES)}"
        )


def _settings_of(worker: Any, engine: EngineChoice | None) -> WorkerSettings:
    """Put together what MoonMind's worker was told, and what only ours knows."""
    config = worker._config  # noqa: SLF001, MoonMind has no public way to it
    environment = os.environ
    images, secrets = "MOONMIND_WORKER_ALLOWED_IMAGES", "MOONMIND_WORKER_ALLOWED_SECRETS"
    vault = None
    if config.vault_address and config.vault_token:
        vault = VaultSettings(
            address=config.vault_address.rstrip("/"),
            token=config.vault_token,
            namespace=config.vault_namespace,
            mounts=tuple(config.vault_allowed_mounts),
            seconds=config.vault_timeout_seconds,
        )
    return WorkerSettings(
        url=config.moonmind_url,
        worker_id=config.worker_id,
        token=config.worker_token,
        workdir=config.workdir,
        timeout_seconds=config.container_default_timeout_seconds,
        vault=vault,
        engine=engine or _read_engine(environment),
        engine_open_seconds=_read_open_seconds(environment),
        allowed_images=read_patterns(images, environment, environment.get(images, "*")),
        allowed_secrets=read_patterns(
            secrets, environment, environment.get(secrets, "vault://*"), may_be_none=True
        ),
        github_token=environment.get("GITHUB_TOKEN", "").strip() or None,
        helper_image=environment.get("MOONMIND_HELPER_IMAGE") or DEFAULT_HELPER_IMAGE,
        module=environment.get("MOONMIND_MODULE") or ".",
    )


def _read_engine(environment: Mapping[str, str]) -> EngineChoice:
    text = environment.get("MOONMIND_WORKER_ENGINE", "").strip().lower()
    try:
        return EngineChoice(text or EngineChoice.AUTO)
    except ValueError:
        raise SettingsError(
            f"MOONMIND_WORKER_ENGINE: must be one of {', '.join(EngineChoice)}"
        ) from None


def _read_open_seconds(environment: Mapping[str, str]) -> float:
    text = environment.get("MOONMIND_ENGINE_OPEN_SECONDS", "").strip() or "30"
    if not text.isdecimal() or int(text) < 1:
        raise SettingsError("MOONMIND_ENGINE_OPEN_SECONDS: must be a whole number above 0")
    return int(text)


@dataclass(frozen=True, slots=True)
class _Results:
    """MoonMind's classes for what a stage gives back."""

    result: Callable[..., Any]
    upload: Callable[..., Any]

    @classmethod
    def of(cls, worker: Any) -> "_Results":
        """Find them where the worker's class has them from, or a class it is derived from."""
        for base in type(worker).__mro__:
            names = vars(sys.modules[base.__module__])
            if _RESULT in names and _UPLOAD in names:
                return cls(names[_RESULT], names[_UPLOAD])
        raise WorkerMismatchError(
            f"the module of {type(worker).__name__} has no {_RESULT} and {_UPLOAD}"
        )


@dataclass(frozen=True, slots=True)
class _Running:
    """What holds while one of the worker's methods runs.

    Attributes
    ----------
    engines
        The keeper of the outermost method, which goes on to the next jobs.
    held
        Closed when the method is over, and with it the upload of a job.
    """

    engines: EngineKeeper
    held: AsyncExitStack


_running: ContextVar[_Running] = ContextVar("_running")
"""Of the task that runs the method: workers side by side do not see each other's."""


class _DropIn:
    """The container stage of one worker, and the engine's session around it."""

    def __init__(self, worker: Any, settings: WorkerSettings, results: _Results) -> None:
        self._worker = worker
        self._settings = settings
        self._results = results

    def with_engine(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """Wrap a method so that there is a session while it runs."""

        @functools.wraps(method)
        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            async with self._open():
                return await method(*args, **kwargs)

        return wrapped

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[None]:
        outer = _running.get(None)
        async with AsyncExitStack() as held:
            if outer is None:
                engines = await held.enter_async_context(self._engines())
            else:
                engines = outer.engines
            token = _running.set(_Running(engines, held))
            try:
                yield
            finally:
                _running.reset(token)

    @asynccontextmanager
    async def _engines(self) -> AsyncIterator[EngineKeeper]:
        settings = self._settings
        keeper = EngineKeeper(settings.engine, settings.engine_open_seconds, Metrics())
        async with task_group() as background:
            background.start_soon(keeper.run)
            yield keeper
            background.cancel_scope.cancel()

    async def execute(
        self,
        *,
        job_id: object,
        canonical_payload: Mapping[str, Any],
        prepared: PreparedWorkspace,
        container_spec: object,  # noqa: ARG002, has lost blank tokens and knows no field of ours
    ) -> Any:
        """Stand in for MoonMind's own container stage.

        When this is cancelled the command is killed.
        """
        feed = Feed(_Events(self._worker, job_id), str(job_id))
        execution = _Execution(
            settings=self._settings,
            results=self._results,
            running=_running.get(),
            feed=feed,
            job_id=str(job_id),
            prepared=prepared,
        )
        async with task_group() as background:
            background.start_soon(feed.run)
            result = await execution.run(canonical_payload)
            await feed.flush()
            background.cancel_scope.cancel()
        return result


class _Events:
    """Sends events through the worker, which counts none of them as worth a failure."""

    def __init__(self, worker: Any, job_id: object) -> None:
        self._worker = worker
        self._job_id = job_id

    async def event(self, job_id: str, event: Event) -> None:  # noqa: ARG002, MoonMind's is a UUID
        await self._worker._emit_event(  # noqa: SLF001, MoonMind has no public way to it
            job_id=self._job_id,
            level=event.level.value,
            message=event.message,
            payload=without_nul(event.payload),
        )


@dataclass(frozen=True, slots=True)
class _Observer:
    """Passes on what a run says; MoonMind has nothing to show phases in."""

    feed: Feed

    def event(self, event: Event) -> None:
        self.feed.put(event)

    def phase_started(self, phase: Phase) -> None:
        pass

    def phase_finished(self, phase: Phase, seconds: float) -> None:
        pass


class _NotRunError(Exception):
    """The task left nothing behind; the message is the job's error."""


@dataclass(kw_only=True)
class _Execution:
    """The container stage of one job."""

    settings: WorkerSettings
    results: _Results
    running: _Running
    feed: Feed
    job_id: str
    prepared: PreparedWorkspace
    masker: Masker = field(init=False)

    async def run(self, canonical_payload: Mapping[str, Any]) -> Any:
        try:
            payload, plan = self._accept(canonical_payload)
            secrets = await self._secrets(plan)
            hidden = (*self.settings.credentials, *plan.secret_values.values(), *secrets.values())
            self.masker = Masker(hidden)
            error = await self._run(payload, plan, secrets)
        except _NotRunError as refusal:
            return self._result(str(refusal), [])
        return self._result(error and self.masker.mask(error), await self._uploads(plan))

    def _result(self, error: str | None, uploads: list[Any]) -> Any:
        return self.results.result(
            succeeded=error is None,
            summary=completed(None).message if error is None else None,
            error_message=without_nul(error),
            artifacts=tuple(uploads),
        )

    def _accept(self, canonical_payload: Mapping[str, Any]) -> tuple[TaskPayload, Plan]:
        """Read the payload, and refuse what can or may not run here."""
        settings = self.settings
        try:
            payload = parse_payload(dict(canonical_payload))
            publishes = payload.task.publish.mode is not PublishMode.NONE
            plan = plan_task(
                payload,
                job_id=self.job_id,
                defaults=Defaults(
                    workdir=str(self.prepared.job_root.absolute().parent),
                    timeout_seconds=settings.timeout_seconds,
                    # MoonMind commits what it then finds in the checkout.
                    write_back=WriteBack.CHANGES if publishes else WriteBack.NONE,
                    module=settings.module,
                ),
            )
        except (TaskContractError, ValueError) as error:
            raise _NotRunError(f"invalid job payload: {error}") from error
        refusals = [
            image_refusal(plan.image, settings.allowed_images),
            *(
                secret_refusal(name, reference, settings.allowed_secrets)
                for name, reference in plan.secret_env.items()
            ),
        ]
        if found := [refusal for refusal in refusals if refusal is not None]:
            raise _NotRunError("\n".join(found))
        return payload, plan

    async def _secrets(self, plan: Plan) -> dict[str, str]:
        """Resolve the payload's references."""
        try:
            return await payload_secrets(plan.secret_env, self.settings)
        except (SecretError, VaultError) as error:
            raise _NotRunError(str(error)) from error

    async def _run(
        self, payload: TaskPayload, plan: Plan, secrets: Mapping[str, str]
    ) -> str | None:
        """Run the task; gives the job's error, if it has one."""
        request = RunRequest(
            payload=payload,
            plan=plan,
            workspace=self.prepared.repo_dir.absolute(),
            output=self.prepared.artifacts_dir.absolute(),
            secrets=secrets,
            helper_image=self.settings.helper_image,
        )
        engines = self.running.engines
        try:
            async with engines.session() as session:
                report = await run_task(session, request, _Observer(self.feed))
                if report.outcome is Outcome.ENGINE_FAILED:
                    await engines.suspect(session)
        except (NoEngineError, OutputError) as error:
            raise _NotRunError(str(error)) from error
        except WorkspaceError as error:
            return str(error)
        return None if report.outcome is Outcome.SUCCEEDED else report.error or report.outcome.value

    async def _uploads(self, plan: Plan) -> list[Any]:
        """List what MoonMind is to upload; what could not be is said.

        The first file that its server refused would fail the job, so it is given
        none of those.
        """
        artifacts = self.prepared.artifacts_dir
        files = await anyio.to_thread.run_sync(job_files, artifacts, plan.artifacts_subdir)
        parts: dict[str, int] = {}
        missing: dict[str, str] = {}
        uploads: list[Any] = []
        for file in files:
            # The stage's own log is MoonMind's to add, like the other stages'.
            if not file.name.startswith(f"{plan.artifacts_subdir}/"):
                continue
            name = file.name_for_all(self.masker)
            if is_too_long(name):
                missing[name] = NAME_TOO_LONG
                continue
            try:
                found = await anyio.to_thread.run_sync(self._fit, file, name)
            except OSError as error:
                missing[name] = error.strerror or str(error)
                continue
            uploads += found
            if len(found) > 1:
                parts[name] = len(found)
        if parts or missing:
            about = {"parts": parts, "missing": missing}
            self.feed.put(Event(stages.UPLOADED, about, Level.WARN))
        return uploads

    def _fit(self, file: Upload, name: str) -> list[Any]:
        """Give a file as it can be uploaded: whole, in parts, or not at all; blocking."""
        with file.path.open("rb"):
            size = file.path.stat().st_size
        names = part_names(name, size)
        if not size:
            # The server stores no empty files; that there was one is in `run.json`.
            return []
        if len(names) > 1:
            folder = self._folder()
            paths = [folder / f"{index}" for index in range(len(names))]
            for index, path in enumerate(paths):
                path.write_bytes(read_part(file.path, index))
            return [
                self.results.upload(path=path, name=part_name, content_type=PART_TYPE)
                for path, part_name in zip(paths, names, strict=True)
            ]
        path = file.path
        if name != file.name:
            # MoonMind sends the name on disk too.
            path = self._folder() / "file"
            path.hardlink_to(file.path)
        return [self.results.upload(path=path, name=name, content_type=file.content_type)]

    def _folder(self) -> Path:
        """Make a directory for what is there only to be uploaded; it goes with the job."""
        folder = TemporaryDirectory(
            prefix=".moonmind-upload-", dir=self.prepared.job_root, ignore_cleanup_errors=True
        )
        return Path(self.running.held.enter_context(folder))
