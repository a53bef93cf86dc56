"""What the workspace tests share."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent


def as_ordinary_user(folder: Path, module: str, script: str) -> str:
    """Run a script in a directory, not as root, whom no mode holds up.

    Parameters
    ----------
    module
        Whose names the script uses; imported before, as the interpreter's own files
        may be root's.

    Returns
    -------
    str
        What it prints.
    """
    for parent in (*folder.parents[:3], folder):
        parent.chmod(0o755)
    if os.getuid() == 0:
        os.chown(folder, 65534, 65534)
    prelude = (
        f"from {module} import *\nimport os\nos.getuid() or os.setuid(65534)\nos.umask(0o022)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", prelude + dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
