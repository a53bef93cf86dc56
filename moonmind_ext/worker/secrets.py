"""The values behind a payload's secret references, as a worker may resolve them."""

import os
from collections.abc import Mapping

from moonmind_ext.run.secrets import resolve_secrets
from moonmind_ext.worker.settings import TELEMETRY_SECRETS, WorkerSettings, without_secrets
from moonmind_ext.worker.vault import read_secret
from pipelines.payload import parse_secret_reference


async def payload_secrets(
    references: Mapping[str, str], settings: WorkerSettings
) -> dict[str, str]:
    """Find the value of every reference: in Vault, in files, and in the environment.

    The worker's own credentials are not found.

    Parameters
    ----------
    references
        By variable name, as in `secretEnv`; those that are allowed.

    Raises
    ------
    SecretError
        When some have no value here.
    VaultError
        When Vault does not give one.
    """
    in_vault = {
        name: text
        for name, text in references.items()
        if parse_secret_reference(text).scheme == "vault"
    }
    own = {name: text for name, text in references.items() if name not in in_vault}
    environment = without_secrets(os.environ, *TELEMETRY_SECRETS)
    secrets = resolve_secrets(own, environment=environment, given={})
    for name, text in in_vault.items():
        secrets[name] = (await read_secret(settings.vault, text)).value
    return secrets
