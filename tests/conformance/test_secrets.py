import base64

import pytest

from tests.conformance.support import Task, sh
from tests.engines import Engine

SECRET = "s3cr3t-Value/42"


async def test_a_secret_reaches_the_command_and_nothing_else(task: Task) -> None:
    script = (
        'test "${#DEPLOY}" = 15 || exit 9; echo "value $DEPLOY"; echo "$DEPLOY" >&2; '
        'printf %s "$DEPLOY" | base64; printf "%s%s" "${DEPLOY%???}" "${DEPLOY#????????????}"; '
        "exit 5"
    )
    result = await task(
        *sh(script),
        secretEnv={"DEPLOY": "env://DEPLOY"},
        secrets={"DEPLOY": SECRET},
    )

    assert result.report.exit_code == 5
    everything = result.every_file() + result.report.to_json()
    assert SECRET not in everything
    assert base64.b64encode(SECRET.encode()).decode()[:16] not in everything
    assert result.log.startswith(b"value ***\n***\n")
    assert SECRET not in result.watcher.live
    assert '"DEPLOY": "env://DEPLOY"' in result.artifact("metadata/payload.json")


@pytest.mark.parametrize("name", ["API_TOKEN", "DB_PASSWORD", "SSH_KEY"])
async def test_an_env_name_that_looks_secret_is_masked_too(task: Task, name: str) -> None:
    result = await task(*sh(f'echo "is ${name}"; test -n "${name}"'), env={name: SECRET})

    assert result.report.exit_code == 0
    assert result.log == b"is ***\n"
    assert SECRET not in result.every_file()
    assert any(name in warning for warning in result.report.warnings)
    assert f'"{name}": "env://{name}"' in result.artifact("metadata/payload.json")


async def test_a_secret_in_the_command_is_masked_wherever_the_command_is_shown(
    task: Task,
) -> None:
    result = await task(
        *sh(f"echo {SECRET}; exit 1"),
        secretEnv={"DEPLOY": "env://DEPLOY"},
        secrets={"DEPLOY": SECRET},
    )

    assert result.report.error == "container command failed (1): ***"
    assert SECRET not in result.every_file() + result.report.to_json()


async def test_a_secret_too_short_to_mask_is_warned_about(task: Task) -> None:
    result = await task(*sh("exit 0"), secretEnv={"PIN": "env://PIN"}, secrets={"PIN": "1234"})

    assert any("PIN" in warning and "masked" in warning for warning in result.report.warnings)


async def test_two_tasks_of_one_session_keep_their_secrets_apart(
    engine: Engine, task: Task
) -> None:
    async with engine.session() as session:
        for value in ("first-secret", "second-secret"):
            result = await task(
                *sh('printf %s "$DEPLOY" | cut -c 1-5 | tee $ARTIFACT_DIR/start'),
                secretEnv={"DEPLOY": "env://DEPLOY"},
                secrets={"DEPLOY": value},
                session=session,
            )
            assert result.artifact("start").strip() == value[:5]
