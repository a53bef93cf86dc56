"""One run whose whole result stays in the engine: what a Dagger module can give.

`moonmind_ext.run` does the same for a host's disk, with events while it goes on.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic
from uuid import uuid4

import dagger
from opentelemetry import trace

from pipelines.artifacts import in_git, readable, refuse_link
from pipelines.concurrency import together
from pipelines.container_task import (
    Execution,
    Image,
    engine_failures,
    log_excerpt,
    prepare,
    resolve_image,
    run_command,
)
from pipelines.inventory import judge, list_entries, without
from pipelines.masking import Masker
from pipelines.payload import PullMode, TaskPayload, publishable, warnings_of
from pipelines.plan import DEFAULT_HELPER_IMAGE, Plan
from pipelines.report import (
    ALL_KILLED,
    LOG_LIMIT_BYTES,
    Artifacts,
    EngineInfo,
    Findings,
    LogInfo,
    RunFailedError,
    RunReport,
    Source,
    Timings,
    WorkspaceInfo,
    WrittenBack,
    cut_mark,
    last_line,
    make_report,
    run_warnings,
)

_TAIL_CHARACTERS = 4000


@dataclass(slots=True)
class EngineResult:
    """What a run has left in the engine.

    Attributes
    ----------
    log, log_tail
        The command's output, masked, and the text of its end.
    payload
        JSON, fit to be run again.
    artifacts
        What the command left and may leave the engine.
    before, after
        The workspace, without what may not leave the engine.
    image
        None when it is not available.
    prepared, finished
        The container before and after the command; None where it never came to be,
        and after a command that took the file system with it.
    """

    log: dagger.File
    artifacts: dagger.Directory
    before: dagger.Directory
    after: dagger.Directory
    payload: str = ""
    log_tail: str = ""
    image: Image | None = None
    prepared: dagger.Container | None = None
    finished: dagger.Container | None = None


async def run_in_engine(
    client: dagger.Client,
    payload: TaskPayload,
    plan: Plan,
    workspace: dagger.Directory,
    secrets: Sequence[dagger.Secret],
    *,
    helper_image: str = DEFAULT_HELPER_IMAGE,
) -> tuple[RunReport, EngineResult]:
    """Run a task, and keep everything in the engine.

    Parameters
    ----------
    payload
        Of which `plan` was made.
    secrets
        For the names of the plan's `secret_env`, in their order.
    helper_image
        Lends its busybox to images without a shell.

    Raises
    ------
    ValueError
        When a secret is missing, or there is one too many.
    """
    given = _by_name(plan, secrets)
    values = dict(zip(given, await together(*(s.plaintext() for s in given.values())), strict=True))
    hidden = {**plan.secret_values, **values}
    run = _EngineRun(client, plan, workspace, given, hidden, helper_image)
    began = datetime.now(UTC)
    failure = None
    try:
        await run.run()
    except RunFailedError as error:
        failure = error
    engine = EngineInfo(kind="dagger", version=await client.version())
    warnings = [
        *warnings_of(payload),
        *run_warnings(plan, hidden=run.hidden, engine=engine),
        *run.warnings,
    ]
    if plan.pull is PullMode.ALWAYS and "@" not in plan.image:
        warnings.append(
            "pull: always is not kept: the engine takes the digest that it knows for a tag; "
            "name a digest in --image"
        )
    result = run.result
    published = run.masker.mask_json(publishable(payload))
    result.payload = json.dumps(published, indent=2, ensure_ascii=False) + "\n"
    findings = Findings(
        began=began,
        ending=run.execution.ending if run.execution else None,
        failure=failure,
        engine=engine,
        reference=result.image.reference if result.image else plan.image,
        last_line=last_line(result.log_tail),
        timings=Timings(**run.seconds),
        workspace=WorkspaceInfo(
            files=None, bytes=None, uploaded_bytes=None, written_back=run.changes
        ),
        source=Source(repository=plan.repository),
        warnings=warnings,
        artifacts=run.artifacts,
        log=run.log,
        trace_id=_trace_id(),
    )
    return make_report(plan, findings, run.masker), result


@dataclass(slots=True)
class _EngineRun:
    """A run while it happens.

    Attributes
    ----------
    hidden
        The secrets' values, by name.
    """

    client: dagger.Client
    plan: Plan
    workspace: dagger.Directory
    secrets: Mapping[str, dagger.Secret]
    hidden: Mapping[str, str]
    helper_image: str
    masker: Masker = field(init=False)
    result: EngineResult = field(init=False)
    execution: Execution | None = None
    artifacts: Artifacts = field(default_factory=Artifacts)
    changes: WrittenBack | None = None
    log: LogInfo = field(default_factory=LogInfo)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.masker = Masker(self.hidden.values())
        empty = self.client.directory()
        self.result = EngineResult(self.client.file("log", ""), empty, empty, empty)

    async def run(self) -> None:
        client, plan, result = self.client, self.plan, self.result
        before, image = await together(self._send(), self._resolve())
        result.image, result.before, result.after = image, before, before
        result.prepared = prepare(client, plan, image, before, self.secrets)
        with self._phase("execute"):
            self.execution = await run_command(client, plan, image, before, self.secrets)
        result.finished = self.execution.container
        with self._phase("export"):
            await together(self._keep_log(), self._keep_artifacts(), self._keep_changes())

    async def _send(self) -> dagger.Directory:
        chosen = self.plan.workspace
        directory = self.workspace
        if chosen.include or chosen.exclude or chosen.gitignore:
            directory = directory.filter(
                include=chosen.include, exclude=chosen.exclude, gitignore=chosen.gitignore
            )
        with self._phase("workspace"), engine_failures("sending the workspace"):
            return await directory.sync()

    async def _resolve(self) -> Image:
        with self._phase("image"):
            return await resolve_image(self.client, self.plan.image, helper_image=self.helper_image)

    async def _keep_log(self) -> None:
        assert self.execution is not None
        log, total = self.execution.log, self.execution.log_bytes
        if log is None:
            text = self.masker.mask(self.execution.lost_output)
            self.log = LogInfo(bytes=len(text.encode()), truncated=True)
            self.warnings.append(ALL_KILLED)
        else:
            text = await self._read(log, total)
            self.log = LogInfo(bytes=total, truncated=total > LOG_LIMIT_BYTES)
        # Where there is nothing to hide the log stays the engine's own file, byte for
        # byte; text that went through the API is UTF-8.
        whole = log is not None and not self.hidden and not self.log.truncated
        self.result.log = log if whole and log else self.client.file("runner.log", text)
        self.result.log_tail = text[-_TAIL_CHARACTERS:]

    async def _read(self, log: dagger.File, total: int) -> str:
        """Give a log as text, masked."""
        if total <= LOG_LIMIT_BYTES:
            with engine_failures("reading the log"):
                return self.masker.mask(await log.contents())
        assert self.result.image is not None
        half = LOG_LIMIT_BYTES // 2
        ends = await log_excerpt(self.client, self.result.image, log, head=half, tail=half)
        with engine_failures("reading the log"):
            head, tail = await together(ends.file("head").contents(), ends.file("tail").contents())
        # The first is not finished: at the cut it may hold the first half of a secret.
        stream = self.masker.stream(after_cut=True)
        parts = [
            self.masker.stream().feed(head.encode()),
            cut_mark(total),
            stream.feed(tail.encode()),
            stream.finish(),
        ]
        return b"".join(parts).decode("utf-8", "replace")

    async def _keep_artifacts(self) -> None:
        execution, image, rules = self.execution, self.result.image, self.plan.artifacts
        assert execution is not None
        assert image is not None
        if execution.container is None:
            return
        directory = execution.container.directory(self.plan.artifact_dir)
        if rules.include or rules.exclude:
            directory = directory.filter(include=rules.include, exclude=rules.exclude)
        found = judge(await list_entries(self.client, image, directory), rules)
        self.result.artifacts = without(directory, found.refused)
        for path, reason in execution.removed_below(self.plan.artifact_dir):
            found.refused.setdefault(readable(path), reason)
        self.artifacts = found

    async def _keep_changes(self) -> None:
        execution, image = self.execution, self.result.image
        assert execution is not None
        assert image is not None
        if execution.container is None:
            return
        # Hooks and configuration in a .git are code that would run outside.
        no_git = ["**/.git"]
        before = self.result.before.filter(exclude=no_git)
        after = execution.container.directory(self.plan.repo_dir).filter(exclude=no_git)
        entries = await list_entries(self.client, image, after.changes(before).layer())
        refused = {
            entry.path: reason
            for entry in entries
            if entry.target and (reason := refuse_link(entry.path, entry.target))
        }
        after = without(after, refused)
        changes = after.changes(before)
        with engine_failures("comparing the workspace"):
            added, modified, removed = await together(
                changes.added_paths(), changes.modified_paths(), changes.removed_paths()
            )
        for path, reason in execution.removed_below(self.plan.repo_dir):
            if not in_git(path):
                refused.setdefault(readable(path), reason)
        self.changes = WrittenBack(added=added, modified=modified, removed=removed, refused=refused)
        self.result.before, self.result.after = before, after

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(monotonic() - began, 3)


def _by_name(plan: Plan, secrets: Sequence[dagger.Secret]) -> dict[str, dagger.Secret]:
    """Match secrets with the names of `secretEnv`: Dagger has no maps."""
    names = list(plan.secret_env)
    if len(secrets) != len(names):
        wanted = ", ".join(f"{name} ({ref})" for name, ref in plan.secret_env.items()) or "none"
        missing = ", ".join(names[len(secrets) :])
        fault = f"missing: {missing}" if missing else f"{len(secrets) - len(names)} too many"
        raise ValueError(
            f"secrets: one for each name of secretEnv, in its order: {wanted}; {fault}"
        )
    return dict(zip(names, secrets, strict=True))


def _trace_id() -> str:
    """Give the trace that this call is part of, as Dagger's own traces name it."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else uuid4().hex
