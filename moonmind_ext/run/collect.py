"""Artifacts: looked at where they arrived, then moved to where they belong."""

import hashlib
import stat
from pathlib import Path

from moonmind_ext.workspace.tree import ensure_mode, remove_tree, walk
from pipelines.artifacts import (
    SETUID_CLEARED,
    has_setuid,
    readable,
    refuse_link,
    refuse_name,
    refuse_type,
)
from pipelines.payload import ArtifactRules
from pipelines.report import Artifact, Artifacts


def check_artifacts(root: Path, rules: ArtifactRules) -> Artifacts:
    """Take out of exported artifacts what may not stay; blocking.

    Parameters
    ----------
    root
        A directory that holds nothing but what the command left.
    rules
        `max_files` and `max_bytes`; what is beyond, in the order of the names, is
        removed.

    Returns
    -------
    Artifacts
        Every file that is left, with its digest, and everything refused.
    """
    found = Artifacts()
    total = 0
    for path, status in walk(root):
        file = root / path
        mode = status.st_mode
        reason = refuse_type(mode) or refuse_name(path, mode)
        if reason is None and stat.S_ISLNK(mode):
            reason = refuse_link(path, str(file.readlink()))
        if reason is None and stat.S_ISREG(mode):
            total += status.st_size
            if rules.max_bytes is not None and total > rules.max_bytes:
                reason = f"is beyond artifacts.maxBytes ({rules.max_bytes})"
            elif rules.max_files is not None and len(found.files) >= rules.max_files:
                reason = f"is beyond artifacts.maxFiles ({rules.max_files})"
        if reason is not None:
            found.refused[readable(path)] = reason
            if stat.S_ISDIR(mode):
                remove_tree(file)
            else:
                file.unlink()
            continue
        if stat.S_ISREG(mode):
            if has_setuid(mode):
                file.chmod(stat.S_IMODE(mode) & ~(stat.S_ISUID | stat.S_ISGID))
                found.refused[readable(path)] = SETUID_CLEARED
            ensure_mode(file, stat.S_IRUSR)
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            found.files.append(Artifact(path=readable(path), bytes=status.st_size, sha256=digest))
    return found
