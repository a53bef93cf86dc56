"""What a worker refuses: jobs of another kind, images and secrets that nobody allowed."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moonmind_ext.worker.policy import (
    foreign_reason,
    image_refusal,
    secret_refusal,
    subdir_refusal,
)

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize("job_type", ["codex_exec", "codex_skill", "Task", ""])
def test_a_job_of_another_type_is_foreign(job_type: str) -> None:
    reason = foreign_reason(job_type, {"task": {"container": {"enabled": True}}})
    assert reason is not None
    assert repr(job_type) in reason


@pytest.mark.parametrize(
    "payload",
    [
        None,
        "text",
        [],
        {},
        {"task": None},
        {"task": []},
        {"task": {}},
        {"task": {"container": None}},
        {"task": {"container": {}}},
        *({"task": {"container": {"enabled": off}}} for off in (False, None, 0, "0", "False", "")),
        *({"task": {"container": {"enabled": off}}} for off in ("no", " off ", "none")),
    ],
)
def test_a_task_without_an_enabled_container_is_foreign(payload: Any) -> None:
    reason = foreign_reason("task", payload)
    assert reason == "this worker runs container tasks only, and task.container is not enabled"


@pytest.mark.parametrize("on", [True, 1, "1", "true", "YES", "on"])
def test_a_container_task_is_ours(on: Any) -> None:
    assert foreign_reason("task", {"task": {"container": {"enabled": on}}}) is None


@pytest.mark.parametrize("enabled", ["perhaps", [], {}, 2])
def test_a_container_task_is_ours_though_it_is_invalid(enabled: Any) -> None:
    # MoonMind's own worker would refuse it too: then better here, in clear words.
    assert foreign_reason("task", {"task": {"container": {"enabled": enabled}}}) is None


@pytest.mark.parametrize(
    ("image", "pattern"),
    [
        ("python", "*"),
        ("python", "python"),
        ("python", "python:*"),
        ("python", "python:latest"),
        ("python", "docker.io/library/python"),
        ("python", "docker.io/library/python:latest"),
        ("python", "docker.io/*"),
        ("python:3.12", "python:3.*"),
        ("python:3.12", "docker.io/library/*"),
        ("acme/tool", "acme/*"),
        ("acme/tool", "docker.io/acme/tool:latest"),
        ("ghcr.io/acme/tool:1", "ghcr.io/acme/*"),
        ("ghcr.io/acme/tool", "ghcr.io/acme/tool:latest"),
        ("ghcr.io/acme/tool:1", "*/acme/*"),
        ("ghcr.io/acme/tool:1", "ghcr.io/acme/tool:[0-9]"),
        ("localhost:5000/tool", "localhost:5000/*"),
        ("localhost/tool", "localhost/tool:latest"),
        (f"python@{DIGEST}", f"python@{DIGEST}"),
        (f"python@{DIGEST}", "docker.io/library/python@*"),
        (f"python:3.12@{DIGEST}", "python:3.12@*"),
    ],
)
def test_an_image_is_allowed_under_each_of_its_names(image: str, pattern: str) -> None:
    assert image_refusal(image, ("nothing/else", pattern)) is None


@pytest.mark.parametrize(
    ("image", "pattern"),
    [
        ("python", "python:3.12"),
        ("python:3.12", "python"),
        ("Python", "python"),
        ("pythonista", "python"),
        ("acme/python", "python*"),
        ("ghcr.io/acme/tool", "acme/*"),
        ("ghcr.io/acme/tool", "docker.io/*"),
        ("ghcr.io/acme-evil/tool", "ghcr.io/acme/*"),
        ("ghcr.io.evil.example/acme/tool", "ghcr.io/acme/*"),
        ("localhost/tool", "docker.io/*"),
        ("localhost:5000/tool", "docker.io/*"),
        ("python:3.12", f"python@{DIGEST}"),
        (f"python@{DIGEST}", "python:*"),
        # Registries whose names look like an image's: `python` at port 5000.
        ("python:5000/evil/tool:1", "python:*"),
        ("python:5000/evil/tool:1", "python*"),
        ("python.evil.example/tool:1", "python*"),
        ("acme.evil.example/tool", "acme*"),
    ],
)
def test_another_image_is_refused(image: str, pattern: str) -> None:
    reason = image_refusal(image, (pattern,))
    assert reason == (
        f"task.container.image: {image} is not allowed on this worker; allowed are {pattern}"
    )


_NAMES = st.from_regex(r"[a-z0-9]{1,8}(/[a-z0-9]{1,8}){0,2}", fullmatch=True)


@given(_NAMES, st.from_regex(r"[a-z0-9]{1,8}(\.[a-z]{1,3}|:[0-9]{1,4})", fullmatch=True))
def test_no_image_of_a_registry_passes_for_one_of_docker_hub(name: str, registry: str) -> None:
    first = registry[0]
    for pattern in (
        "docker.io/*",
        f"{first}*",
        f"{registry.partition(':')[0]}:*",
        name,
        "library/*",
    ):
        if registry != "docker.io":
            assert image_refusal(f"{registry}/{name}", (pattern,)) is not None


def test_no_pattern_allows_no_image() -> None:
    assert image_refusal("python", ()) is not None


@pytest.mark.parametrize(
    ("reference", "pattern"),
    [
        ("vault://kv/team/npm#token", "vault://*"),
        ("vault://kv/team/npm#token", "vault://kv/team/*"),
        ("env://NPM_TOKEN", "env://NPM_TOKEN"),
        ("file:///run/secrets/ci-npm", "file:///run/secrets/ci-*"),
    ],
)
def test_a_secret_is_allowed_by_a_pattern(reference: str, pattern: str) -> None:
    assert secret_refusal("NPM", reference, (pattern,)) is None


@pytest.mark.parametrize(
    ("reference", "patterns", "shown"),
    [
        ("env://HOME", ("vault://*",), "vault://*"),
        ("env://npm_token", ("env://NPM_TOKEN",), "env://NPM_TOKEN"),
        ("env://NPM_TOKEN_2", ("env://NPM_TOKEN", "vault://*"), "env://NPM_TOKEN, vault://*"),
        ("file:///etc/shadow", ("file:///run/*",), "file:///run/*"),
        ("vault://kv/a#b", (), "none"),
    ],
)
def test_another_secret_is_refused_by_field_and_reference(
    reference: str, patterns: tuple[str, ...], shown: str
) -> None:
    assert secret_refusal("NPM", reference, patterns) == (
        f"task.container.secretEnv.NPM: {reference} is not allowed on this worker; "
        f"MOONMIND_WORKER_ALLOWED_SECRETS allows {shown}"
    )


def test_the_kernels_files_are_no_secrets_whatever_is_allowed() -> None:
    reference = "file:///proc/self/environ"
    assert secret_refusal("NAME", reference, ("*",)) is not None


@pytest.mark.parametrize("subdir", ["logs", "logs/mine", "task_context.json"])
def test_artifacts_do_not_go_where_the_workers_own_files_are(subdir: str) -> None:
    refusal = subdir_refusal(subdir)
    assert refusal is not None
    assert refusal.startswith("task.container.artifactsSubdir: ")
    assert subdir_refusal("container/logs") is None
