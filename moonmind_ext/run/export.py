"""What a command left in the engine comes out: fetched, checked, masked."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread
import dagger

from moonmind_ext.run.collect import check_artifacts
from moonmind_ext.run.log import write_excerpt, write_log
from moonmind_ext.workspace.write_back import Changes, apply_changes
from pipelines.artifacts import SETUID_CLEARED, SPECIAL_REMOVED, in_git, readable
from pipelines.concurrency import together
from pipelines.container_task import Execution, Image, engine_failures, log_excerpt
from pipelines.masking import Masker
from pipelines.plan import Plan
from pipelines.report import Artifacts, LogInfo, WrittenBack

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(slots=True)
class Results:
    """What came out of the engine.

    Attributes
    ----------
    warnings
        What did not, and why.
    """

    artifacts: Artifacts = field(default_factory=Artifacts)
    log: LogInfo = field(default_factory=LogInfo)
    written_back: WrittenBack | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exporter:
    """Brings the results of one run out of the engine.

    Attributes
    ----------
    before
        The workspace as it was sent.
    workspace
        Where changes go.
    log_limit_bytes
        A longer log comes as its head and tail.
    """

    client: dagger.Client
    plan: Plan
    image: Image
    before: dagger.Directory
    workspace: Path
    masker: Masker
    log_limit_bytes: int

    async def export(self, execution: Execution, artifacts: Path, staging: Path) -> Results:
        """Bring everything out.

        Parameters
        ----------
        artifacts
            Does not exist yet; gets the artifacts and `logs/runner.log`.
        staging
            A directory on the same file system, for files on their way.

        Raises
        ------
        EngineFailedError
            When the engine fails meanwhile.
        OSError
            When something cannot be written.
        """
        if execution.container is None:
            return self._lost(execution, artifacts)
        results = Results()
        (staging / "log").mkdir()
        results.artifacts, results.log, changes = await together(
            self._artifacts(execution.container, artifacts),
            self._log(execution, staging / "log"),
            self._changes(execution.container, results.warnings),
        )
        results.written_back = changes
        (artifacts / "logs").mkdir(exist_ok=True)
        (staging / "log" / "masked").replace(artifacts / "logs" / "runner.log")
        self._name_removed(execution, results)
        return results

    def _lost(self, execution: Execution, artifacts: Path) -> Results:
        log = artifacts / "logs" / "runner.log"
        log.parent.mkdir(parents=True)
        log.write_text(self.masker.mask(execution.lost_output), encoding="utf-8")
        return Results(
            log=LogInfo(bytes=log.stat().st_size, truncated=True),
            warnings=[
                (
                    "everything in the container was killed at once (by the command itself, or "
                    "for want of memory): its artifacts are lost and its log may be cut"
                )
            ],
        )

    async def _artifacts(self, container: dagger.Container, target: Path) -> Artifacts:
        rules = self.plan.artifacts
        directory = container.directory(self.plan.artifact_dir)
        if rules.include or rules.exclude:
            directory = directory.filter(include=rules.include, exclude=rules.exclude)
        with engine_failures("bringing the artifacts back"):
            await directory.export(str(target))
        target.mkdir(exist_ok=True)
        return await anyio.to_thread.run_sync(check_artifacts, target, rules)

    async def _log(self, execution: Execution, folder: Path) -> LogInfo:
        assert execution.log is not None
        total, limit = execution.log_bytes, self.log_limit_bytes
        raw, masked = folder / "raw", folder / "masked"
        with engine_failures("bringing the log back"):
            if total <= limit:
                await execution.log.export(str(raw))
                await anyio.to_thread.run_sync(write_log, raw, masked, self.masker)
                return LogInfo(bytes=total)
            half = limit // 2
            ends = await log_excerpt(self.client, self.image, execution.log, head=half, tail=half)
            await ends.export(str(raw))
        await anyio.to_thread.run_sync(
            write_excerpt, raw / "head", raw / "tail", masked, self.masker, total
        )
        return LogInfo(bytes=total, truncated=True)

    async def _changes(
        self, container: dagger.Container, warnings: list[str]
    ) -> WrittenBack | None:
        if not self.plan.write_back:
            return None
        changeset = container.directory(self.plan.repo_dir).changes(self.before)
        # Beside the files themselves, so that each can be moved into its place.
        with (
            tempfile.TemporaryDirectory(prefix=".moonmind-", dir=self.workspace) as folder,
            engine_failures("bringing the changes back"),
        ):
            staging = Path(folder) / "changes"
            *paths, _ = await together(
                changeset.added_paths(),
                changeset.modified_paths(),
                changeset.removed_paths(),
                changeset.layer().filter(exclude=["**/.git"]).export(str(staging)),
            )
            changes = Changes(*map(tuple, paths))
            if changes.commits():
                warnings.append(
                    "the command made commits or branches: .git does not come back, "
                    "so they are lost"
                )
            return await anyio.to_thread.run_sync(
                apply_changes, staging, self.workspace, changes.without_git()
            )

    def _name_removed(self, execution: Execution, results: Results) -> None:
        """Name what the supervisor took out before it could travel."""
        places = [(f"{self.plan.artifact_dir}/", results.artifacts.refused)]
        if results.written_back is not None:
            places.append((f"{self.plan.repo_dir}/", results.written_back.refused))
        for path, reason in _removed(execution):
            for root, refused in places:
                name = path.removeprefix(root)
                if name != path and not in_git(name):
                    refused.setdefault(readable(name), reason)


def _removed(execution: Execution) -> "Iterator[tuple[str, str]]":
    for path in execution.specials:
        yield path, SPECIAL_REMOVED
    for path in execution.setuid:
        yield path, SETUID_CLEARED
