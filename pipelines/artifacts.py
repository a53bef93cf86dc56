"""Which paths that come out of a container may land on a host. Pure.

Everything that a container made is hostile until it was looked at: names, types,
modes and where links point.
"""

import stat

RESERVED = ("logs/runner.log", "metadata/run.json", "metadata/payload.json")
"""What a run itself writes below the artifact directory."""

RESERVED_DIRECTORIES = ("logs", "metadata")
"""Must be directories, or our own files would land where the command pointed."""

SETUID_CLEARED = "setuid and setgid bits were cleared"
SPECIAL_REMOVED = "is a device, pipe or socket"


def refuse_link(path: str, target: str) -> str | None:
    """Say why a symbolic link may not be kept; None where it may.

    Kept are relative links that stay below the root whatever the directories on
    the way are: a `..` after a name could leave it through another link.

    Parameters
    ----------
    path
        Of the link, relative to the root.
    target
        As it stands in the link.
    """
    if target.startswith("/"):
        return "is a symbolic link with an absolute target"
    parts = [part for part in target.split("/") if part not in {"", "."}]
    upwards = 0
    while upwards < len(parts) and parts[upwards] == "..":
        upwards += 1
    if upwards > path.count("/") or ".." in parts[upwards:]:
        return "is a symbolic link that may leave the directory"
    return None


def refuse_type(mode: int) -> str | None:
    """Say why a file of this type may not be kept; None where it may."""
    kept = stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
    return None if kept else SPECIAL_REMOVED


def refuse_name(path: str, mode: int) -> str | None:
    """Say why an artifact's name is not the command's to use; None where it is."""
    if path in RESERVED:
        return "is a name that the run itself writes"
    if path in RESERVED_DIRECTORIES and not stat.S_ISDIR(mode):
        return "must be a directory: the run itself writes there"
    return None


class Gate:
    """Decides of one artifact after the other, in the order in which the limits count them.

    Parameters
    ----------
    max_bytes, max_files
        Of all regular files together; None for no limit.
    """

    def __init__(self, *, max_bytes: int | None, max_files: int | None) -> None:
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._bytes = 0
        self._files = 0

    def refuse(self, path: str, mode: int, size: int, target: str) -> str | None:
        """Say why an artifact may not be kept; None where it may.

        Parameters
        ----------
        mode, size
            As `lstat` has them.
        target
            Of a symbolic link.
        """
        reason = refuse_type(mode) or refuse_name(path, mode)
        if reason is None and stat.S_ISLNK(mode):
            reason = refuse_link(path, target)
        if reason is not None or not stat.S_ISREG(mode):
            return reason
        self._bytes += size
        if self._max_bytes is not None and self._bytes > self._max_bytes:
            return f"is beyond artifacts.maxBytes ({self._max_bytes})"
        if self._max_files is not None and self._files >= self._max_files:
            return f"is beyond artifacts.maxFiles ({self._max_files})"
        self._files += 1
        return None


def has_setuid(mode: int) -> bool:
    """Whether a regular file would run as its owner or group."""
    return stat.S_ISREG(mode) and bool(mode & (stat.S_ISUID | stat.S_ISGID))


def in_git(path: str) -> bool:
    """Whether a path is part of a `.git`, at any depth.

    Hooks and configuration in there are code that would run outside.
    """
    return ".git" in path.rstrip("/").split("/")


def readable(name: str) -> str:
    """Give a file name as text that can be written as JSON: not all names are UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
