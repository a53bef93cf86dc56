"""`execute.log`: what the stage did, in a few lines, for whoever reads a failed job."""

from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pipelines.masking import Masker


class StageLog:
    """Writes masked lines with their time; creates the file, and its directory.

    To be closed by its context.

    Raises
    ------
    OSError
        When the file cannot be written.
    """

    def __init__(self, path: Path, masker: Masker) -> None:
        self._masker = masker
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", errors="replace")

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    def text(self, text: str) -> None:
        """Write what a program printed, indented, without its blank lines.

        Masked as a whole: a secret may be of several lines.
        """
        for line in self._masker.mask(text).splitlines():
            if line.strip():
                self.line(f"  {line}")

    def line(self, text: str) -> None:
        """Write a line; it is on disk when this returns."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._file.write(f"{now} {self._masker.mask(text)}\n")
        self._file.flush()
