"""Where a run's result goes, before there is one."""

import shutil
from pathlib import Path


class OutputError(Exception):
    """The output directory cannot be used; the message says why."""


def clear_output(output: Path, artifacts_subdir: str) -> None:
    """Make room for a result: what an earlier run has left is removed; blocking.

    A run that never gets to its end must not be taken for the one before it.

    Parameters
    ----------
    output
        Absolute; made if it is not there.

    Raises
    ------
    OutputError
        When there is something that no run has left, or nothing can be written.
    """
    target = output / artifacts_subdir
    try:
        output.mkdir(parents=True, exist_ok=True)
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise OutputError(f"output {target}: must be a directory")
        if target.is_dir():
            if any(target.iterdir()) and not (target / "metadata" / "run.json").exists():
                raise OutputError(
                    f"output {target}: is not empty and was not left by an earlier run; choose "
                    "another --output, or move it away"
                )
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output {error.filename}: {error.strerror}") from error
