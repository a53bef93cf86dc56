"""That the benchmarks run; what they measure is not looked at here."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.report import BEGIN, END

ROOT = Path(__file__).parent.parent


def test_a_quick_run_becomes_a_page_with_a_plot(tmp_path: Path) -> None:
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")

    python(
        *("benchmarks", "--quick", "--rounds", "1", "--only", "startup"),
        *("--output", str(results)),
    )
    python("benchmarks.report", "--input", str(results), "--page", str(page))

    figures = {figure["name"]: figure for figure in json.loads(results.read_text())["figures"]}
    assert set(figures) == {"startup/help", "startup/validate", "startup/plan"}
    assert all(figure["ratio"] > 0 and figure["n"] == 1 for figure in figures.values())
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert all(f"| {name} |" in text for name in figures)
    assert (tmp_path / "page.svg").read_text().count('<rect class="bar"') == len(figures)


def python(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True)
