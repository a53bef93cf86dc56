"""The `dagger call` that runs a finished run again, out of its `run.json`."""

import json
import shlex
from pathlib import Path

REMOTE_MODULE_HINT = "name the module in MOONMIND_MODULE, e.g. github.com/owner/name@v0.1.0"


class NoRunError(Exception):
    """The directory holds no run that can be reproduced; the message says why."""


def reproduce_command(
    run_dir: Path, *, module: str | None = None, open_shell: bool = False
) -> list[str]:
    """Give the command that runs a run again, for the workspace as current directory.

    Parameters
    ----------
    run_dir
        What a run has left: the output directory of `moonmind-ext run` or of a
        worker, its artifact directory, or an exported `result` of the module.
    module
        Address of the Dagger module; default: the one that the run has recorded, or
        the checkout that this package is part of.
    open_shell
        Open a shell in the container after the command, instead of ending as it did.

    Raises
    ------
    NoRunError
        When there is no such run, or no module.
    """
    report = _find_report(run_dir)
    try:
        words = shlex.split(json.loads(report.read_text("utf-8"))["reproduce"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoRunError(f"{report}: is not the run.json of a run ({error})") from None
    if words[:2] != ["dagger", "-m"] or words[-1] != "check":
        raise NoRunError(f"{report}: its reproduce line is not a call of this module")
    if module or words[2] == ".":
        words[2] = module or _own_checkout()
    words[-1] = "terminal" if open_shell else "check"
    payload = report.parent / "payload.json"
    return [f"--payload={payload}" if word.startswith("--payload=") else word for word in words]


def _find_report(run_dir: Path) -> Path:
    """Find the `run.json` of a run; its `payload.json` is always beside it."""
    places = [run_dir / "run.json", run_dir / "metadata" / "run.json"]
    places += sorted(run_dir.glob("*/metadata/run.json"))
    found = [place for place in places if place.is_file()]
    if not found:
        raise NoRunError(f"{run_dir}: has no run.json")
    if len(found) > 1:
        raise NoRunError(f"{run_dir}: has several runs; name one: {found[0].parent.parent}")
    return found[0]


def _own_checkout() -> str:
    root = Path(__file__).resolve().parents[1]
    if not (root / "dagger.json").is_file():
        raise NoRunError(
            f"the Dagger module is not installed beside this command: {REMOTE_MODULE_HINT}"
        )
    return str(root)
