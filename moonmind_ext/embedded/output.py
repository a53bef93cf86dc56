"""What a command prints: masked, kept on the disk, passed on while it runs."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

MASK = b"***"

MAX_TEXT_BYTES = 100 << 20
"""The most that `stdout` and the like give as a string. More has no place in a
GraphQL answer; as a redirected file it has no limit."""

ERROR_TEXT_BYTES = 100 << 10
"""The end of the output that an exec error carries."""

STDOUT, STDERR = 1, 2


class Masker:
    """Replaces secret values in a stream, also those split over two chunks."""

    def __init__(self, values: Iterable[str]) -> None:
        self._values = sorted({v.encode() for v in values if v}, key=len, reverse=True)
        self._regex = re.compile(b"|".join(map(re.escape, self._values)))
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """Take a chunk; give what is certain by now."""
        if not self._values:
            return chunk
        data = self._held + chunk
        hold = self._undecided(data)
        out, at = [], 0
        # A value that begins before the undecided end is one, whatever comes.
        for match in self._regex.finditer(data):
            if match.start() >= hold:
                break
            out += [data[at : match.start()], MASK]
            at = match.end()
        hold = max(hold, at)
        self._held = data[hold:]
        return b"".join([*out, data[at:hold]])

    def finish(self) -> bytes:
        """Give the rest."""
        rest, self._held = self._held, b""
        return self._regex.sub(MASK, rest) if self._values else rest

    def _undecided(self, data: bytes) -> int:
        """Find where a value may have begun that has not ended."""
        longest = len(self._values[0])
        for start in range(max(0, len(data) - longest + 1), len(data)):
            tail = data[start:]
            if any(len(tail) < len(value) and value.startswith(tail) for value in self._values):
                return start
        return len(data)


class Capture:
    """The output of one command, in files of one directory.

    Memory stays small whatever is printed. All methods block.

    Parameters
    ----------
    folder
        Where the files go.
    secrets
        Values to mask.
    live
        Takes what is printed while it is printed, with its stream; must not block.
    """

    def __init__(
        self, folder: Path, secrets: Iterable[str], live: Callable[[int, bytes], None]
    ) -> None:
        values = list(secrets)
        self._maskers = {stream: Masker(values) for stream in (STDOUT, STDERR)}
        self._live = live
        self._paths = {STDOUT: folder / "stdout", STDERR: folder / "stderr"}
        self.combined_path = folder / "combined"
        self._files: dict[int, BinaryIO] = {}
        self._both: BinaryIO

    def __enter__(self) -> Self:
        self._files = {stream: path.open("xb") for stream, path in self._paths.items()}
        self._both = self.combined_path.open("xb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for stream, masker in self._maskers.items():
            self._keep(stream, masker.finish())
        for file in (*self._files.values(), self._both):
            file.close()

    def write(self, stream: int, chunk: bytes) -> None:
        """Take what the command printed."""
        self._keep(stream, self._maskers[stream].feed(chunk))

    def _keep(self, stream: int, data: bytes) -> None:
        if not data:
            return
        self._files[stream].write(data)
        # Beyond the limit nobody can ask for it.
        if self._both.tell() <= MAX_TEXT_BYTES:
            self._both.write(data)
        self._live(stream, data)

    def path(self, stream: int) -> Path:
        """Say where a stream is kept."""
        return self._paths[stream]

    def end(self, stream: int) -> str:
        """Give the last `ERROR_TEXT_BYTES`, as an error carries them."""
        with self._paths[stream].open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - ERROR_TEXT_BYTES))
            return file.read().decode(errors="replace").strip()


def read_text(path: Path) -> str:
    """Read a file as text; what is not UTF-8 becomes U+FFFD. Blocking.

    Raises
    ------
    ValueError
        When it is longer than `MAX_TEXT_BYTES`.
    """
    size = path.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise ValueError(
            f"{size} bytes are too many for one string (at most {MAX_TEXT_BYTES >> 20} MiB): "
            "export the file, or redirect the output to one"
        )
    return path.read_bytes().decode(errors="replace")
