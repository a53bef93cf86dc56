"""Secrets never leave the process: text is masked before it is written anywhere.

A streaming replacer in the manner of buildkite-agent's: what may be the start of
a secret is held back until it is known, so a secret that is split over two
chunks is found too.
"""

import base64
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus

MASK = b"***"

MIN_SECRET_LENGTH = 6
"""Characters. Masking anything shorter would spoil ordinary text and give away
the secret by its absence; who has one is warned instead."""

# Lines of a key have 64 or 76 characters, and of its last line fewer than 16 give
# away next to nothing. In other files of secrets, lines as short as that are mostly
# `}` or `[default]`, which masked would spoil ordinary text.
_MIN_LINE_LENGTH = 16

# `base64` breaks its lines, at 64 or at 76, and where a line ends no form can know.
_LINE_BREAK = rb"\r?\n?"
_LINE_BREAK_LENGTH = 2


def too_short(secret: str) -> bool:
    """Whether a secret is too short to be masked; blanks around it do not count."""
    return len(secret.strip()) < MIN_SECRET_LENGTH


def _encoded(text: str) -> bytes:
    # Surrogates stand for the bytes of a variable that is not UTF-8.
    return text.encode("utf-8", "surrogateescape")


def _base64_forms(value: bytes) -> Iterator[bytes]:
    """Give what is constant of `value` in base64, wherever it stands in a longer text.

    Three bytes become four characters, so there are three alignments. The
    characters at both ends also depend on the neighbours and are left out.
    """
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + value)
        # Ceiling of before * 8 / 6: the first character that no neighbour touches.
        start = (0, 2, 3)[before]
        whole = (before + len(value)) * 8 // 6
        if whole - start >= MIN_SECRET_LENGTH:
            yield encoded[start:whole]


def _wrappable(form: bytes) -> bytes:
    """Give the pattern of a base64 form, of either alphabet and in lines of any length."""
    either = {ord("+"): rb"[+-]", ord("/"): rb"[/_]"}
    return _LINE_BREAK.join(either.get(byte, bytes([byte])) for byte in form)


def _plain_forms(secret: str) -> set[bytes]:
    """Give every form in which a secret is looked for, but base64."""
    value = _encoded(secret)
    escaped = {quote(value, safe=""), quote(value), quote_plus(value)}
    lowered = {re.sub(r"%[0-9A-F]{2}", lambda m: m[0].lower(), form) for form in escaped}
    texts = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    # As they are only: with base64 of each, a key would slow the search down tenfold,
    # and in base64 it is mostly printed whole.
    lines = {line.strip() for line in secret.split("\n") if len(line.strip()) >= _MIN_LINE_LENGTH}
    return {value, *map(_encoded, escaped | lowered | texts | lines)}


def _order(form: bytes) -> tuple[int, int, bytes]:
    """Sort longest first, so that a secret which begins with another is taken whole.

    Line breaks do not count: base64 may or may not have them.
    """
    return -len(form.translate(None, b"\r\n")), -len(form), form


class Masker:
    """Finds secrets in text.

    Parameters
    ----------
    secrets:
        The values. Those shorter than `MIN_SECRET_LENGTH` are not masked. Of one
        with several lines each longer line is masked on its own too.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        plain: set[bytes] = set()
        wrappable: set[bytes] = set()
        for secret in secrets:
            if not too_short(secret):
                # With the blanks around it, one that is printed without them would show.
                core = secret.strip()
                plain |= _plain_forms(core)
                wrappable |= set(_base64_forms(_encoded(core)))
        patterns = {form: re.escape(form) for form in plain}
        patterns |= {form: _wrappable(form) for form in wrappable}
        ordered = [patterns[form] for form in sorted(patterns, key=_order)]
        self._pattern = re.compile(b"|".join(ordered)) if ordered else None
        wrapped = (len(form) + _LINE_BREAK_LENGTH * (len(form) - 1) for form in wrappable)
        self._longest = max([*map(len, plain), *wrapped], default=0)

    def mask(self, text: str) -> str:
        """Give `text` without the secrets."""
        stream = self.stream()
        data = text.encode("utf-8", "surrogateescape")
        return (stream.feed(data) + stream.finish()).decode("utf-8", "surrogateescape")

    def mask_json(self, value: Any) -> Any:
        """Give JSON data with its texts masked, but not its keys: those are the contract's."""
        match value:
            case str():
                return self.mask(value)
            case list():
                return [self.mask_json(item) for item in value]
            case dict():
                return {key: self.mask_json(item) for key, item in value.items()}
            case _:
                return value

    def stream(self, *, after_cut: bool = False) -> "MaskingStream":
        """Start a stream of bytes that is masked as it goes by.

        Parameters
        ----------
        after_cut
            The stream begins in the middle of something: its first bytes may be the
            end of a secret, and are left out.
        """
        covered = max(self._longest - 1, 0) if after_cut else 0
        return MaskingStream(self._pattern, self._longest, covered)


class MaskingStream:
    """Masks one stream of bytes, chunk by chunk; made by `Masker.stream`."""

    def __init__(self, pattern: re.Pattern[bytes] | None, longest: int, covered: int) -> None:
        self._pattern = pattern
        self._longest = longest
        self._held = b""
        # Bytes at the start of what is held that are not to be shown any more.
        self._covered = covered

    def feed(self, chunk: bytes) -> bytes:
        """Give what can be shown after `chunk`.

        Fewer bytes are held back than the longest form of a secret has, which is
        base64 with a line break behind every character.
        """
        if self._pattern is None:
            return chunk
        data = self._held + chunk
        # A match that begins before `safe` is here as a whole; a later one may
        # still turn out to be another, longer one.
        safe = max(len(data) - self._longest + 1, 0)
        return self._scan(self._pattern, data, safe)

    def finish(self) -> bytes:
        """Give what was held back: the stream has ended.

        Not to be called where it was cut: what is held back may be half a secret.
        """
        if self._pattern is None:
            return b""
        return self._scan(self._pattern, self._held, len(self._held))

    def _scan(self, pattern: re.Pattern[bytes], data: bytes, safe: int) -> bytes:
        shown: list[bytes] = []
        position = self._covered
        # Not finditer: matches that overlap are masked as one, or the rest of the
        # second would show.
        begin = 0
        while (match := pattern.search(data, begin)) and match.start() < safe:
            if match.start() >= position:
                shown += (data[position : match.start()], MASK)
            position = max(position, match.end())
            begin = match.start() + 1
        if position < safe:
            shown.append(data[position:safe])
        self._held = data[safe:]
        self._covered = max(position - safe, 0)
        return b"".join(shown)
