"""Secrets that payloads refer to, from a Vault with a KV version 2 store."""

from dataclasses import dataclass, field

import anyio
import anyio.to_thread
import httpx

from moonmind_ext.worker.settings import VaultSettings
from pipelines.payload import parse_secret_reference

_PASSING = {401, 403, 429}
"""A token of the worker's that has run out, and a rate limit: not the payload's fault."""


class VaultError(Exception):
    """A secret that cannot be had; the message holds the reference, never a value.

    Attributes
    ----------
    may_pass
        Whether it may be had later: Vault did not answer.
    """

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret's value, and what stands beside it in Vault: its user and its host."""

    value: str = field(repr=False)
    username: str = "x-access-token"
    host: str = "github.com"


def _token(settings: VaultSettings, reference: str) -> str:
    if settings.token_file is None:
        return settings.token
    try:
        return settings.token_file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise VaultError(f"{reference}: Vault's token: {error}", may_pass=True) from error


async def read_secret(settings: VaultSettings | None, reference: str) -> Secret:
    """Resolve a `vault://mount/path#field` reference.

    Raises
    ------
    VaultError
        When it cannot be, or its mount is not one of the settings'.
    """
    if settings is None:
        raise VaultError(f"{reference}: this worker has no Vault; set MOONMIND_VAULT_ADDR")
    location, _, name = parse_secret_reference(reference).location.partition("#")
    mount, _, path = location.partition("/")
    if mount not in settings.mounts:
        allowed = ", ".join(settings.mounts)
        raise VaultError(f"{reference}: MOONMIND_VAULT_ALLOWED_MOUNTS allows only {allowed}")
    headers = {"X-Vault-Token": await anyio.to_thread.run_sync(_token, settings, reference)}
    if settings.namespace:
        headers["X-Vault-Namespace"] = settings.namespace
    url = f"{settings.address}/v1/{mount}/data/{path}"
    try:
        with anyio.fail_after(settings.seconds):
            async with httpx.AsyncClient(timeout=settings.seconds) as http:
                answer = await http.get(url, headers=headers)
    except (httpx.HTTPError, TimeoutError) as error:
        why = str(error) or f"no answer within {settings.seconds:g}s"
        raise VaultError(f"{reference}: Vault: {why}", may_pass=True) from error
    if not answer.is_success:
        raise VaultError(
            f"{reference}: Vault: {answer.status_code} {answer.reason_phrase}",
            may_pass=answer.is_server_error or answer.status_code in _PASSING,
        )
    try:
        data = answer.json()["data"]["data"]
        value = data[name]
        username, host = data.get("username"), data.get("host")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        value = username = host = None
    # Text, or what was put there without quotes; not a whole object.
    if not isinstance(value, str | int | float):
        raise VaultError(f"{reference}: Vault has no such field")
    return Secret(str(value), username or "x-access-token", host or "github.com")
