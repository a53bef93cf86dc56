"""Ends a write-back after each of its steps, in a process of its own, by SIGKILL."""

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

from moonmind_ext.workspace.journal import left_in, recover
from tests.workspace.desk import Desk, listing


def make(workspace: Path) -> Desk:
    """A workspace, and what a command has made of it: every kind of change."""
    for folder in ("todir", "gone/deep", "tofile/inner", "closed/inner", "modes", "emptied"):
        (workspace / folder).mkdir(parents=True)
    (workspace / "todir").rmdir()
    for name in ("todir", "edited", "gone/deep/a", "gone/b", "tofile/inner/c", "closed/inner/d"):
        (workspace / name).write_text(f"old {name}")
    for name in ("same", "executable", "emptied/e", "closed/f", "tolink"):
        (workspace / name).write_text(f"old {name}")
    (workspace / "linktodir").symlink_to("modes")
    (workspace / "link").symlink_to("same")
    (workspace / "closed" / "inner").chmod(0o555)
    (workspace / "closed").chmod(0o555)

    desk = Desk(workspace)
    container = desk.container
    for folder in ("closed", "closed/inner"):
        (container / folder).chmod(0o755)
    for name in ("todir", "emptied/e", "closed/inner/d", "tolink", "linktodir", "link"):
        (container / name).unlink()
    for folder in ("gone", "tofile"):
        shutil.rmtree(container / folder)
    (container / "todir" / "deep").mkdir(parents=True)
    (container / "todir" / "deep" / "new").write_text("new")
    (container / "linktodir").mkdir()
    (container / "linktodir" / "new").write_text("new")
    for name in ("tofile", "edited", "closed/new", "added"):
        (container / name).write_text(f"new {name}")
    (container / "tolink").symlink_to("same")
    (container / "link").symlink_to("edited")
    (container / "executable").chmod(0o755)
    (container / "modes").chmod(0o700)
    (container / "todir" / "deep").chmod(0o555)
    (container / "closed" / "inner").chmod(0o555)
    (container / "closed").chmod(0o555)
    return desk


def killed(work: Callable[[Callable[[], None]], object], steps: int) -> bool:
    """Run something in a process that is killed after some steps; whether it was."""
    child = os.fork()
    if not child:
        counter = count(1)

        def after_step() -> None:
            if next(counter) == steps:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            work(after_step)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or not os.WEXITSTATUS(status)
    return os.WIFSIGNALED(status)


def kill_everywhere(folder: Path) -> None:
    """Kill the write-back after each step, and the next run's putting in order too."""
    outcomes: list[str] = []
    for steps in count(1):
        # The second time not everywhere, which would take half a minute.
        for recovery_steps in count(1 if steps % 6 == 0 else 1000):
            workspace = folder / f"{steps}-{recovery_steps}"
            workspace.mkdir()
            desk = make(workspace)
            before, after = listing(workspace), listing(desk.container)
            was_killed = killed(desk.back, steps)
            again = was_killed and killed(partial(recover, workspace), recovery_steps)
            recover(workspace)
            assert list(left_in(workspace)) == []
            found = listing(workspace)
            assert found in (before, after), (steps, recovery_steps)
            outcomes.append("before" if found == before else "after")
            if not again:
                break
        if not was_killed:
            break
    # There is one step at which what will be is decided.
    assert outcomes == sorted(outcomes, key=["before", "after"].index)
    assert {*outcomes} == {"before", "after"}
    (folder / "steps").write_text(f"{steps - 1}")
