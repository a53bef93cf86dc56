"""`execute.log`: what the stage did, in a few lines, for whoever reads a failed job."""

from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pipelines.masking import Masker


class StageLog:
    """Writes masked lines with their time; open for the duration of the context."""

    def __init__(self, path: Path, masker: Masker) -> None:
        self._path = path
        self._masker = masker

    def __enter__(self) -> Self:
        """Create the file, and its directory."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8", errors="replace")
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    def line(self, text: str) -> None:
        """Write a line; it is on disk when this returns."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._file.write(f"{now} {self._masker.mask(text)}\n")
        self._file.flush()
