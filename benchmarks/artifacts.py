"""Bringing artifacts out, checked and with digests: against exporting them."""

import shutil
from collections.abc import AsyncIterator

from benchmarks.bench import NOT_QUICK, Bench, Desk, desk, find_engine
from benchmarks.figures import Figure
from benchmarks.measure import Act, Watch, memory_now, side_by_side
from moonmind_ext.run.export import Exporter, Results
from moonmind_ext.workspace.send import send_workspace
from pipelines.container_task import Execution, resolve_image, run_command
from pipelines.masking import Masker
from pipelines.payload import WorkspaceFilter, parse_any
from pipelines.plan import plan_task

MANY = 10_000
CASES = {
    "artifacts/large": ("1 file of 1 GB", "dd if=/dev/zero of=$ARTIFACT_DIR/large bs=1M count=954"),
    "artifacts/many": (
        f"{MANY:,} small files",
        f"cd $ARTIFACT_DIR; i=0; while [ $i -lt {MANY} ]; do echo $i >$i; i=$((i + 1)); done",
    ),
}
QUICK = ("artifacts/many",)

OURS = "bringing them out"
BARE = "exporting them"


async def measure(bench: Bench) -> AsyncIterator[Figure]:
    """Measure what comes after the command, which runs once."""
    choice, problem = await find_engine()
    for name, (left, script) in CASES.items():
        what = f"artifacts: {left}"
        if choice is None or (bench.quick and name not in QUICK):
            yield Figure(name=name, what=what, missing=problem if choice is None else NOT_QUICK)
            continue
        async with desk(bench, choice) as ours:
            sides = await _sides(bench, ours, script)
            before = memory_now()
            measured = await side_by_side(sides, rounds=bench.rounds, warm_ups=1)
        _clear_away(bench)
        yield measured.figure(name, what, OURS, BARE)
        yield measured.memory(f"{name}/memory", what, OURS, before)


async def _sides(bench: Bench, ours: Desk, script: str) -> dict[str, Act]:
    client = ours.session.client
    container = {"image": bench.image, "command": ["sh", "-c", script]}
    plan = plan_task(
        parse_any(container, repository="acme/widgets"), job_id=bench.new_path("job").name
    )
    image = await resolve_image(client, bench.image, helper_image=bench.image)
    before, size = await send_workspace(client, ours.workspace, WorkspaceFilter())
    execution = await run_command(client, plan, image, before, {})
    _check(execution)
    exporter = Exporter(
        client=client,
        plan=plan,
        image=image,
        before=before,
        size=size,
        workspace=ours.workspace,
        masker=Masker(),
        log_limit_bytes=1 << 20,
        helper_image=bench.image,
        archives=ours.session.kind == "dagger",
    )
    assert execution.container is not None
    left = execution.container.directory(plan.artifact_dir)

    async def bring(watch: Watch) -> None:
        staging = bench.new_path("staging")
        staging.mkdir()
        with watch:
            await exporter.export(execution, Results(), staging)
        _clear_away(bench, execution)

    async def export(watch: Watch) -> None:
        target = bench.new_path("export")
        with watch:
            await left.export(str(target))
        _clear_away(bench, execution)

    return {OURS: bring, BARE: export}


def _clear_away(bench: Bench, execution: Execution | None = None) -> None:
    """Remove what was brought; many files only at the end.

    Some disks make files more slowly where many were removed a moment ago.
    """
    if execution is None or execution.files < MANY:
        for path in (*bench.folder.glob("staging-*"), *bench.folder.glob("export-*")):
            shutil.rmtree(path)


def _check(execution: Execution) -> None:
    if execution.ending.exit_code:
        raise RuntimeError(f"the command failed: {execution.ending}")
