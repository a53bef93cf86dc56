"""The command's output on its way to people: as it is printed, and afterwards whole."""

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import anyio

from moonmind_ext.run.events import LOG, Event
from pipelines.masking import Masker, MaskingStream
from pipelines.report import cut_mark

SETTLE_SECONDS = 1.0
"""For records of output that is complete already: the engine sends them 0.1 s
after it was written. Some never come (text that is not UTF-8)."""

_TAIL_BYTES = 8192
_CHUNK_BYTES = 1 << 20


class LiveOutput:
    """Masks live text and gives it on as log events."""

    def __init__(self, masker: Masker, emit: Callable[[Event], None]) -> None:
        self._stream = masker.stream()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._emit = emit
        self._offset = 0
        self._received = 0
        self._expected: int | None = None
        self._complete = anyio.Event()

    def feed(self, text: str) -> None:
        """Take a piece of output, as the engine sends it."""
        data = text.encode("utf-8", "replace")
        self._received += len(data)
        self._show(self._stream.feed(data))
        self._check()

    async def settle(self, expected: int) -> int:
        """Wait for what is still on its way, then give what was held back.

        Parameters
        ----------
        expected
            Bytes that the command printed.

        Returns
        -------
        int
            How many of them never came.
        """
        self._expected = expected
        self._check()
        with anyio.move_on_after(SETTLE_SECONDS):
            await self._complete.wait()
        self.finish()
        return expected - self._received

    def _check(self) -> None:
        if self._expected is not None and self._received >= self._expected:
            self._complete.set()

    def finish(self) -> None:
        """Give what was held back: there is no more."""
        self._show(self._stream.finish(), final=True)

    def _show(self, data: bytes, *, final: bool = False) -> None:
        # What the masker holds back may begin in the middle of a character.
        if text := self._decoder.decode(data, final):
            self._emit(Event(LOG, {"stream": "stdout", "text": text, "offset": self._offset}))
            self._offset += len(text.encode())


def write_log(source: Path, target: Path, masker: Masker) -> None:
    """Copy a log, masked; blocking, for a worker thread."""
    with target.open("wb") as log:
        stream = masker.stream()
        _copy(source, log, stream)
        log.write(stream.finish())


def write_excerpt(head: Path, tail: Path, target: Path, masker: Masker, total_bytes: int) -> None:
    """Write both ends of a log that is over the limit, masked; blocking.

    Between them one line says that the rest is missing.
    """
    with target.open("wb") as log:
        # Not finished: at the cut it may hold the first half of a secret.
        _copy(head, log, masker.stream())
        log.write(cut_mark(total_bytes))
        stream = masker.stream(after_cut=True)
        _copy(tail, log, stream)
        log.write(stream.finish())


def _copy(source: Path, log: BinaryIO, stream: MaskingStream) -> None:
    with source.open("rb") as raw:
        while chunk := raw.read(_CHUNK_BYTES):
            log.write(stream.feed(chunk))


def end_of(log: Path) -> str:
    """Give the text of a log's last 8 KiB."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - _TAIL_BYTES, 0))
        return file.read().decode("utf-8", "replace")
