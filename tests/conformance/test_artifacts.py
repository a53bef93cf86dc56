import hashlib
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from moonmind_ext.engine.session import EngineSession
from moonmind_ext.run.export import ARCHIVE_FILES, Exporter, Results
from moonmind_ext.workspace.send import send_workspace
from pipelines.container_task import Image, resolve_image, run_command
from pipelines.masking import Masker
from pipelines.payload import WorkspaceFilter, parse_any
from pipelines.plan import plan_task
from pipelines.report import Artifacts, Outcome
from tests.conformance.support import Task, sh
from tests.engines import Engine
from tests.snapshot import Snapshot, snapshot

MANY = f"""
    cd "$ARTIFACT_DIR"; mkdir many; i=0
    while [ $i -lt {ARCHIVE_FILES} ]; do echo $i > many/$i; i=$((i+1)); done
"""
NASTY = rf"""
    {MANY}
    umask 022
    mkdir empty closed closed/in sticky long "new
line"
    echo x > closed/in/file; echo r > read-only; echo z > zero; echo m > "new
line/back\slash"
    echo n > "$(printf 'café')"; echo d > -rf; echo h > hard; ln hard hard-too; : > nothing
    name=$(printf '%0200d' 0); mkdir -p "long/$name/$name/$name"; echo l > "long/$name/$name/$name/f"
    ln -s "long/$name/$name/$name/f" long-link; ln -s many/1 inside; ln -s nowhere dangling
    ln -s /etc/passwd absolute; ln -s ../../../etc/passwd escape; ln -s many directory-link
    mkdir logs metadata; echo fake > logs/runner.log; ln -s . metadata/run.json
    mkfifo pipe; echo s > runner; chmod 6755 runner
    printf '%70000s' x > large; echo t > touched; touch -d '2001-02-03 04:05:06' touched empty
    chmod 444 read-only; chmod 1777 sticky; chmod 0 zero closed/in; chmod 500 closed
"""


class Brought:
    """What was brought out of one execution, one way or the other."""

    def __init__(self, results: Results, staging: Path) -> None:
        self.artifacts: Artifacts = results.artifacts
        self.left = {path.name for path in staging.iterdir()} - {"log"}
        self.root = staging / "artifacts"

    @property
    def archived(self) -> bool:
        """Whether it came as an archive, which has no fractions of seconds."""
        files = [path.stat() for path in self.root.rglob("*") if path.is_file()]
        return all(file.st_mtime_ns % 10**9 == 0 for file in files)

    @property
    def tree(self) -> Snapshot:
        # Of times, those of files count.
        return {
            path: (mode, time if stat.S_ISREG(mode) else 0, links, content)
            for path, (mode, time, links, content) in snapshot(self.root).items()
        }


async def bring_both_ways(
    session: EngineSession,
    image: Image,
    tmp_path: Path,
    script: str,
    rules: dict[str, Any],
    *,
    packing: Image | None = None,
    helper_image: str = "",
    command: tuple[str, ...] = ("sh", "-c"),
) -> tuple[Brought, Brought]:
    """Run a command once; bring what it leaves as an archive if that can be, and streamed.

    Parameters
    ----------
    packing
        The image that packs, where it is not the command's.
    helper_image
        Packs where that cannot.
    """
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    container = {"image": image.reference, "command": [*command, script], "artifacts": rules}
    plan = plan_task(parse_any(container, repository="acme/widgets"), job_id=f"t-{uuid4().hex[:8]}")
    before, size = await send_workspace(session.client, workspace, WorkspaceFilter())
    execution = await run_command(session.client, plan, image, before, {})
    assert execution.ending.exit_code == 0
    assert execution.files >= ARCHIVE_FILES
    exporter = Exporter(
        client=session.client,
        plan=plan,
        image=packing or image,
        before=before,
        size=size,
        workspace=workspace,
        masker=Masker(),
        log_limit_bytes=1 << 20,
        helper_image=helper_image,
        archives=True,
    )
    brought = []
    for name, archives in (("archived", True), ("streamed", False)):
        staging = tmp_path / name
        staging.mkdir()
        results = Results()
        await replace(exporter, archives=archives).export(execution, results, staging)
        brought.append(Brought(results, staging))
    return brought[0], brought[1]


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


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"include": ["many/1*", "closed", "hard*", "*link*"]},
        {"exclude": ["many/2*", "**/*slash", "hard"]},
        {"maxFiles": 100},
        {"maxBytes": 72_000},
        {"maxFiles": 1500, "maxBytes": 76_000, "exclude": ["many/1?"]},
    ],
    ids=["all", "include", "exclude", "maxFiles", "maxBytes", "limits and exclude"],
)
async def test_an_archive_brings_exactly_what_an_export_does(
    engine: Engine, tmp_path: Path, rules: dict[str, Any]
) -> None:
    async with engine.session() as session:
        image = await resolve_image(session.client, engine.image("base"))
        archived, streamed = await bring_both_ways(session, image, tmp_path, NASTY, rules)

    assert archived.archived
    assert not streamed.archived
    assert archived.artifacts == streamed.artifacts
    assert archived.artifacts.model_dump_json() == streamed.artifacts.model_dump_json()
    assert archived.tree == streamed.tree
    assert archived.left == streamed.left == {"artifacts", "runner.log"}
    assert len(archived.artifacts.files) >= 10


async def test_gnu_tar_does_so_too(engine: Engine, tmp_path: Path) -> None:
    async with engine.session() as session:
        image = await resolve_image(session.client, engine.image("python"))
        archived, streamed = await bring_both_ways(session, image, tmp_path, NASTY, {})

    assert archived.archived
    assert archived.artifacts == streamed.artifacts
    assert archived.tree == streamed.tree


async def test_an_image_without_a_shell_brings_many_files_too(
    engine: Engine, tmp_path: Path
) -> None:
    code = f"""
import os
os.chdir(os.environ["ARTIFACT_DIR"])
os.mkdir("many")
for n in range({ARCHIVE_FILES}):
    open(f"many/{{n}}", "w").write(str(n))
"""
    async with engine.session() as session:
        image = await resolve_image(
            session.client, engine.image("no-shell"), helper_image=engine.image("busybox")
        )
        archived, streamed = await bring_both_ways(
            session, image, tmp_path, code, {}, command=("python3", "-c")
        )

    assert archived.archived
    assert archived.artifacts == streamed.artifacts
    assert archived.tree == streamed.tree


BROKEN = {
    "fails": "exit 1",
    "is killed": "exit 137",
    "writes rubbish": "echo rubbish",
    "writes nothing": "exit 0",
    "complains": 'PATH=/bin:/usr/bin; tar "$@"; echo something was left out >&2',
    "is cut off": 'PATH=/bin:/usr/bin; tar "$@" | head -c 600000',
}


async def bring_with_a_broken_tar(
    engine: Engine, tmp_path: Path, script: str, helper_image: str
) -> tuple[Brought, Brought]:
    async with engine.session() as session:
        # Not busybox, whose shell may take its own tar.
        image = await resolve_image(session.client, engine.image("python"))
        container = image.container.with_new_file(
            "/broken/tar", f"#!/bin/sh\n{script}\n", permissions=0o755
        ).with_env_variable("PATH", "/broken:/usr/local/bin:/usr/bin:/bin")
        return await bring_both_ways(
            session,
            image,
            tmp_path,
            NASTY,
            {},
            packing=replace(image, container=container),
            helper_image=helper_image,
        )


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN.keys())
async def test_where_no_tar_is_any_good_the_files_come_one_by_one(
    engine: Engine, tmp_path: Path, script: str
) -> None:
    missing = engine.image("missing")
    tried, streamed = await bring_with_a_broken_tar(engine, tmp_path, script, missing)

    assert not tried.archived
    assert tried.artifacts == streamed.artifacts
    assert tried.tree == streamed.tree
    assert tried.left == {"artifacts", "runner.log"}


async def test_the_helper_image_packs_where_the_image_cannot(
    engine: Engine, tmp_path: Path
) -> None:
    helper = engine.image("busybox")
    tried, streamed = await bring_with_a_broken_tar(engine, tmp_path, BROKEN["fails"], helper)

    assert tried.archived
    assert tried.artifacts == streamed.artifacts
    assert tried.tree == streamed.tree


async def test_ten_thousand_files_that_are_not_tiny_come_back(task: Task) -> None:
    # Exported one by one, they make a real engine wait for ever now and then.
    script = """
        cd "$ARTIFACT_DIR"; filler=$(printf '%010000d' 0); i=0
        while [ $i -lt 10000 ]; do echo $filler > f$i; i=$((i+1)); done
    """
    result = await task(*sh(script))

    assert len(result.report.artifacts.files) == 10_000
    assert sum(file.bytes for file in result.report.artifacts.files) == 10_000 * 10_001
