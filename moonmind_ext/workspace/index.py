"""Git's index as a witness: what is in files that nobody has touched since git wrote them.

The index holds, for each file, the id of its content and what the file system said of it
at that time. Where the file system still says the same, the file need not be read: that
is how git itself sees what has changed.
"""

import hashlib
import os
import re
import struct
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from moonmind_ext.workspace.git import GIT_SECONDS, command, environment
from moonmind_ext.workspace.manifest import Stamp, Stamps

WORTH_FILES = 1000
WORTH_BYTES = 8 << 20
"""Of a workspace. Asking git and reading its index takes as long as reading so much."""

_HEADER = struct.Struct(">4sII")
_ENTRY = struct.Struct(">10I20sH")
_VERSIONS = {2, 3}
_CHECKSUM_BYTES = 20
_PADDING = 8
_NAME_LENGTH = 0xFFF
_EXTENDED = 0x4000
_STAGE = 0x3000
_WORD = 1 << 32
_REGULAR = {0o100644, 0o100755}
_SECOND_NS = 1_000_000_000

ATTRIBUTES = ".gitattributes"
_SYSTEM_ATTRIBUTES = Path("/etc/gitattributes")
_CONVERTING = r"^(core\.(autocrlf|eol|attributesfile)|attr\.tree)$"
_SOMEWHERE_ELSE = b"link"
"""The extension of an index that is split over two files."""

# Everything else may make of one content in the repository another one on disk.
_HARMLESS = re.compile(
    rb"[-!]?(?:binary|diff|merge|delta|whitespace|conflict-marker-size|export-ignore|export-subst"
    rb"|linguist-[\w-]+|gitlab-[\w-]+)(?:=\S*)?|-text|-eol|-filter|-ident"
)


def vouched(root: Path, stamps: Stamps) -> dict[str, bytes]:
    """Give the content of files that are as git has stored them; blocking.

    Whoever writes to a repository's index can make it say what he likes: so this is for
    clones in which nobody but git has been.

    Nothing is believed where the repository converts content on its way to the disk
    (line ends, filters, keywords), or has an index of a kind that clones do not have.

    Parameters
    ----------
    root
        Of the checkout, absolute.
    stamps
        What the file system says now.

    Returns
    -------
    dict
        By path: what tells this content from others. Comparable between checkouts.
    """
    git_dir = root / ".git"
    try:
        # Before the index is read: whoever writes to it later cannot make it older.
        written = Stamp.of((git_dir / "index").lstat())
        if not written.is_file:
            return {}
        entries = dict(_entries((git_dir / "index").read_bytes()))
        if _converts(root, git_dir, entries, stamps):
            return {}
    except (OSError, ValueError, RuntimeError, struct.error, subprocess.SubprocessError):
        # No repository, or one to be read in the ordinary way; or a user without a home.
        return {}
    return {
        path: content
        for path, (seen, content) in entries.items()
        if (stamp := stamps.get(path)) is not None and _is_untouched(stamp, seen, written)
    }


_Seen = tuple[int, ...]
"""Of a file, as the index has it: ctime and mtime in seconds and nanoseconds, inode, size."""


def _entries(index: bytes) -> Iterator[tuple[str, tuple[_Seen, bytes]]]:
    """Read an index: of each plain file, how git saw it and what is in it.

    Raises
    ------
    ValueError
        When it is of another kind, or broken.
    """
    kind, version, count = _HEADER.unpack_from(index)
    body, checksum = index[:-_CHECKSUM_BYTES], index[-_CHECKSUM_BYTES:]
    # So also one of a repository with longer ids is seen.
    if (
        kind != b"DIRC"
        or version not in _VERSIONS
        or hashlib.sha1(body, usedforsecurity=False).digest() != checksum
    ):
        raise ValueError("an index of another kind")
    at = _HEADER.size
    for _ in range(count):
        *seen, blob, flags = _ENTRY.unpack_from(index, at)
        ctime, ctime_ns, mtime, mtime_ns, _, inode, mode, _, _, size = seen
        name = at + _ENTRY.size + (2 if flags & _EXTENDED else 0)
        length = flags & _NAME_LENGTH
        end = name + length if length < _NAME_LENGTH else index.index(b"\0", name)
        # An extended entry is one that is left out of the checkout, or not yet added.
        if mode in _REGULAR and not flags & (_EXTENDED | _STAGE):
            # The size says more than it seems: converted content has another one.
            content = blob + size.to_bytes(4, "big")
            yield (
                os.fsdecode(index[name:end]),
                ((ctime, ctime_ns, mtime, mtime_ns, inode, size), content),
            )
        # At least one NUL, up to a multiple of eight.
        at += (end - at + _PADDING) // _PADDING * _PADDING
    while at < len(body):
        kind, length = struct.unpack_from(">4sI", body, at)
        if kind == _SOMEWHERE_ELSE:
            raise ValueError("an index that is split")
        at += 8 + length


def _is_untouched(stamp: Stamp, seen: _Seen, index: Stamp) -> bool:
    """Whether a file is as git saw it, for sure."""
    ctime, mtime = stamp.ctime_ns, stamp.mtime_ns
    now = (
        ctime // _SECOND_NS % _WORD,
        ctime % _SECOND_NS,
        mtime // _SECOND_NS % _WORD,
        mtime % _SECOND_NS,
        stamp.inode % _WORD,
        stamp.size,
    )
    # One that was written in the same moment as the index may have changed after git
    # looked at it.
    return now == seen and stamp.is_file and max(ctime, mtime) < index.mtime_ns


def _converts(root: Path, git_dir: Path, entries: Iterable[str], stamps: Stamps) -> bool:
    """Whether files on disk may differ from what git has stored.

    Raises
    ------
    OSError, SubprocessError
        When it cannot be told.
    """
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    elsewhere = (git_dir / "info" / "attributes", home / "git" / "attributes", _SYSTEM_ATTRIBUTES)
    if any(path.exists() for path in elsewhere):
        return True
    for path in {path for path in (*entries, *stamps) if path.endswith(ATTRIBUTES)}:
        # A link or a pipe of that name is not to be opened.
        if path not in stamps or not stamps[path].is_file:
            return True
        if not _is_harmless((root / path).read_bytes()):
            return True
    answer = subprocess.run(
        command(git_dir, "config", "--get-regexp", _CONVERTING),
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env=environment(),
        timeout=GIT_SECONDS,
    )
    # 1 is for nothing found.
    return answer.returncode != 1


def _is_harmless(attributes: bytes) -> bool:
    # The first word is the pattern. Of one in quotes, with blanks in it, the rest is taken
    # for an attribute, and for none of the harmless ones.
    return all(
        _HARMLESS.fullmatch(word)
        for line in attributes.split(b"\n")
        if not line.lstrip().startswith(b"#")
        for word in line.split()[1:]
    )
