import pytest

from pipelines.payload import TaskContractError
from tests.conformance.support import Task, sh

ODD_TOKENS = [
    "",
    " ",
    "a b",
    "two\nlines",
    "$HOME",
    "`id`",
    "'",
    '"',
    "\\",
    "*",
    "Grüße 🌙",
    "-n",
    "a=b",
]


async def test_tokens_arrive_verbatim(task: Task) -> None:
    script = 'for token in "$@"; do printf "<%s>" "$token"; done'
    result = await task("sh", "-c", script, "name", *ODD_TOKENS)

    assert result.log.decode() == "".join(f"<{token}>" for token in ODD_TOKENS)


async def test_a_command_is_no_shell_line_and_no_builtin(task: Task) -> None:
    result = await task("echo", "$HOME", "&&", "exit", "3")

    assert result.log == b"$HOME && exit 3\n"
    assert result.report.exit_code == 0


async def test_the_payloads_env_wins_over_the_images(task: Task) -> None:
    result = await task(
        *sh('echo "$PATH"; echo "$GREETING"; echo "$EMPTY-"'),
        env={"PATH": "/nowhere:/bin:/usr/bin", "GREETING": "two  blanks", "EMPTY": ""},
    )

    assert result.log == b"/nowhere:/bin:/usr/bin\ntwo  blanks\n-\n"


async def test_names_that_the_supervisor_uses_itself_reach_the_command_unchanged(
    task: Task,
) -> None:
    names = ["limit", "grace", "out", "stop", "code", "reason", "up", "process", "watchdog"]
    script = "".join(f'echo "${name}"; ' for name in names)
    result = await task(*sh(script), env={name: f"mine-{name}" for name in names})

    assert result.log.decode().split() == [f"mine-{name}" for name in names]


async def test_a_name_that_shells_drop_reaches_the_command(task: Task) -> None:
    result = await task("env", env={"discovery.type": "single node", "PLAIN": "1"})

    assert "discovery.type=single node" in result.log.decode().splitlines()
    assert "PLAIN=1" in result.log.decode().splitlines()


async def test_what_we_set_names_the_run(task: Task) -> None:
    result = await task(
        *sh(
            'echo "$JOB_ID $REPOSITORY"; echo "$ARTIFACT_DIR"; test -d "$ARTIFACT_DIR" && echo there'
        ),
        job_id="job-9",
        artifactsSubdir="results/unit",
    )

    folder = "/work/agent_jobs/job-9/artifacts/results/unit"
    assert result.log.decode() == f"job-9 acme/widgets\n{folder}\nthere\n"


@pytest.mark.parametrize("name", ["ARTIFACT_DIR", "job_id", "Repository", "MOONMIND_CPUS"])
async def test_what_we_set_may_not_be_set_by_the_payload(task: Task, name: str) -> None:
    with pytest.raises(TaskContractError, match=name):
        await task("true", env={name: "mine"})


async def test_resources_are_told_to_the_command_and_said_not_to_be_enforced(task: Task) -> None:
    result = await task(
        *sh('echo "$MOONMIND_CPUS $MOONMIND_MEMORY"'), resources={"cpus": 1.5, "memory": "2g"}
    )

    assert result.log == b"1.5 2g\n"
    assert any("not enforced" in warning for warning in result.report.warnings)


@pytest.mark.parametrize(
    ("workdir", "expected"),
    [
        (None, "/work/agent_jobs/job-1/repo"),
        ("docs", "/work/agent_jobs/job-1/repo/docs"),
        ("./docs/", "/work/agent_jobs/job-1/repo/docs"),
        ("/tmp", "/tmp"),
        ("not/there/yet", "/work/agent_jobs/job-1/repo/not/there/yet"),
    ],
)
async def test_a_command_starts_where_its_workdir_says(
    task: Task, workdir: str | None, expected: str
) -> None:
    fields = {} if workdir is None else {"workdir": workdir}
    result = await task("pwd", files={"docs/index.md": "x"}, job_id="job-1", **fields)

    assert result.log.decode() == f"{expected}\n"


async def test_sigint_keeps_its_default_in_the_command(task: Task) -> None:
    script = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    result = await task("python3", "-c", script, image="python")

    assert result.log == b"True\n"


async def test_a_cache_volume_keeps_what_a_task_puts_in(task: Task) -> None:
    volume = [{"name": "moonmind-conformance", "target": "/cache/dir"}]
    await task(*sh("echo kept > /cache/dir/kept"), cacheVolumes=volume)
    result = await task(*sh("cat /cache/dir/kept"), cacheVolumes=volume)

    assert result.log == b"kept\n"


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, [".gitignore", "docs/c.md", "src/a.py", "src/b.txt"]),
        ({"exclude": ["docs", "**/*.txt"]}, [".gitignore", "src/a.py"]),
        ({"include": ["src"]}, ["src/a.py", "src/b.txt"]),
        ({"gitignore": True}, [".gitignore", "docs/c.md", "src/a.py"]),
    ],
)
async def test_the_payload_chooses_what_of_the_workspace_is_sent(
    task: Task, chosen: dict[str, object], expected: list[str]
) -> None:
    files = {"src/a.py": "a", "src/b.txt": "b", "docs/c.md": "c", ".gitignore": "*.txt\n"}
    result = await task(*sh("find . -type f | sort"), files=files, fields={"workspace": chosen})

    assert result.log.decode().split() == [f"./{path}" for path in expected]
