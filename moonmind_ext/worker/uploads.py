"""A job's files to the queue. What cannot be stored is said, and fails no job."""

import hashlib
import mimetypes
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread

from moonmind_ext.worker.claim import pause_after
from moonmind_ext.worker.queue import QueueClient, QueueError
from pipelines.concurrency import task_group
from pipelines.masking import Masker

PART_BYTES = 10 << 20
"""MoonMind's limit for one file. A larger one goes in parts, joined again by `cat`."""

LEAST_PART_BYTES = 64 << 10
"""A server that refuses even this has another fault than a lower limit."""

PART_TYPE = "application/octet-stream"
"""Of a part, whatever the file is."""

MAX_NAME_LENGTH = 512
"""Characters, in MoonMind's database."""

NAME_TOO_LONG = "its name is too long for the server"
NAME_TAKEN = "another file has this name already"

AT_ONCE = 4
"""Files on their way at the same time: small ones mostly wait for an answer."""

ALL_SECONDS = 1800.0
"""For all files of a job. Its slot is taken as long, and its end not told: what is not
stored by then is said to be missing."""

PATIENCE_SECONDS = 180.0
"""For a server that is away, from the first call that failed: three times what a
restart takes. Then the file is given up, and so are those after it, quickly."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A file to store, and under which name."""

    path: Path
    name: str

    @property
    def content_type(self) -> str:
        """What browsers are told that it is."""
        if self.path.suffix == ".log":
            return "text/plain"
        return mimetypes.guess_type(self.path.name)[0] or PART_TYPE

    def name_for_all(self, masker: Masker) -> str:
        """Give the name that it may be stored under.

        Commands put secrets into names too; and a name may be no UTF-8.
        """
        return masker.mask(self.name).encode("utf-8", "replace").decode()


@dataclass(slots=True)
class Uploaded:
    """What became of a job's files, where it is not just that they are there.

    Attributes
    ----------
    parts
        By name, how many parts a file was stored in.
    missing
        By name, why a file was not stored.
    """

    parts: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def job_files(artifacts: Path, subdir: str) -> list[Upload]:
    """List what a job has to store, the logs first; blocking.

    Parameters
    ----------
    artifacts
        The job's directory of artifacts.
    subdir
        Below it, where all is stored. Of the rest the logs, and the stages' own files.
    """
    first = [*sorted((artifacts / "logs").glob("*.log")), *sorted(artifacts.glob("*.json"))]
    files = [path for path in first if path.is_file() and not path.is_symlink()]
    files += _walk(artifacts / subdir)
    listed = dict.fromkeys(files)
    return [Upload(path, os.fsdecode(path.relative_to(artifacts))) for path in listed]


def is_too_long(name: str) -> bool:
    """Whether the server does not take a name, or not those of its parts."""
    return len(name) > MAX_NAME_LENGTH - len(".part-0000")


def part_names(name: str, size: int, part: int = PART_BYTES) -> list[str]:
    """Name the parts that a file is stored in; one that fits in one keeps its name."""
    count = -(-size // part)
    return [f"{name}.part-{number:04}" for number in range(1, count + 1)] if count > 1 else [name]


def read_part(path: Path, index: int, part: int = PART_BYTES) -> bytes:
    """Read one of a file's parts, the first at 0; blocking."""
    with path.open("rb") as file:
        file.seek(index * part)
        return file.read(part)


def _walk(root: Path) -> Iterator[Path]:
    if root.is_symlink():
        return
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            # Links stay here: what they lead to is stored under its own name.
            if path.is_file() and not path.is_symlink():
                yield path


class Uploader:
    """Stores the files of one job."""

    def __init__(self, queue: QueueClient, job_id: str, masker: Masker) -> None:
        self._queue = queue
        self._job_id = job_id
        self._masker = masker
        self._uploaded = Uploaded()
        # As the server has them. It would overwrite the first of two files.
        self._names: set[str] = set()
        self._done: set[Upload] = set()
        # When the server is no longer waited for, by anyio's clock; while it answers, never.
        self._patience = float("inf")

    async def upload(self, files: list[Upload]) -> Uploaded:
        """Store all of them, some at a time."""
        limiter = anyio.CapacityLimiter(AT_ONCE)

        async def one(file: Upload) -> None:
            async with limiter:
                await self._upload(file)
            self._done.add(file)

        with anyio.move_on_after(ALL_SECONDS):
            async with task_group() as tasks:
                for file in files:
                    tasks.start_soon(one, file)
        for file in files:
            if file not in self._done:
                name = file.name_for_all(self._masker)
                self._uploaded.missing.setdefault(name, "there was no time left for it")
        return self._uploaded

    async def _upload(self, file: Upload) -> None:
        name = file.name_for_all(self._masker)
        try:
            size = file.path.stat().st_size
            if not size:
                # The server stores no empty files; that there was one is in `run.json`.
                return
            if is_too_long(name):
                self._uploaded.missing[name] = NAME_TOO_LONG
            elif name.strip() in self._names:
                # Masking can make two names one.
                self._uploaded.missing[name] = NAME_TAKEN
            else:
                self._names.add(name.strip())
                await self._send(file, name, size)
        except QueueError as error:
            self._uploaded.missing[name] = str(error)
        except OSError as error:
            # Without the path, which has the name as it is.
            self._uploaded.missing[name] = error.strerror or type(error).__name__

    async def _send(self, file: Upload, name: str, size: int) -> None:
        part = PART_BYTES
        while True:
            try:
                await self._send_parts(file, name, size, part)
            except QueueError as error:
                refused = min(part, size)
                if not error.is_too_large or refused <= LEAST_PART_BYTES:
                    raise
                part = max(refused // 2, LEAST_PART_BYTES)
            else:
                return

    async def _send_parts(self, file: Upload, name: str, size: int, part: int) -> None:
        names = part_names(name, size, part)
        for index, part_name in enumerate(names):
            content = await anyio.to_thread.run_sync(read_part, file.path, index, part)
            digest = hashlib.sha256(content).hexdigest()
            await self._patiently(
                content,
                {
                    "name": part_name,
                    "contentType": file.content_type if len(names) == 1 else PART_TYPE,
                    "digest": f"sha256:{digest}",
                },
            )
        if len(names) > 1:
            self._uploaded.parts[name] = len(names)

    async def _patiently(self, content: bytes, fields: dict[str, str]) -> None:
        attempt = 0
        while True:
            attempt += 1
            if anyio.current_time() >= self._patience:
                raise QueueError("the server was waited for long enough, for the files before")
            try:
                await self._queue.upload(self._job_id, content, fields)
            except QueueError as error:
                if not error.may_pass:
                    raise
                now = anyio.current_time()
                self._patience = min(self._patience, now + PATIENCE_SECONDS)
                if now >= self._patience:
                    raise
                await anyio.sleep(pause_after(attempt))
            else:
                self._patience = float("inf")
                return
