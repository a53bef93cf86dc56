import json
import pickle
import re
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.payload import (
    MAX_SECONDS,
    RESERVED_ENV,
    CacheMode,
    ContainerSpec,
    Problem,
    PublishMode,
    PullMode,
    SecretReference,
    TaskContractError,
    TaskPayload,
    WriteBack,
    loads,
    looks_secret,
    parse_any,
    parse_payload,
    parse_secret_reference,
    publishable,
    warnings_of,
)

DIGEST = "sha256:" + "0123456789abcdef" * 4

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
anything = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)
env_names = texts.filter(
    lambda name: (
        name.isprintable()
        and name.strip() == name != ""
        and "=" not in name
        and name.upper() not in RESERVED_ENV
        and (re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) or not looks_secret(name))
    )
)
secret_names = st.builds("{}_{}".format, st.sampled_from(["", "MY", "a"]), st.just("API_KEY"))


def container(**fields: Any) -> dict[str, Any]:
    return {"enabled": True, "image": "alpine:3.20", "command": ["true"], **fields}


def payload(**fields: Any) -> dict[str, Any]:
    return {
        "repository": "owner/name",
        "task": {"instructions": "Test it", "container": container(**fields)},
    }


def with_task(**fields: Any) -> dict[str, Any]:
    return {"repository": "owner/name", "task": {"instructions": "Test it", **fields}}


def spec_of(**fields: Any) -> ContainerSpec:
    spec = parse_payload(payload(**fields)).task.container
    assert spec is not None
    return spec


def problems_of(data: object) -> dict[str, str]:
    with pytest.raises(TaskContractError) as caught:
        parse_payload(data)
    return {problem.path: problem.message for problem in caught.value.problems}


def problem_of(**fields: Any) -> str:
    """Give the message of the one problem of `task.container`, without `task.container`."""
    (message,) = problems_of(payload(**fields)).values()
    return message.removeprefix("task.container")


# What a payload is


def test_a_queue_job_is_unwrapped_from_its_envelope() -> None:
    job = {"id": "1", "type": "task", "payload": payload(), "attempt": 1}
    assert parse_payload(job) == parse_payload(payload())


def test_a_job_of_another_type_is_refused() -> None:
    job = {"type": "codex_exec", "payload": payload()}
    assert problems_of(job) == {"type": 'type must be "task": no other has a container'}


@pytest.mark.parametrize("data", [None, [], "task", 5, {"type": "task", "payload": []}])
def test_a_payload_is_an_object(data: object) -> None:
    assert problems_of(data) == {"": "the payload must be an object"}


def test_repository_task_and_instructions_are_required() -> None:
    assert problems_of({}) == {"repository": "repository is required", "task": "task is required"}
    assert problems_of({"repository": " ", "task": {"instructions": "\n"}}) == {
        "repository": "repository is required",
        "task.instructions": "task.instructions is required",
    }


def test_repo_target_runtime_and_instruction_are_other_names() -> None:
    parsed = parse_payload(
        {"repo": "a/b", "target_runtime": "gemini", "task": {"instruction": "x"}}
    )
    assert parsed.repository == "a/b"
    assert parsed.target_runtime == "gemini"
    assert parsed.task.instructions == "x"


def test_fields_are_read_in_snake_case_too_as_moonmind_does() -> None:
    assert spec_of(timeout_seconds=7).timeout_seconds == 7
    assert problem_of(timeout_seconds=0).startswith(".timeout_seconds must be an integer")


def test_a_null_is_the_same_as_nothing() -> None:
    nulls = dict.fromkeys(set(ContainerSpec.known()) - {"enabled", "image", "command"})
    assert spec_of(**nulls) == spec_of()
    assert parse_payload(with_task(git=None, publish=None, skill=None, container=None)) == (
        parse_payload(with_task())
    )


def test_a_repository_url_may_not_carry_credentials() -> None:
    data = payload() | {"repository": "https://me:hunter2@example.com/x.git"}
    (message,) = problems_of(data).values()
    assert message.startswith("repository may not carry credentials")
    assert "hunter2" not in message
    for fine in ("owner/name", "git@github.com:a/b.git", "https://example.com/a@b", "/tmp/x"):
        assert parse_payload(payload() | {"repository": fine}).repository == fine


# Around the container


@pytest.mark.parametrize(
    ("top", "task", "runtime"),
    [
        (None, None, "codex"),
        ("universal", None, "codex"),
        (" Claude ", None, "claude"),
        (None, "gemini", "gemini"),
        (None, {"mode": "gemini"}, "gemini"),
        ("claude", "gemini", "claude"),
        ("universal", "gemini", "codex"),
        ("", "claude", "claude"),
    ],
)
def test_the_runtime_is_the_payloads_or_else_the_tasks_or_else_codex(
    top: object, task: object, runtime: str
) -> None:
    parsed = parse_payload(with_task(runtime=task) | {"targetRuntime": top})
    assert parsed.target_runtime == parsed.task.runtime.mode == runtime
    canonical = parsed.canonical()
    assert canonical["targetRuntime"] == canonical["task"]["runtime"]["mode"] == runtime


def test_an_unknown_runtime_is_refused() -> None:
    assert problems_of(with_task(runtime="gpt") | {"targetRuntime": "gpt"}) == {
        "task.runtime.mode": "task.runtime.mode must be 'codex', 'gemini' or 'claude'",
        "targetRuntime": "targetRuntime must be 'codex', 'gemini' or 'claude'",
    }


def test_publishing_is_to_a_branch_unless_the_task_says_otherwise() -> None:
    assert parse_payload(with_task()).task.publish.mode is PublishMode.BRANCH
    parsed = parse_payload(with_task(publish={"mode": "PR", "prTitle": " x ", "prBody": " "}))
    assert parsed.task.publish.mode is PublishMode.PR
    assert parsed.task.publish.pr_title == "x"
    assert parsed.task.publish.pr_body is None
    assert problems_of(with_task(publish={"mode": "push"})) == {
        "task.publish.mode": "task.publish.mode must be 'none', 'branch' or 'pr'"
    }


@pytest.mark.parametrize(
    "reference",
    [
        "hunter2",
        "env://HUNTER2",
        "vault://hunter2/path",
        "vault://hunter2#field",
        "vault://mount/a/../b#hunter2",
        "vault://../hunter2#field",
        "vault://mount/a hunter2#field",
        "vault://mount/hunter2" + "a" * 500 + "#field",
    ],
)
def test_auth_takes_vault_references_only_and_does_not_repeat_anything_else(reference: str) -> None:
    (message,) = problems_of(payload() | {"auth": {"publishAuthRef": reference}}).values()
    assert message.startswith("auth.publishAuthRef must be ")
    assert "hunter2" not in message


def test_auth_references_are_kept() -> None:
    parsed = parse_payload(payload() | {"auth": {"repoAuthRef": " vault://kv/git/x#token "}})
    assert parsed.auth is not None
    assert parsed.auth.repo_auth_ref == "vault://kv/git/x#token"
    assert parsed.auth.publish_auth_ref is None


def test_steps_are_refused_beside_an_enabled_container() -> None:
    data = payload()
    data["task"]["steps"] = [{"id": "1"}]
    assert problems_of(data) == {
        "task.steps": "task.steps is not supported when task.container.enabled=true"
    }
    data["task"]["container"]["enabled"] = False
    assert parse_payload(data).canonical()["task"]["steps"] == [{"id": "1"}]


# enabled, image, command


@pytest.mark.parametrize(
    ("given", "enabled"),
    [
        *[(yes, True) for yes in (True, "1", "true", "yes", "on", " TRUE ")],
        *[(no, False) for no in (False, "0", "false", "no", "Off", None)],
    ],
)
def test_enabled_reads_the_usual_words(given: object, enabled: bool) -> None:
    assert spec_of(enabled=given).enabled is enabled


@pytest.mark.parametrize("given", ["", "maybe", "2", 1, 0, [], {}])
def test_enabled_takes_nothing_else(given: object) -> None:
    assert problem_of(enabled=given) == ".enabled must be true or false"


def test_a_container_is_not_enabled_by_itself() -> None:
    spec = parse_payload(with_task(container={})).task.container
    assert spec is not None
    assert not spec.enabled


@pytest.mark.parametrize("missing", [{}, {"image": None}, {"image": ""}])
def test_image_is_required_when_the_container_is_enabled(missing: dict[str, Any]) -> None:
    assert problems_of(with_task(container={"enabled": True, "command": ["x"], **missing})) == {
        "task.container.image": (
            "task.container.image is required when task.container.enabled=true"
        )
    }


@pytest.mark.parametrize("missing", [{}, {"command": None}, {"command": []}])
def test_command_is_required_when_the_container_is_enabled(missing: dict[str, Any]) -> None:
    assert problems_of(with_task(container={"enabled": "yes", "image": "x", **missing})) == {
        "task.container.command": (
            "task.container.command is required when task.container.enabled=true"
        )
    }


def test_what_a_disabled_container_says_is_still_checked() -> None:
    assert parse_payload(with_task(container={"enabled": False}))
    problems = problems_of(with_task(container={"image": "-x", "command": [" "], "pull": "never"}))
    assert list(problems) == [
        "task.container.image",
        "task.container.command",
        "task.container.pull",
    ]


@pytest.mark.parametrize(
    "image",
    [
        "alpine",
        "alpine:3.20",
        "library/alpine",
        "a/b/c/d",
        "localhost/x",
        "localhost:5000/x:latest",
        "Registry.Example.com:443/team_a/my-app__x:V1.0_a-b",
        "[2001:db8::1]:5000/x",
        f"alpine@{DIGEST}",
        f"registry.example.com/x:1@{DIGEST}",
        "x:" + "t" * 128,
        "a---b.c_d__e/f",
        "x" * 255,
    ],
)
def test_an_image_is_any_reference_that_docker_takes(image: str) -> None:
    assert spec_of(image=image).image == image


@pytest.mark.parametrize(
    "image",
    [
        "-alpine",
        "--privileged",
        "Alpine",
        "Team/alpine",
        "registry.example.com/Team/x",
        "al pine",
        " alpine",
        "alpine\n",
        "alpine:",
        "alpine:-x",
        "alpine:a b",
        "x:" + "t" * 129,
        "x" * 256,
        "alpine@sha256:abc",
        f"alpine@{DIGEST.upper()}",
        f"alpine@{DIGEST}0",
        "alpine@md5:" + "0" * 32,
        "/alpine",
        "alpine/",
        "a//b",
        "a___b",
        "a..b",
        "a_",
        "https://registry.example.com/x",
        "registry.example.com:port/x",
        "älpine",
        "   ",
    ],
)
def test_an_image_is_nothing_else(image: str) -> None:
    assert problem_of(image=image).startswith(".image must be an image reference")


@given(st.lists(texts, min_size=1).filter(lambda tokens: any(t.strip() for t in tokens)))
def test_any_command_with_a_token_that_is_not_blank_survives_verbatim(tokens: list[str]) -> None:
    parsed = parse_payload(payload(command=tokens))
    assert parsed.task.container is not None
    assert parsed.task.container.command == tokens
    assert parsed.canonical()["task"]["container"]["command"] == tokens


@given(st.lists(st.text(" \t\n"), min_size=1))
def test_a_command_of_blank_tokens_is_refused(tokens: list[str]) -> None:
    assert problem_of(command=tokens) == ".command must have a token that is not blank"


@pytest.mark.parametrize("command", ["make test", {"sh": "-c"}, 5])
def test_a_command_is_a_list(command: object) -> None:
    assert problem_of(command=command) == (
        '.command must be a list of strings, as in ["sh", "-c", "make"]'
    )


def test_tokens_are_strings() -> None:
    assert problems_of(payload(command=["sleep", 5, None, ["x"]])) == {
        "task.container.command[1]": (
            "task.container.command[1] must be a string: write it in quotes"
        ),
        "task.container.command[2]": "task.container.command[2] must be a string",
        "task.container.command[3]": "task.container.command[3] must be a string",
    }


# env and secretEnv


@given(st.dictionaries(env_names, texts))
def test_env_is_kept_as_it_is(env: dict[str, str]) -> None:
    assert spec_of(env=env).env == env


@pytest.mark.parametrize("field", ["env", "secretEnv"])
@pytest.mark.parametrize("reserved", sorted(RESERVED_ENV))
@pytest.mark.parametrize("case", [str.upper, str.lower, str.title])
def test_reserved_names_are_refused_in_any_case_of_letters(
    field: str, reserved: str, case: Any
) -> None:
    name = case(reserved)
    assert problem_of(**{field: {name: "env://X"}}) == (
        f".{field}.{name} is set by the run itself and may not be set by the payload"
    )


@pytest.mark.parametrize("field", ["env", "secretEnv"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", '[""] has a blank name'),
        (" \t", '[" \\t"] has a blank name'),
        ("A=hunter2", '["A=..."] may not have "=" in its name'),
        (" A", '[" A"] may have neither blanks around its name nor control characters in it'),
        ("A\n", '["A\\n"] may have neither blanks around its name nor control characters in it'),
        ("A\0B", '["A\\u0000B"] may not have a NUL character'),
    ],
)
def test_an_env_name_is_printable_text_without_an_equals_sign(
    field: str, name: str, message: str
) -> None:
    assert problem_of(**{field: {name: "env://X"}}) == f".{field}{message}"


def test_an_env_value_is_a_string_and_a_number_is_to_be_quoted() -> None:
    env = {"A": 1, "B": True, "C": 1.5, "D": None, "E": ["x"], "F": "fine"}
    assert problems_of(payload(env=env)) == {
        "task.container.env.A": "task.container.env.A must be a string: write it in quotes",
        "task.container.env.B": "task.container.env.B must be a string: write it in quotes",
        "task.container.env.C": "task.container.env.C must be a string: write it in quotes",
        "task.container.env.D": "task.container.env.D must be a string",
        "task.container.env.E": "task.container.env.E must be a string",
    }


@pytest.mark.parametrize("field", ["env", "secretEnv"])
def test_env_is_an_object(field: str) -> None:
    assert problem_of(**{field: ["API_KEY=hunter2"]}) == f".{field} must be an object"


@pytest.mark.parametrize(
    ("given", "reference"),
    [
        ("env://GITHUB_TOKEN", SecretReference("env", "GITHUB_TOKEN")),
        ("env://my.api key", SecretReference("env", "my.api key")),
        ("file:///run/secrets/key", SecretReference("file", "/run/secrets/key")),
        ("file:///a/..b/c", SecretReference("file", "/a/..b/c")),
        ("vault://kv/team/x#token", SecretReference("vault", "kv/team/x#token")),
        (" VAULT://kv/x#y ", SecretReference("vault", "kv/x#y")),
    ],
)
def test_a_secret_reference_is_read(given: str, reference: SecretReference) -> None:
    assert parse_secret_reference(given) == reference
    assert parse_secret_reference(str(reference)) == reference
    assert spec_of(secretEnv={"X": given}).secret_env == {"X": str(reference)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hunter2-sekrit",
        "https://hunter2-sekrit",
        "env://",
        "env://hunter2=sekrit",
        "env://hunter2\nsekrit",
        "file://hunter2/sekrit",
        "file:///a/../hunter2-sekrit",
        "file:///hunter2-sekrit/..",
        "file:///hunter2\0sekrit",
        "vault://hunter2-sekrit",
        "vault://hunter2/./sekrit#x",
        "vault://hunter2/sekrit#x#y",
        "vault://hunter2/sekrit?#x",
    ],
)
def test_what_is_no_secret_reference_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must be ") as caught:
        parse_secret_reference(text)
    assert "hunter2" not in str(caught.value)
    message = problem_of(secretEnv={"X": text})
    assert message.startswith(".secretEnv.X m")
    assert "hunter2" not in message


@pytest.mark.parametrize("name", ["my.setting", "a-b", "1A", "a b", "Ä", "A\u0663"])
def test_a_name_in_secret_env_is_one_that_shells_pass_on(name: str) -> None:
    assert problem_of(secretEnv={name: "env://A"}).endswith(
        " must be a name of letters, digits and '_', the first no digit: shells drop any other"
    )
    assert spec_of(env={name: "x"})
    assert spec_of(secretEnv={"_a_B1": "env://A"})


@pytest.mark.parametrize("name", ["api.key", "github-token", "2_SECRET"])
def test_a_name_in_env_that_looks_secret_is_one_that_shells_pass_on(name: str) -> None:
    message = problem_of(env={name: "hunter2"})
    assert message.endswith(
        " looks like a secret, whose name must be letters, digits and '_', the first no digit: "
        "shells drop any other"
    )
    assert "hunter2" not in message


def test_a_name_is_in_env_or_in_secret_env() -> None:
    assert problem_of(env={"A": "x", "B": "y"}, secretEnv={"A": "env://A"}) == (
        ".secretEnv.A is in task.container.env too: remove one of them"
    )


# Where, how long, with what


@pytest.mark.parametrize(
    ("given", "subdir"),
    [("out", "out"), ("a/b", "a/b"), ("./a//b/", "a/b"), ("catalogs", "catalogs"), ("a/logs",) * 2],
)
def test_artifacts_subdir_is_a_relative_path(given: str, subdir: str) -> None:
    assert spec_of(artifactsSubdir=given).artifacts_subdir == subdir


@pytest.mark.parametrize("given", ["", " ", ".", "/", "/abs", "..", "a/../b", "../a", " /a"])
def test_artifacts_subdir_stays_inside(given: str) -> None:
    assert problem_of(artifactsSubdir=given) == (
        '.artifactsSubdir must be a relative path, not empty and without ".."'
    )


@pytest.mark.parametrize("given", ["logs", "./logs/", "Logs", "logs/mine"])
def test_artifacts_subdir_is_not_where_the_logs_of_the_stage_are(given: str) -> None:
    assert problem_of(artifactsSubdir=given) == (
        '.artifactsSubdir may not be "logs" or below it: the logs of the stage are there'
    )


@pytest.mark.parametrize(
    ("field", "least"),
    [("timeoutSeconds", 1), ("gracePeriodSeconds", 0)],
)
@pytest.mark.parametrize("given", [-1, 1.5, 2.0, True, "60", "", [], {}])
def test_seconds_are_whole_numbers(field: str, least: int, given: object) -> None:
    assert problem_of(**{field: given}) == f".{field} must be an integer of at least {least}"


def test_a_time_limit_of_zero_is_refused_and_a_grace_period_of_zero_is_not() -> None:
    assert problem_of(timeoutSeconds=0) == ".timeoutSeconds must be an integer of at least 1"
    assert spec_of(gracePeriodSeconds=0).grace_period_seconds == 0


@pytest.mark.parametrize("field", ["timeoutSeconds", "gracePeriodSeconds"])
@pytest.mark.parametrize("given", [MAX_SECONDS + 1, 2**63, 2**64 + 1, 10**400])
def test_nothing_may_take_longer_than_a_year(field: str, given: int) -> None:
    assert problem_of(**{field: given}) == f".{field} must be 31536000 at most, a year"
    assert spec_of(**{field: MAX_SECONDS})


@pytest.mark.parametrize(
    ("memory", "size"),
    [
        ("512", 512),
        ("512b", 512),
        ("1k", 1024),
        ("512m", 512 * 1024**2),
        ("16g", 16 * 1024**3),
        ("16G", 16 * 1024**3),
        ("16gb", 16 * 1024**3),
        ("16GiB", 16 * 1024**3),
        ("1.5 g", 3 * 1024**3 // 2),
        ("2t", 2 * 1024**4),
    ],
)
def test_memory_is_read_as_docker_reads_it(memory: str, size: int) -> None:
    resources = spec_of(resources={"memory": memory}).resources
    assert resources is not None
    assert resources.memory == memory
    assert resources.memory_bytes == size


@pytest.mark.parametrize("memory", ["", "0", "0g", "16Gi", "g", "-1g", "1e3", "16 gigs", "1٣g"])
def test_memory_is_nothing_else(memory: str) -> None:
    assert problem_of(resources={"memory": memory}) == (
        '.resources.memory must be a size as Docker writes it: "512m" or "16g"'
    )


def test_memory_is_a_string() -> None:
    assert problem_of(resources={"memory": 16}) == (
        ".resources.memory must be a string: write it in quotes"
    )


@pytest.mark.parametrize("cpus", [0, -1, True, "2", 10**400, []])
def test_cpus_is_a_number_above_zero(cpus: object) -> None:
    assert problem_of(resources={"cpus": cpus}) == ".resources.cpus must be a number above 0"


def test_resources_may_be_given_in_part() -> None:
    resources = spec_of(resources={"cpus": 2}).resources
    assert resources is not None
    assert resources.cpus == 2
    assert resources.memory_bytes is None


@pytest.mark.parametrize(
    ("field", "given", "expected"),
    [
        ("pull", "never", "'if-missing' or 'always'"),
        ("pull", 5, "'if-missing' or 'always'"),
        ("cache", "yes", "'never' or 'reuse'"),
        ("writeBack", "all", "'none' or 'changes'"),
        ("retryable", "yes", "true or false"),
        ("workdir", 5, "a string: write it in quotes"),
        ("workspace", [], "an object"),
        ("cacheVolumes", {}, "a list"),
    ],
)
def test_a_wrong_value_is_answered_with_the_right_ones(
    field: str, given: object, expected: str
) -> None:
    assert problem_of(**{field: given}) == f".{field} must be {expected}"


def test_the_defaults_keep_moonminds_behaviour() -> None:
    spec = spec_of()
    assert spec.pull is PullMode.IF_MISSING
    assert spec.cache is CacheMode.NEVER
    assert spec.write_back is None
    assert spec.timeout_seconds is None
    assert spec.grace_period_seconds == 10
    assert spec.artifacts_subdir == "container"
    assert spec.workdir is None
    assert spec.retryable
    assert (spec.workspace.include, spec.workspace.exclude) == ([], [])
    assert not spec.workspace.gitignore
    assert (spec.artifacts.max_bytes, spec.artifacts.max_files) == (None, None)


def test_everything_can_be_said() -> None:
    spec = spec_of(
        pull="Always",
        cache="reuse",
        writeBack="changes",
        workdir="/work",
        retryable=False,
        workspace={"include": ["src/**"], "exclude": ["*.o"], "gitignore": True},
        artifacts={"include": ["*"], "exclude": ["*.tmp"], "maxBytes": 1, "maxFiles": 0},
        cacheVolumes=[{"name": "pip", "target": "/root/.cache/pip"}],
    )
    assert spec.pull is PullMode.ALWAYS
    assert spec.cache is CacheMode.REUSE
    assert spec.write_back is WriteBack.CHANGES
    assert spec.workspace.gitignore
    assert (spec.artifacts.max_bytes, spec.artifacts.max_files) == (1, 0)
    assert spec.cache_volumes[0].target == "/root/.cache/pip"
    assert not warnings_of(parse_payload(payload()))


def test_cache_volumes_have_a_name_an_absolute_target_and_nothing_else() -> None:
    volumes = [
        {"name": "-x", "target": "relative"},
        {"target": "/a,b"},
        {"name": "a=b", "target": "/c", "readonly": True},
        "pip:/root",
        {"name": "Ok_1.2-3", "target": "/ok"},
    ]
    assert problems_of(payload(cacheVolumes=volumes)) == {
        f"task.container.cacheVolumes{path}": f"task.container.cacheVolumes{path} {fault}"
        for path, fault in {
            "[0].name": "must be letters, digits, '_', '.' and '-', the first a letter or digit",
            "[0].target": 'must be an absolute path without ","',
            "[1].target": 'must be an absolute path without ","',
            "[1].name": "is required",
            "[2].name": "must be letters, digits, '_', '.' and '-', the first a letter or digit",
            "[2].readonly": "is not known here: remove it",
            "[3]": "must be an object",
        }.items()
    }


@pytest.mark.parametrize("target", ["/x", "/y/../x/", "//x", "/../x", "/./x"])
def test_two_cache_volumes_do_not_share_a_target(target: str) -> None:
    volumes = [{"name": "a", "target": "/x"}, {"name": "b", "target": target}]
    assert problem_of(cacheVolumes=volumes) == (
        ".cacheVolumes[1].target is another volume's target too"
    )


OURS = '"/.moonmind" or below it: the run keeps its own files there'


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        *[(path, '"/": the volume would hide the image') for path in ("/", "//", "/./", "/a/..")],
        *[
            (path, OURS)
            for path in ("/.moonmind", "/.moonmind/out", "//.moonmind/", "/a/../.moonmind")
        ],
    ],
)
def test_a_cache_volume_hides_neither_the_image_nor_the_runs_own_files(
    target: str, fault: str
) -> None:
    volumes = [{"name": "a", "target": target}]
    assert problem_of(cacheVolumes=volumes) == f".cacheVolumes[0].target may not be {fault}"


@pytest.mark.parametrize("target", ["/.moonminder", "/home/.moonmind", "/.moon"])
def test_a_cache_volume_may_be_beside_the_runs_own_files(target: str) -> None:
    assert spec_of(cacheVolumes=[{"name": "a", "target": target}]).cache_volumes


@pytest.mark.parametrize("name", ["moonmind-control", "moonmind-control-abc"])
def test_a_cache_volume_is_not_the_one_that_runs_are_stopped_through(name: str) -> None:
    assert problem_of(cacheVolumes=[{"name": name, "target": "/a"}]) == (
        '.cacheVolumes[0].name may not begin with "moonmind-control": '
        "the engine keeps requests to stop a run there"
    )


@pytest.mark.parametrize(
    "workdir",
    [
        "/.moonmind",
        "/.moonmind/out",
        "//.moonmind",
        "/a/../.moonmind",
        " /.moonmind/ ",
        "../../../.moonmind/out",
    ],
)
def test_a_command_does_not_start_among_the_runs_own_files(workdir: str) -> None:
    assert problem_of(workdir=workdir) == f".workdir may not be {OURS}"


@pytest.mark.parametrize("workdir", [".moonmind", "a/../.moonmind", "/.moonminder", "..", "/"])
def test_a_command_may_start_anywhere_else(workdir: str) -> None:
    assert spec_of(workdir=workdir).workdir == workdir


# Errors


def test_everything_wrong_is_reported_at_once_in_the_order_of_the_payload() -> None:
    data = {
        "task": {
            "container": {
                "pull": "never",
                "cacheVolumes": [{"name": "a", "target": "/x"}, {"target": "/x"}],
                "secretEnv": {"TWICE": "env://A", "B": "hunter2"},
                "env": {"TWICE": "x", "N": 1, "": "x"},
                "enabled": True,
                "command": ["a", "\0"],
            },
            "instructions": "",
        },
        "targetRuntime": "gpt",
    }
    assert list(problems_of(data)) == [
        "task.container.pull",
        "task.container.cacheVolumes[1].target",
        "task.container.cacheVolumes[1].name",
        "task.container.secretEnv.TWICE",
        "task.container.secretEnv.B",
        "task.container.env.N",
        'task.container.env[""]',
        "task.container.command[1]",
        "task.container.image",
        "task.instructions",
        "targetRuntime",
        "repository",
    ]


def test_an_error_is_its_messages_line_by_line_and_can_be_pickled() -> None:
    error = TaskContractError(Problem("a", "a is wrong"), Problem("b", "b is wrong"))
    assert str(error) == "a is wrong\nb is wrong"
    copy = pickle.loads(pickle.dumps(error))
    assert copy.problems == error.problems
    assert isinstance(error, ValueError)


def test_an_error_holds_no_value_of_env_not_even_in_what_caused_it() -> None:
    data = payload(env={"A": ["hunter2"], "B=hunter2": "hunter2"}, secretEnv={"C": "hunter2"})
    with pytest.raises(TaskContractError) as caught:
        parse_payload(data)
    assert "hunter2" not in repr(caught.value)
    assert caught.value.__context__ is None


@given(anything)
def test_arbitrary_json_raises_nothing_but_contract_errors(data: Any) -> None:
    for parse in (parse_payload, parse_any):
        with suppress(TaskContractError):
            assert isinstance(parse(data), TaskPayload)


fields_of_container = st.sampled_from([*ContainerSpec.known(), "other"])


@given(st.dictionaries(fields_of_container, anything), anything, anything)
def test_arbitrary_values_of_fields_raise_nothing_but_contract_errors_that_name_their_path(
    fields: dict[str, Any], auth: Any, rest: Any
) -> None:
    data = payload(**fields) | {"auth": auth}
    data["task"] |= {"skill": rest, "runtime": rest, "git": rest, "publish": rest, "more": rest}
    try:
        parsed = parse_payload(data)
    except TaskContractError as error:
        for problem in error.problems:
            assert problem.message.startswith(problem.path + " ")
            assert "\0" not in problem.message
            assert problem.message.isascii() or problem.message.isprintable()
    else:
        json.dumps(parsed.canonical(), allow_nan=False).encode()
        warnings_of(parsed)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("a\0b", "may not have a NUL character"),
        ("\ud800", "may not have half a surrogate pair"),
        (float("nan"), "must be a finite number"),
        (float("inf"), "must be a finite number"),
        (b"x", "must be JSON"),
        ({1: 2}, "may only have names that are strings"),
    ],
)
def test_what_the_queue_cannot_store_is_refused_wherever_it_stands(
    value: object, fault: str
) -> None:
    assert problem_of(note=[value]) == f".note[0] {fault}"
    assert problems_of(payload() | {"more": value}) == {"more": f"more {fault}"}


@pytest.mark.parametrize("depth", [101, 500, 20_000])
def test_what_is_nested_too_deeply_is_refused(depth: int) -> None:
    deep: Any = []
    for _ in range(depth):
        deep = [deep]
    assert problems_of(payload() | {"more": deep}) == {
        "more[0]": "more[0] is nested deeper than 100 levels"
    }


def test_fifty_thousand_wrong_names_take_no_time() -> None:
    assert len(problems_of(payload(env={f"N{n}": n for n in range(50_000)}))) == 50_000


# The canonical form


def test_the_canonical_form_is_moonminds() -> None:
    data = payload(env={"A": "1"}, timeoutSeconds=60) | {"requiredCapabilities": ["GPU", "git"]}
    assert parse_payload(data).canonical() == {
        "repository": "owner/name",
        "targetRuntime": "codex",
        "requiredCapabilities": ["gpu", "git", "codex", "docker"],
        "auth": None,
        "task": {
            "instructions": "Test it",
            "skill": {"id": "auto", "args": {}, "requiredCapabilities": None},
            "runtime": {"mode": "codex", "model": None, "effort": None},
            "git": {"startingBranch": None, "newBranch": None},
            "publish": {
                "mode": "branch",
                "prBaseBranch": None,
                "commitMessage": None,
                "prTitle": None,
                "prBody": None,
            },
            "container": {
                "enabled": True,
                "image": "alpine:3.20",
                "command": ["true"],
                "workdir": None,
                "env": {"A": "1"},
                "artifactsSubdir": None,
                "timeoutSeconds": 60,
                "resources": None,
                "pull": None,
                "cacheVolumes": None,
            },
        },
    }


def test_our_own_fields_are_in_the_canonical_form_only_when_they_were_given() -> None:
    ours = {
        "secretEnv": {"A": "env://A"},
        "gracePeriodSeconds": 10,
        "writeBack": "none",
        "workspace": {"gitignore": True},
        "cache": "never",
        "retryable": True,
        "artifacts": {"maxFiles": 5},
    }
    plain = parse_payload(payload()).canonical()["task"]["container"]
    assert parse_payload(payload(**ours)).canonical()["task"]["container"] == plain | ours


def test_required_capabilities_are_what_was_given_then_what_the_task_needs() -> None:
    data = with_task(
        runtime="gemini",
        publish={"mode": "pr"},
        skill={"requiredCapabilities": ["Browser", "git"]},
        container=container(),
    )
    data["requiredCapabilities"] = [" GPU ", "gpu", "", "docker"]
    assert parse_payload(data).canonical()["requiredCapabilities"] == [
        *("gpu", "docker", "gemini", "git", "gh", "browser"),
    ]
    assert parse_payload(with_task()).canonical()["requiredCapabilities"] == ["codex", "git"]


def test_unknown_keys_are_kept_at_every_level() -> None:
    data = payload(note={"a": None}, resources={"cpus": 1, "gpus": 2}) | {"affinity": None, "n": 1}
    data["task"] |= {"title": "x", "git": {"depth": 1}, "skill": {"id": "s", "version": 2}}
    canonical = parse_payload(data).canonical()
    assert canonical["affinity"] is None
    assert canonical["n"] == 1
    assert canonical["task"]["title"] == "x"
    assert canonical["task"]["git"]["depth"] == 1
    assert canonical["task"]["skill"]["version"] == 2
    assert canonical["task"]["container"]["note"] == {"a": None}
    assert canonical["task"]["container"]["resources"] == {"cpus": 1, "gpus": 2}


valid_containers = st.fixed_dictionaries(
    {"command": st.lists(texts, min_size=1).map(lambda tokens: ["x", *tokens])},
    optional={
        "enabled": st.sampled_from([True, False, "yes", "off", None]),
        "workdir": texts.filter(lambda path: "moonmind" not in path) | st.none(),
        "env": st.dictionaries(env_names | secret_names, texts) | st.none(),
        "artifactsSubdir": st.sampled_from(["out", "a/./b/", None]),
        "timeoutSeconds": st.integers(1, MAX_SECONDS) | st.none(),
        "resources": st.fixed_dictionaries(
            {}, optional={"cpus": st.integers(1, 99), "memory": st.just("2g"), "x": st.none()}
        ),
        "pull": st.sampled_from(["ALWAYS", "if-missing", None]),
        "cacheVolumes": st.just([{"name": "a", "target": "/a"}]) | st.none(),
        "secretEnv": st.dictionaries(st.just("other"), st.just("VAULT://kv/x#y")) | st.none(),
        "writeBack": st.sampled_from(["changes", None]),
        "workspace": st.just({"include": ["a"]}) | st.none(),
        "nonsense": st.none() | texts,
    },
)
valid_payloads = st.builds(
    lambda spec, caps, runtime, extra: {
        "repository": "owner/name",
        "requiredCapabilities": caps,
        "targetRuntime": runtime,
        "task": {
            "instructions": "x",
            "container": {"image": "x", "enabled": True, **spec},
            **extra,
        },
    },
    valid_containers,
    st.lists(texts) | st.none(),
    st.sampled_from(["universal", "Claude", "", None]),
    st.fixed_dictionaries({}, optional={"publish": st.just({"mode": "PR"}), "more": texts}),
).filter(lambda data: "other" not in (data["task"]["container"].get("env") or {}))


@given(valid_payloads)
def test_canonicalising_twice_is_canonicalising_once(data: dict[str, Any]) -> None:
    once = parse_payload(data).canonical()
    assert parse_payload(once).canonical() == once
    assert loads(json.dumps(once)) == once


@given(valid_payloads)
def test_the_canonical_form_means_the_same(data: dict[str, Any]) -> None:
    parsed = parse_payload(data)
    again = parse_payload(parsed.canonical())
    assert again.task == parsed.task
    assert again.target_runtime == parsed.target_runtime


# What is published


@given(valid_payloads)
def test_what_is_published_holds_no_secret_and_can_be_run_again(data: dict[str, Any]) -> None:
    parsed = parse_payload(data)
    published = publishable(parsed)
    again = parse_payload(published)
    before, after = parsed.task.container, again.task.container
    assert before is not None
    assert after is not None
    assert not [name for name in after.env if looks_secret(name)]
    assert set(after.env) | set(after.secret_env) == set(before.env) | set(before.secret_env)
    assert publishable(again) == published
    assert not [warning for warning in warnings_of(again) if "looks like a secret" in warning]


def test_a_secret_in_the_open_becomes_a_reference_and_references_stay() -> None:
    parsed = parse_payload(
        payload(env={"API_KEY": "hunter2", "CI": "1"}, secretEnv={"T": "file:///run/t"})
    )
    published = publishable(parsed)
    assert published["task"]["container"]["env"] == {"CI": "1"}
    assert published["task"]["container"]["secretEnv"] == {
        "T": "file:///run/t",
        "API_KEY": "env://API_KEY",
    }
    assert "hunter2" not in json.dumps(published)
    assert parsed.canonical()["task"]["container"]["env"]["API_KEY"] == "hunter2"


def test_without_a_secret_in_the_open_the_canonical_form_is_published() -> None:
    for data in (payload(env={"CI": "1"}), with_task()):
        assert publishable(parse_payload(data)) == parse_payload(data).canonical()


# Warnings


def test_an_unknown_key_of_the_container_is_warned_about_with_the_nearest_known_name() -> None:
    parsed = parse_payload(
        payload(
            timeoutSecond=5,
            Env={},
            zzz=1,
            resources={"memroy": "1g"},
            workspace={"exlude": []},
            artifacts={"max_byte": 1},
            **{"a b": 1},
        )
    )
    assert warnings_of(parsed) == [
        "task.container.timeoutSecond is not known; did you mean timeoutSeconds?",
        "task.container.Env is not known; did you mean env?",
        "task.container.zzz is not known",
        'task.container["a b"] is not known',
        "task.container.resources.memroy is not known; did you mean memory?",
        "task.container.workspace.exlude is not known; did you mean exclude?",
        "task.container.artifacts.max_byte is not known; did you mean maxBytes?",
    ]


def test_a_secret_in_the_open_is_warned_about_without_its_value() -> None:
    (warning,) = warnings_of(parse_payload(payload(env={"API_KEY": "hunter2", "CI": "1"})))
    assert warning.startswith("task.container.env.API_KEY looks like a secret: ")
    assert '"secretEnv": {"API_KEY": "env://API_KEY"}' in warning
    assert "hunter2" not in warning


def test_references_and_what_is_outside_the_container_are_not_warned_about() -> None:
    data = payload(secretEnv={"API_KEY": "vault://kv/x#y"}) | {"unknown": 1}
    assert warnings_of(parse_payload(data)) == []
    assert warnings_of(parse_payload(with_task(unknown=1))) == []


@pytest.mark.parametrize(
    "name",
    [
        *("TOKEN", "GITHUB_TOKEN", "githubToken", "github-token", "TOKEN_2", "KEY1"),
        *("PASSWORD", "PGPASSWORD_PASSWORD", "db.password", "CLIENT_SECRET", "SECRETS"),
        *("GOOGLE_CREDENTIAL", "AWS_CREDENTIALS", "API_KEY", "apiKey", "APIKey", "API_KEYS"),
        *("AWS_SECRET_ACCESS_KEY", "PRIVATE_KEY", "KEY", "PUBLIC_KEY_PASSWORD"),
    ],
)
def test_a_name_looks_secret_when_one_of_its_words_says_so(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "CI", "PATH", "CACHE_KEY", "cacheKey", "PUBLIC_KEY", "SORT_KEY", "PRIMARY_KEY"),
        *("KEYBOARD", "MONKEY", "TOKENIZERS_PARALLELISM", "MAX_TOKENS", "SECRETARY", "keynote"),
    ],
)
def test_a_name_does_not_look_secret_because_a_word_contains_another(name: str) -> None:
    assert not looks_secret(name)


# What people write by hand


def test_a_whole_payload_and_a_job_are_taken_as_they_are() -> None:
    for data in (payload(), {"type": "task", "payload": payload()}):
        assert parse_any(data, repository="x/y") == parse_payload(payload())


def test_a_task_is_completed() -> None:
    parsed = parse_any({"container": container()}, repository="x/y")
    assert parsed.repository == "x/y"
    assert parsed.task.instructions == "Run the container task"
    assert parsed.task.publish.mode is PublishMode.NONE
    assert parsed.canonical()["requiredCapabilities"] == ["codex", "git", "docker"]


@pytest.mark.parametrize("name", ["instructions", "instruction"])
def test_what_a_task_says_is_not_replaced(name: str) -> None:
    parsed = parse_any({name: "Mine", "publish": {"mode": "pr"}, "container": container()})
    assert parsed.repository == "local/workspace"
    assert parsed.task.instructions == "Mine"
    assert parsed.task.publish.mode is PublishMode.PR


def test_a_container_that_stands_alone_is_enabled() -> None:
    spec = parse_any({"image": "alpine", "command": ["true"]}).task.container
    assert spec is not None
    assert spec.enabled
    spec = parse_any({"image": "alpine", "command": ["true"], "enabled": False}).task.container
    assert spec is not None
    assert not spec.enabled


def test_what_is_wrong_in_a_short_form_has_the_path_of_the_whole() -> None:
    with pytest.raises(TaskContractError) as caught:
        parse_any({"image": "alpine"})
    assert str(caught.value) == (
        "task.container.command is required when task.container.enabled=true"
    )


@pytest.mark.parametrize("data", [{}, {"repository": "a/b"}, [], "x", None])
def test_anything_else_is_told_the_three_shapes(data: object) -> None:
    with pytest.raises(TaskContractError, match=r'three shapes: .*"task".*"container".*"image"'):
        parse_any(data)


@given(st.dictionaries(fields_of_container, anything))
def test_a_container_written_by_hand_raises_nothing_but_contract_errors(
    fields: dict[str, Any],
) -> None:
    with suppress(TaskContractError):
        parse_any({"image": "alpine", **fields})


# JSON


def test_broken_json_is_named_by_line_and_column() -> None:
    with pytest.raises(TaskContractError, match="broken at line 2, column 6: Expecting ':'"):
        loads('{"a": 1,\n "b" 2}')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"x": {"a": 1, "a": 1}}', 'the JSON has the key "a" twice in one object'),
        ("[NaN]", "the JSON has NaN, which is no number in JSON"),
        ("[-Infinity]", "the JSON has -Infinity, which is no number in JSON"),
        (b"\xff\xfe\xfd", "the JSON is not text in UTF-8"),
        (b'"\xe4"', "the JSON is not text in UTF-8"),
        ("[" * 200_000, "the JSON is nested too deeply"),
        ("1" * 5000, "the JSON has a number with too many digits"),
    ],
)
def test_json_is_read_strictly(text: str | bytes, message: str) -> None:
    with pytest.raises(TaskContractError) as caught:
        loads(text)
    assert caught.value.problems == (Problem("", message),)


@given(st.binary() | st.text())
def test_arbitrary_text_raises_nothing_but_contract_errors(text: str | bytes) -> None:
    with suppress(TaskContractError):
        loads(text)


def test_json_in_utf_8_is_read() -> None:
    assert loads('{"ä": [1, null, "\\ud83d\\ude00"]}'.encode()) == {"ä": [1, None, "😀"]}


def test_the_module_imports_no_dagger() -> None:
    code = "import sys, pipelines.payload; sys.exit('dagger' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
