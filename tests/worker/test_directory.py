"""A job's directory: one owner at a time, and nothing left of those who died."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import pytest

from moonmind_ext.worker import directory
from moonmind_ext.worker.directory import (
    LOCK,
    DirectoryBusyError,
    job_directory,
    probe,
    sweep,
)

HOLD = """
import sys
from pathlib import Path
import anyio
from moonmind_ext.worker.directory import job_directory

async def hold():
    async with job_directory(Path(sys.argv[1]), "job-1") as path:
        (path / "repo").mkdir()
        (path / "repo" / "file").write_text("theirs")
        print("held", flush=True)
        await anyio.to_thread.run_sync(sys.stdin.read)

anyio.run(hold)
"""

SWEEP = """
import os, sys
from pathlib import Path
from moonmind_ext.worker.directory import sweep
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sweep(Path(sys.argv[1]))
"""


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that another user gets to, which those of tests commonly are not."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def other_worker(workdir: Path) -> "Iterator[subprocess.Popen[str]]":
    """A process that has the directory of `job-1`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


async def test_a_directory_is_made_and_removed_with_all_that_is_in_it(tmp_path: Path) -> None:
    async with job_directory(tmp_path / "not/yet/there", "job-1") as path:
        assert path == tmp_path / "not/yet/there/job-1"
        assert [inner.name for inner in path.iterdir()] == [LOCK]
        (path / "a").mkdir()
        (path / "a" / "b").write_text("")
        (path / "link").symlink_to(tmp_path)
        (path / "nowhere").symlink_to("nowhere")
    assert not path.exists()
    assert tmp_path.exists()


async def test_it_is_removed_after_a_failure_and_when_it_is_cancelled(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="inside"):
        async with job_directory(tmp_path, "job-1"):
            raise RuntimeError("inside")
    with anyio.CancelScope() as scope:
        async with job_directory(tmp_path, "job-1") as path:
            (path / "file").write_text("")
            scope.cancel()
            await anyio.sleep_forever()
    assert list(tmp_path.iterdir()) == []


async def test_what_an_earlier_attempt_has_left_is_gone(tmp_path: Path) -> None:
    (tmp_path / "job-1/repo").mkdir(parents=True)
    (tmp_path / "job-1/repo/file").write_text("old")
    (tmp_path / "job-1" / LOCK).touch()
    async with job_directory(tmp_path, "job-1") as path:
        assert [inner.name for inner in path.iterdir()] == [LOCK]


async def test_what_moonminds_own_worker_has_left_of_the_job_is_gone(tmp_path: Path) -> None:
    name = "0f7dc7e5-3b8b-4a3e-9f42-6a1f0b9f2a11"
    (tmp_path / name / "repo").mkdir(parents=True)
    async with job_directory(tmp_path, name) as path:
        assert [inner.name for inner in path.iterdir()] == [LOCK]


async def test_a_directory_that_no_worker_has_left_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "file").write_text("somebody's")
    with pytest.raises(OSError, match="not empty"):
        async with job_directory(tmp_path, "shared"):
            pass
    assert (tmp_path / "shared" / "file").read_text() == "somebody's"


async def test_a_directory_that_another_worker_lets_go_of_is_waited_for(tmp_path: Path) -> None:
    with other_worker(tmp_path) as other:

        async def let_go() -> None:
            await anyio.sleep(0.3)
            assert other.stdin is not None
            other.stdin.close()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(let_go)
            async with job_directory(tmp_path, "job-1") as path:
                assert [inner.name for inner in path.iterdir()] == [LOCK]


def test_room_for_a_job_is_tried_and_leaves_nothing(tmp_path: Path) -> None:
    probe(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file"):
        probe(tmp_path / "missing")


async def test_a_directory_that_another_worker_has_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moonmind_ext.worker.directory.BUSY_SECONDS", 0.2)
    with other_worker(tmp_path) as other:
        with pytest.raises(DirectoryBusyError, match="job-1 is in use by another worker"):
            async with job_directory(tmp_path, "job-1"):
                pass
        sweep(tmp_path)
        assert (tmp_path / "job-1/repo/file").read_text() == "theirs"
        # Another job's is free.
        async with job_directory(tmp_path, "job-2"):
            pass
        _, _ = other.communicate("")
        assert other.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_the_directory_of_a_killed_worker_is_swept(tmp_path: Path) -> None:
    with other_worker(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait(30)
    assert (tmp_path / "job-1/repo/file").exists()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_the_directory_of_a_killed_worker_can_be_taken_at_once(tmp_path: Path) -> None:
    with other_worker(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait(30)
    async with job_directory(tmp_path, "job-1") as path:
        assert not (path / "repo").exists()


async def test_two_of_one_worker_do_not_share_a_directory_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moonmind_ext.worker.directory.BUSY_SECONDS", 0.2)
    async with job_directory(tmp_path, "job-1"):
        with pytest.raises(DirectoryBusyError):
            async with job_directory(tmp_path, "job-1"):
                pass
        assert (tmp_path / "job-1").is_dir()


def test_what_is_not_a_workers_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/file").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "elsewhere").mkdir()
    # Links to what looks like ours, and a lock that is none.
    ours = tmp_path / "elsewhere/job"
    ours.mkdir()
    (ours / LOCK).write_text("")
    (tmp_path / "link").symlink_to(ours)
    (tmp_path / "linked-lock").mkdir()
    (tmp_path / "linked-lock" / LOCK).symlink_to(ours / LOCK)
    (tmp_path / "lock-directory" / LOCK).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    sweep(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_that_may_not_be_looked_into_does_not_end_the_sweep(public: Path) -> None:
    # As `lost+found` on a volume of its own, for a worker that is not root.
    workdir = public / "jobs"
    (workdir / "a-locked-room").mkdir(parents=True)
    (workdir / "left" / "repo").mkdir(parents=True)
    (workdir / "left" / LOCK).write_text("")
    (workdir / "a-locked-room").chmod(0)
    if os.getuid() == 0:
        for path in (workdir, workdir / "left", workdir / "left" / "repo", workdir / "left" / LOCK):
            os.chown(path, 65534, 65534)
    try:
        subprocess.run(
            [sys.executable, "-c", SWEEP, str(workdir)],
            check=True,
            cwd=Path(directory.__file__).parents[2],
            timeout=60,
        )
        assert [path.name for path in workdir.iterdir()] == ["a-locked-room"]
    finally:
        (workdir / "a-locked-room").chmod(0o755)


def test_modes_that_keep_their_owner_out_keep_nothing(public: Path) -> None:
    # What a container wrote has any mode. Only an ordinary user is held up by them.
    workdir = public / "jobs"
    deep = workdir / "left" / "artifacts" / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "file").write_text("")
    (workdir / "left" / LOCK).write_text("")
    if os.getuid() == 0:
        subprocess.run(["chown", "-R", "65534:65534", str(workdir)], check=True)
    for path, mode in ((deep, 0o500), (deep.parent, 0o000), (deep.parents[1], 0o111)):
        path.chmod(mode)
    subprocess.run(
        [sys.executable, "-c", SWEEP, str(workdir)],
        check=True,
        cwd=Path(directory.__file__).parents[2],
        timeout=60,
    )
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize("job_id", ["../other", ".", "", "a/b", ".hidden", "a\0b"])
async def test_a_job_id_that_leads_elsewhere_has_no_directory(tmp_path: Path, job_id: str) -> None:
    workdir, other = tmp_path / "jobs", tmp_path / "other"
    workdir.mkdir()
    other.mkdir()
    (other / "file").write_text("")
    (workdir / "file").write_text("")
    with pytest.raises(OSError, match="job id"):
        async with job_directory(workdir, job_id):
            pass
    assert (other / "file").exists()
    assert [path.name for path in workdir.iterdir()] == ["file"]


async def test_a_link_in_a_jobs_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    (tmp_path / "job-1").symlink_to("other")
    with pytest.raises(OSError, match="job-1"):
        async with job_directory(tmp_path, "job-1"):
            pass
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["file"]
