"""Secrets from a Vault, and what is said when they cannot be had."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from moonmind_ext.worker.settings import VaultSettings
from moonmind_ext.worker.vault import Secret, VaultError, read_secret
from tests.worker.servers import Request, answer, http_server, json_answer, refusal

TOKEN = "hvs-0123456789abcdef"
VALUE = "value-0123456789"
REFERENCE = "vault://kv/team/npm#token"


def kv(data: Any) -> bytes:
    return json_answer({"data": {"data": data, "metadata": {"version": 1}}})


def settings(address: str, **changes: Any) -> VaultSettings:
    return VaultSettings(**{"address": address, "token": TOKEN, "seconds": 5.0, **changes})


@asynccontextmanager
async def vault(
    data: bytes | None, **changes: Any
) -> AsyncIterator[tuple[VaultSettings, list[Request]]]:
    asked: list[Request] = []

    async def respond(request: Request) -> bytes | None:
        asked.append(request)
        return data

    async with http_server(respond) as url:
        yield settings(url, **changes), asked


async def refused(data: bytes | None, **changes: Any) -> VaultError:
    async with vault(data, **changes) as (where, _):
        with pytest.raises(VaultError) as error:
            await read_secret(where, REFERENCE)
    assert str(error.value).startswith(f"{REFERENCE}: ")
    assert TOKEN not in str(error.value)
    assert VALUE not in str(error.value)
    return error.value


async def test_a_secret_is_read_from_its_mount_and_path() -> None:
    async with vault(kv({"token": VALUE, "other": "x"}), namespace="team") as (where, asked):
        assert await read_secret(where, REFERENCE) == Secret(VALUE)
    (request,) = asked
    assert (request.method, request.path) == ("GET", "/v1/kv/data/team/npm")
    assert request.headers["x-vault-token"] == TOKEN
    assert request.headers["x-vault-namespace"] == "team"


async def test_the_user_and_the_host_stand_beside_it() -> None:
    data = {"token": VALUE, "username": "bot", "host": "git.example"}
    async with vault(kv(data)) as (where, asked):
        assert await read_secret(where, REFERENCE) == Secret(VALUE, "bot", "git.example")
    assert "x-vault-namespace" not in asked[0].headers
    # Blank ones are as good as none.
    async with vault(kv({"token": VALUE, "username": "", "host": None})) as (where, _):
        assert await read_secret(where, REFERENCE) == Secret(VALUE, "x-access-token", "github.com")


async def test_a_number_is_a_value_too() -> None:
    async with vault(kv({"token": 12345678})) as (where, _):
        assert (await read_secret(where, REFERENCE)).value == "12345678"


async def test_without_a_vault_or_on_another_mount_nobody_is_asked() -> None:
    with pytest.raises(VaultError, match="this worker has no Vault; set MOONMIND_VAULT_ADDR"):
        await read_secret(None, REFERENCE)
    async with vault(kv({"token": VALUE}), mounts=("ci", "dev")) as (where, asked):
        with pytest.raises(VaultError, match="MOUNTS allows only ci, dev$") as error:
            await read_secret(where, REFERENCE)
        assert not error.value.may_pass
        assert asked == []


@pytest.mark.parametrize(
    ("status", "may_pass"),
    [(400, False), (403, True), (404, False), (429, True), (500, True), (503, True)],
)
async def test_a_refusal_says_its_status_and_whether_it_may_pass(
    status: int, may_pass: bool
) -> None:
    error = await refused(refusal(status, message=f"{TOKEN} {VALUE}"))
    assert f"Vault: {status} " in str(error)
    assert error.may_pass is may_pass


async def test_a_token_from_a_file_is_read_for_every_request(tmp_path: Path) -> None:
    file = tmp_path / "token"
    async with vault(kv({"token": VALUE}), token_file=file) as (where, asked):
        for token in ("first-token", "second-token"):
            file.write_text(f"{token}\n")
            await read_secret(where, REFERENCE)
        file.unlink()
        with pytest.raises(VaultError) as error:
            await read_secret(where, REFERENCE)
    assert [request.headers["x-vault-token"] for request in asked] == [
        "first-token",
        "second-token",
    ]
    assert error.value.may_pass


async def test_a_redirection_does_not_carry_the_token_elsewhere() -> None:
    async with vault(kv({"token": VALUE})) as (other, asked):
        error = await refused(answer(307, Location=f"{other.address}/v1/kv/data/team/npm"))
    assert "307" in str(error)
    assert asked == []


@pytest.mark.parametrize(
    "data",
    [
        kv({}),
        kv({"other": VALUE}),
        kv({"token": None}),
        kv({"token": {"nested": VALUE}}),
        kv({"token": [VALUE]}),
        kv(None),
        kv([VALUE]),
        json_answer({"data": None}),
        json_answer([]),
        answer(200, VALUE),
        answer(200, "[" * 100_000),
    ],
)
async def test_a_field_that_is_not_there_or_no_text_is_named(data: bytes) -> None:
    error = await refused(data)
    assert str(error) == f"{REFERENCE}: Vault has no such field"
    assert not error.may_pass


async def test_a_vault_that_does_not_answer_may_do_so_later() -> None:
    assert (await refused(None)).may_pass
    with pytest.raises(VaultError) as error:
        await read_secret(settings("http://127.0.0.1:9"), REFERENCE)
    assert error.value.may_pass

    async def respond(_: Request) -> bytes | None:
        await anyio.sleep_forever()
        return None

    async with http_server(respond) as url:
        with pytest.raises(VaultError, match="no answer within 0.2s$") as error:
            await read_secret(settings(url, seconds=0.2), REFERENCE)
    assert error.value.may_pass


def test_a_secret_does_not_show_its_value() -> None:
    assert VALUE not in repr(Secret(VALUE))
