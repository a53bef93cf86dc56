"""How a worker's git runs: asking nobody, with its token for one host, trusting no checkout."""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from moonmind_ext.worker.settings import TELEMETRY_SECRETS, without_secrets

CLONE_SECONDS = 1800.0
"""For a clone or a push. A repository of some GB takes minutes; one that stands still
is noticed after `_STALLED_SECONDS`."""

LOCAL_SECONDS = 120.0
"""For git on the job's own disk: a checkout or an `add` of a large repository."""

_STALLED_SECONDS = 60

_SETTINGS = {
    # What a task has changed must not run outside of its container: not a hook, not a
    # file system monitor. Nor may git leave a process behind.
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "protocol.ext.allow": "never",
    "http.lowSpeedLimit": "1000",
    "http.lowSpeedTime": str(_STALLED_SECONDS),
    "advice.detachedHead": "false",
}


@dataclass(frozen=True, slots=True)
class Credential:
    """What a git server is told.

    Attributes
    ----------
    host
        The only one that gets it, with its port if it has one.
    """

    token: str = field(repr=False)
    username: str = "x-access-token"
    host: str = "github.com"

    @property
    def header(self) -> str:
        """The value of `Authorization`: a secret too, in a form of its own."""
        pair = f"{self.username}:{self.token}"
        return f"Basic {base64.b64encode(pair.encode()).decode()}"


def clone_url(repository: str) -> str:
    """Give the address to clone a payload's `repository` from.

    Parameters
    ----------
    repository
        `owner/name` on github.com, an HTTP address without credentials, or `git@…`.

    Raises
    ------
    ValueError
        When it is something else: a path on this host, or a transport that runs
        programs.
    """
    if re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", repository) and repository[0] not in ".-":
        return f"https://github.com/{repository.removesuffix('.git')}.git"
    # With a slash before its colon, git would take the last form for a path on this host.
    known = r"https?://[^@\s/?#\\]+/\S+|git@[^-\s:/][^\s:/]*:[^-\s]\S*"
    if re.fullmatch(known, repository) and repository.isprintable():
        return repository
    shown = re.sub("//[^/]*@", "//***@", repository)
    raise ValueError(
        f"repository {shown!r}: must be owner/name, an http(s) address without credentials, "
        "or git@host:path"
    )


def git_environment(
    environment: Mapping[str, str], credential: Credential | None
) -> dict[str, str]:
    """Give the environment for git and gh.

    The token is in no argument, no address and no file: git reads it as a setting
    that holds for one host, from the environment.

    Parameters
    ----------
    environment
        The worker's own; its credentials are left out.
    """
    result = without_secrets(environment, *TELEMETRY_SECRETS)
    settings = dict(_SETTINGS)
    if credential is not None:
        settings[f"http.https://{credential.host}/.extraHeader"] = (
            f"Authorization: {credential.header}"
        )
        # git would take the header along to whatever host it is sent to. A repository that
        # was renamed has to be named anew.
        settings["http.followRedirects"] = "false"
        is_githubs = re.fullmatch(r"github\.com|.+\.ghe\.com", credential.host)
        name = "GH_TOKEN" if is_githubs else "GH_ENTERPRISE_TOKEN"
        result |= {name: credential.token, "GH_HOST": credential.host}
    count = result.get("GIT_CONFIG_COUNT", "0")
    start = int(count) if count.isdecimal() else 0
    for index, (name, value) in enumerate(settings.items(), start):
        result |= {f"GIT_CONFIG_KEY_{index}": name, f"GIT_CONFIG_VALUE_{index}": value}
    result["GIT_CONFIG_COUNT"] = str(start + len(settings))
    # What went wrong is read from the messages, so they must be in English.
    result["LC_ALL"] = "C"
    # A question for a password would wait for ever.
    result["GIT_TERMINAL_PROMPT"] = "0"
    result.setdefault("GIT_SSH_COMMAND", "ssh -oBatchMode=yes -oConnectTimeout=30")
    return result
