"""Real input: the test suites of published Python projects, run as tasks."""

import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conformance.support import Task

# Source distributions with their tests in them, and pytest as their one need.
PROJECTS = {
    "idna==3.10": "tests",
    "more-itertools==10.7.0": "tests",
    "toolz==1.0.0": "toolz/tests",
}
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if result.returncode:
        pytest.skip(f"the package index cannot be reached: {result.stderr.strip()[-300:]}")


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The projects' trees, each with pytest in `.vendored`: the images have none."""
    vendored = tmp_path_factory.mktemp("vendored")
    pip("install", "--target", str(vendored), f"pytest=={metadata.version('pytest')}")
    trees: dict[str, Path] = {}
    for requirement in PROJECTS:
        folder = tmp_path_factory.mktemp("sdist")
        pip("download", "--no-deps", "--no-binary", ":all:", "-d", str(folder), requirement)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (tree,) = (path for path in folder.iterdir() if path.is_dir())
        shutil.copytree(vendored, tree / ".vendored")
        trees[requirement] = tree
    return trees


def counts(junit: Path) -> Counter[str]:
    """How many tests there were, and of which result."""
    found: Counter[str] = Counter()
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        results = [child.tag for child in case if child.tag in {"failure", "error", "skipped"}]
        found[results[0] if results else "passed"] += 1
    return found


@pytest.mark.parametrize("requirement", PROJECTS)
async def test_a_published_test_suite_gives_the_same_counts_as_run_directly(
    task: Task, sources: dict[str, Path], requirement: str, tmp_path: Path
) -> None:
    tree, tests = sources[requirement], PROJECTS[requirement]
    env = {"PYTHONPATH": ".vendored:.", "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1"}
    directly = tmp_path / "directly.xml"
    subprocess.run(
        [sys.executable, *PYTEST, f"--junitxml={directly}", tests],
        cwd=tree,
        env={**os.environ, **env},
        check=False,
        timeout=240,
        capture_output=True,
    )

    result = await task(
        *("sh", "-c", 'exec python3 "$@" --junitxml="$ARTIFACT_DIR/junit.xml"', "sh"),
        *(*PYTEST, tests),
        image="python",
        workspace=tree,
        files={},
        env=env,
        timeoutSeconds=240,
    )

    assert counts(directly).total() > 30
    assert counts(result.artifacts / "junit.xml") == counts(directly)
    assert result.report.exit_code == 0
    assert b"passed" in result.log
