"""What the workspace tests share."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent


def as_ordinary_user(folder: Path, script: str) -> str:
    """Run a script in a directory, not as root, who is held up by nothing.

    Returns
    -------
    str
        What it prints.
    """
    for parent in (*folder.parents[:2], folder):
        parent.chmod(0o755)
    if os.getuid() == 0:
        os.chown(folder, 65534, 65534)
    prelude = "import os\nos.getuid() or (os.setgid(65534), os.setuid(65534))\nos.umask(0o022)\n"
    result = subprocess.run(
        [sys.executable, "-c", prelude + dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={
            **os.environ,
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(folder),
            "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]),
        },
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
