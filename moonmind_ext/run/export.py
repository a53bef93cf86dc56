"""What a command left in the engine comes out: fetched, checked, masked."""

from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio.to_thread
import dagger

from moonmind_ext.run.archive import ArchiveError, unpack
from moonmind_ext.run.collect import check_artifacts
from moonmind_ext.run.log import write_excerpt, write_log
from moonmind_ext.workspace.send import Size
from moonmind_ext.workspace.tree import remove_tree
from moonmind_ext.workspace.write_back import Changed, write_back
from pipelines.artifacts import in_git, readable
from pipelines.concurrency import together
from pipelines.container_task import (
    Execution,
    Image,
    engine_failures,
    lend_busybox,
    list_names,
    log_excerpt,
    pack,
)
from pipelines.masking import Masker
from pipelines.plan import Plan
from pipelines.report import ALL_KILLED, Artifacts, EngineFailedError, LogInfo, WrittenBack

ARCHIVE_FILES = 2_000
"""From here on the artifacts come as one archive. An export of some 6,500 files and more
can wait for ever, the sooner the larger they are (dagger/dagger#6355). Below, it never did,
and is 0.1 s sooner here than an archive."""


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
    before, size
        The workspace as it was sent.
    workspace
        Where changes go.
    log_limit_bytes
        A longer log comes as its head and tail.
    helper_image
        Lends its busybox to images without `tar`.
    archives
        Whether many files come as one archive; the embedded engine has no need of it.
    """

    client: dagger.Client
    plan: Plan
    image: Image
    before: dagger.Directory
    size: Size
    workspace: Path
    masker: Masker
    log_limit_bytes: int
    helper_image: str
    archives: bool

    async def export(self, execution: Execution, results: Results, staging: Path) -> None:
        """Bring everything out.

        Parameters
        ----------
        results
            Filled in as things arrive, so that a failure in the middle keeps the rest.
        staging
            An empty directory, on the file system of the output. It gets `artifacts`,
            which holds nothing that was not checked, and `runner.log`.

        Raises
        ------
        EngineFailedError
            When the engine fails meanwhile.
        OSError
            When something cannot be written.
        """
        if execution.container is None:
            self._lost(execution, results, staging / "runner.log")
            return
        (staging / "log").mkdir()
        results.log, results.artifacts = await together(
            self._log(execution, staging), self._artifacts(execution, staging)
        )
        # Not beside the others: what it changes is the user's own.
        if self.plan.write_back:
            results.written_back = await self._changes(execution, results)

    def _lost(self, execution: Execution, results: Results, log: Path) -> None:
        text = self.masker.mask(execution.lost_output)
        log.write_text(text, encoding="utf-8", errors="replace")
        results.log = LogInfo(bytes=log.stat().st_size, truncated=True)
        results.warnings.append(ALL_KILLED)

    async def _artifacts(self, execution: Execution, staging: Path) -> Artifacts:
        assert execution.container is not None
        rules, unchecked = self.plan.artifacts, staging / "unchecked"
        directory = execution.container.directory(self.plan.artifact_dir)
        if rules.include or rules.exclude:
            directory = directory.filter(include=rules.include, exclude=rules.exclude)
        with engine_failures("bringing the artifacts back"):
            await self._bring(directory, unchecked, execution.files)
        unchecked.mkdir(exist_ok=True)
        artifacts = await anyio.to_thread.run_sync(check_artifacts, unchecked, rules)
        for path, reason in execution.removed_below(self.plan.artifact_dir):
            artifacts.refused.setdefault(readable(path), reason)
        unchecked.rename(staging / "artifacts")
        return artifacts

    async def _bring(
        self, directory: dagger.Directory, target: Path, files: int | None = None
    ) -> None:
        """Bring a directory out: as an archive where it has many files, if that can be.

        Parameters
        ----------
        files
            How many it has, about; None where nobody has counted.
        """
        if self.archives:
            if files is None:
                files = len(await directory.glob("**"))
            if files >= ARCHIVE_FILES and await self._unpacked(directory, target):
                return
        await directory.export(str(target))

    async def _unpacked(self, directory: dagger.Directory, target: Path) -> bool:
        """Bring a directory as one archive; what cannot be leaves nothing at the target."""
        if await self._unpacked_by(self.image, directory, target):
            return True
        if self.image.busybox:
            # That was the helper image's.
            return False
        # Most images have a good tar, so nobody may have made the helper image available.
        with suppress(EngineFailedError):
            lent = await lend_busybox(self.client, self.image, self.helper_image)
            return await self._unpacked_by(lent, directory, target)
        return False

    async def _unpacked_by(self, image: Image, directory: dagger.Directory, target: Path) -> bool:
        packed = await pack(self.client, image, directory)
        if packed is None:
            return False
        archive = target.with_name("archive")
        await packed.export(str(archive))
        # As an export makes it.
        target.mkdir(mode=0o700)
        try:
            await anyio.to_thread.run_sync(unpack, archive, target)
        except ArchiveError:
            await anyio.to_thread.run_sync(remove_tree, target)
            return False
        finally:
            archive.unlink()
        return True

    async def _log(self, execution: Execution, staging: Path) -> LogInfo:
        assert execution.log is not None
        total, limit = execution.log_bytes, self.log_limit_bytes
        raw, masked = staging / "log" / "raw", staging / "runner.log"
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

    async def _changes(self, execution: Execution, results: Results) -> WrittenBack:
        assert execution.container is not None
        assert execution.names is not None
        changed = Changed(
            before=self.before,
            after=execution.container.directory(self.plan.repo_dir),
            names=execution.names,
            stamps=self.size.stamps,
            is_whole=self.size.files is not None,
            list_sent=partial(list_names, self.client, self.image, self.before),
            bring=self._bring,
        )
        with engine_failures("bringing the changes back"):
            written_back, commits = await write_back(changed, self.workspace)
        if commits:
            results.warnings.append(
                "the command made commits or branches: .git does not come back, so they are lost"
            )
        for path, reason in execution.removed_below(self.plan.repo_dir):
            if not in_git(path):
                written_back.refused.setdefault(readable(path), reason)
        return written_back
