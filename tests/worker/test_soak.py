"""The soak, small; `make soak` runs it as long as it should be."""

import os
import subprocess
import sys

from moonmind_ext.engine.choice import EngineChoice
from tests.worker.queue_process import ROOT
from tests.worker.support import Site

LIMIT_SECONDS = 250


def test_jobs_of_all_kinds_end_once_and_rightly_while_everything_breaks(site: Site) -> None:
    kind = "embedded" if site.engine.choice is EngineChoice.EMBEDDED else "dagger"
    command = [sys.executable, "-m", "tests.worker.soak", "--engine", kind, "--limit", "180"]
    # The command that restarts an engine may be one that others use.
    environment = {
        name: text for name, text in os.environ.items() if name != "MOONMIND_TEST_RESTART_ENGINE"
    }
    result = subprocess.run(
        [*command, "--jobs", "30"],
        cwd=ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    print(result.stdout, result.stderr)  # noqa: T201, the seed is what one wants to see
    assert result.returncode == 0
