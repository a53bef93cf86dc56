"""What is listed and judged inside an engine is what a host finds in the same tree."""

import os
import subprocess
from pathlib import Path

import pytest

from moonmind_ext.run.collect import check_artifacts
from pipelines.inventory import judge, ordered, parse_listing
from pipelines.payload import ArtifactRules

SCRIPT = Path(__file__).parents[2] / "pipelines" / "listing.sh"


def a_tree(root: Path) -> None:
    for name in ["b", "a", "d/x", "d/e/y", "with blank", "new\nline", "back\\slash", "é", "z!"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() * 3)
    (root / "empty").mkdir()
    (root / "d" / "-f %s").write_bytes(b"\0\xff")
    for name, target in {
        "good": "d/x",
        "absolute": "/etc/passwd",
        "out\nside": "../../x",
        "*": "/\n/",
        "d/e/up": "../x",
        "metadata": "d",
    }.items():
        (root / name).symlink_to(target)
    (root / "logs").mkdir()
    (root / "logs" / "runner.log").mkdir()
    (root / "logs" / "runner.log" / "inside").write_text("x")
    os.mkfifo(root / "pipe")


@pytest.mark.parametrize(
    "rules", [ArtifactRules(), ArtifactRules(max_files=4), ArtifactRules(max_bytes=20)]
)
def test_a_tree_is_judged_as_on_a_host(tmp_path: Path, rules: ArtifactRules) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    tree.mkdir()
    out.mkdir()
    a_tree(tree)
    subprocess.run(["sh", SCRIPT, tree, out, ""], check=True)
    listing = [(out / name).read_text() for name in ("names", "stats", "links", "digests")]

    judged = judge(ordered(parse_listing(*listing)), rules)

    assert judged == check_artifacts(tree, rules)
    assert judged.refused["*"] == "is a symbolic link with an absolute target"
