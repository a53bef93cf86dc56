import hashlib
import os
import stat

from pipelines.report import Outcome
from tests.conformance.support import Task, sh


async def test_links_devices_pipes_and_setuid_files_are_refused_by_name(task: Task) -> None:
    script = """
        cd "$ARTIFACT_DIR"
        mkdir dir; echo kept > dir/file
        ln -s dir/file inside; ln -s ../../../etc/passwd escape; ln -s /etc/passwd absolute
        ln -s dir dirlink; ln -s dirlink/../../x tricky
        mkfifo pipe
        mknod device c 1 3 2>/dev/null || touch no-device
        cp /bin/sh runner; chmod 6755 runner
    """
    result = await task(*sh(script))

    assert result.report.outcome is Outcome.SUCCEEDED
    refused = result.report.artifacts.refused
    expected = {"escape", "absolute", "tricky", "pipe", "runner"}
    made_device = not (result.artifacts / "no-device").exists()
    assert set(refused) == expected | ({"device"} if made_device else set())
    assert "absolute target" in refused["absolute"]
    assert "leave the directory" in refused["escape"]
    assert "pipe" in refused["pipe"]
    assert os.readlink(result.artifacts / "inside") == "dir/file"
    assert (result.artifacts / "inside").read_text() == "kept\n"
    for name in expected - {"runner"}:
        assert not os.path.lexists(result.artifacts / name)
    mode = (result.artifacts / "runner").stat().st_mode
    assert not mode & (stat.S_ISUID | stat.S_ISGID)
    assert mode & 0o777 == 0o755


async def test_ten_thousand_files_come_back_each_with_its_digest(task: Task) -> None:
    script = 'cd "$ARTIFACT_DIR"; i=0; while [ $i -lt 10000 ]; do echo $i > f$i; i=$((i+1)); done'
    result = await task(*sh(script))

    files = {file.path: file for file in result.report.artifacts.files}
    assert len(files) == 10_000
    assert result.artifact("f9999") == "9999\n"
    assert files["f77"].sha256 == hashlib.sha256(b"77\n").hexdigest()


async def test_deep_paths_and_odd_names_come_back(task: Task) -> None:
    deep = "/".join(f"level-{n}" for n in range(100))
    name = "Grüße 🌙 'x' \"y\" -z"
    result = await task(
        "sh",
        "-c",
        'cd "$ARTIFACT_DIR"; mkdir -p "$0"; echo d > "$0/end"; echo n > "$1"',
        deep,
        name,
    )

    assert result.artifact(f"{deep}/end") == "d\n"
    assert result.artifact(name) == "n\n"


async def test_modes_and_empty_directories_are_kept(task: Task) -> None:
    script = 'cd "$ARTIFACT_DIR"; mkdir empty; echo x > run; chmod 755 run; echo y > r; chmod 600 r'
    result = await task(*sh(script))

    assert (result.artifacts / "empty").is_dir()
    assert (result.artifacts / "run").stat().st_mode & 0o777 == 0o755
    assert (result.artifacts / "r").stat().st_mode & 0o777 == 0o600


async def test_a_command_cannot_write_where_the_run_itself_does(task: Task) -> None:
    script = 'cd "$ARTIFACT_DIR"; mkdir metadata; echo fake > metadata/run.json; ln -s . logs'
    result = await task(*sh(script))

    assert set(result.report.artifacts.refused) == {"metadata/run.json", "logs"}
    assert '"outcome": "succeeded"' in result.artifact("metadata/run.json")
    assert result.log == b""


async def test_the_payload_limits_what_comes_back(task: Task) -> None:
    script = 'cd "$ARTIFACT_DIR"; for i in 1 2 3 4; do echo 12345 > file$i; done; echo big > b.tmp'
    result = await task(
        *sh(script), artifacts={"exclude": ["*.tmp"], "maxFiles": 3, "maxBytes": 12}
    )

    assert [file.path for file in result.report.artifacts.files] == ["file1", "file2"]
    assert set(result.report.artifacts.refused) == {"file3", "file4"}
    assert "maxBytes" in result.report.artifacts.refused["file3"]


async def test_a_second_run_replaces_what_the_first_has_left(task: Task) -> None:
    await task(*sh("echo one > $ARTIFACT_DIR/one"), job_id="job-1")
    result = await task(*sh("echo two > $ARTIFACT_DIR/two"), job_id="job-1")

    assert not (result.artifacts / "one").exists()
    assert result.artifact("two") == "two\n"
    assert [path.name for path in result.output.iterdir() if path.name.startswith(".")] == []


async def test_a_directory_that_may_not_be_written_to_comes_back_with_its_content(
    task: Task,
) -> None:
    script = 'cd "$ARTIFACT_DIR"; mkdir -p closed/in; echo x > closed/in/file; chmod -R a-w closed'
    result = await task(*sh(f"{script}; chmod 000 closed/in"))

    assert [file.path for file in result.report.artifacts.files] == ["closed/in/file"]
    assert (result.artifacts / "closed" / "in" / "file").read_text() == "x\n"
