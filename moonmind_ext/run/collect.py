"""Artifacts: looked at where they arrived, then moved to where they belong."""

import hashlib
import stat
from pathlib import Path

from moonmind_ext.workspace.tree import ensure_mode, remove_tree, walk
from pipelines.artifacts import SETUID_CLEARED, Gate, has_setuid, readable
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
    gate = Gate(max_bytes=rules.max_bytes, max_files=rules.max_files)
    for path, status in walk(root):
        file, mode = root / path, status.st_mode
        target = str(file.readlink()) if stat.S_ISLNK(mode) else ""
        reason = gate.refuse(path, mode, status.st_size, target)
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
