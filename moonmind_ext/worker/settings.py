"""What a worker is told before it starts. Pure; MoonMind's names where it has them."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError

from moonmind_ext.engine.choice import EngineChoice
from pipelines.payload import DEFAULT_TIMEOUT_SECONDS, Resources
from pipelines.plan import DEFAULT_HELPER_IMAGE, DEFAULT_WORKDIR

TASK = "task"
"""The one type of job that this worker runs."""

DEFAULT_CAPABILITIES = ("git", "docker", "codex", "gemini", "claude")
"""A container task needs the runtime that its payload names, though only an agent
would use it: so all of them."""

DEFAULT_DRAIN_SECONDS = 60.0
"""Below what Kubernetes and Compose are commonly told to wait before they kill."""

WORKER_SECRETS = (
    *("MOONMIND_WORKER_TOKEN", "MOONMIND_VAULT_TOKEN"),
    *("GITHUB_TOKEN", "GH_TOKEN", "GITHUB_ENTERPRISE_TOKEN", "GH_ENTERPRISE_TOKEN"),
)
"""Variables that hold the worker's own credentials: no process that it starts gets them."""

TELEMETRY_SECRETS = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")
"""These too may hold one. The engine's session needs them for its own spans; nobody else
gets them."""

_MAX_WORKER_ID = 255


class SettingsError(Exception):
    """A setting that no worker can start with; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultSettings:
    """Where `vault://` references are resolved: a KV version 2 store.

    Attributes
    ----------
    mounts
        Those that a payload may name.
    token_file
        Where the token is, if it is in a file: read for every request, since who puts
        it there also renews it.
    seconds
        For one request.
    """

    address: str
    token: str = field(repr=False)
    token_file: Path | None = None
    namespace: str | None = None
    mounts: tuple[str, ...] = ("kv",)
    seconds: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Everything that is fixed while a worker runs.

    Attributes
    ----------
    url
        Base address of MoonMind's API, without a slash at its end.
    worker_id
        Whose jobs these are, in the server's records.
    token
        The worker's token; None where the server asks for none.
    poll_seconds
        From an empty queue to the next question.
    lease_seconds
        For how long a job is this worker's after a heartbeat.
    workdir
        Absolute; holds a directory for each job.
    capabilities
        What the queue compares with a job's `requiredCapabilities`.
    allowed_images
        Patterns; an image must fit one of them.
    allowed_secrets
        Patterns of the references that a payload's `secretEnv` may name.
    concurrency
        Jobs at once, at most.
    drain_seconds
        For running jobs, from the first SIGTERM until they are stopped.
    cpus, memory_bytes
        What the engine has; tasks run together while their requests fit in.
    github_token, github_host
        The credential for cloning and publishing, and the only host that gets it.
    """

    url: str
    worker_id: str
    workdir: Path
    token: str | None = field(default=None, repr=False)
    poll_seconds: float = 1.5
    lease_seconds: int = 120
    capabilities: tuple[str, ...] = DEFAULT_CAPABILITIES
    allowed_images: tuple[str, ...] = ("*",)
    allowed_secrets: tuple[str, ...] = ("vault://*",)
    timeout_seconds: int = DEFAULT_TIMEOUT_SECONDS
    concurrency: int = 1
    drain_seconds: float = DEFAULT_DRAIN_SECONDS
    cpus: float | None = None
    memory_bytes: int | None = None
    engine: EngineChoice = EngineChoice.AUTO
    engine_open_seconds: float = 30.0
    github_token: str | None = field(default=None, repr=False)
    github_host: str = "github.com"
    vault: VaultSettings | None = None
    helper_image: str = DEFAULT_HELPER_IMAGE
    module: str = "."

    @property
    def credentials(self) -> tuple[str, ...]:
        """The values that must not be seen anywhere."""
        vault = self.vault.token if self.vault else None
        return tuple(value for value in (self.token, self.github_token, vault) if value)


def without_secrets(environment: Mapping[str, str], *others: str) -> dict[str, str]:
    """Give an environment without the worker's own credentials, and without others."""
    left_out = {*WORKER_SECRETS, *others}
    return {name: value for name, value in environment.items() if name not in left_out}


def check_url(url: str) -> str:
    """Give the address of the queue in its one form.

    Raises
    ------
    SettingsError
        When it is no HTTP address, or holds a password.
    """
    return _address("MOONMIND_URL", url, "MOONMIND_WORKER_TOKEN")


def _address(name: str, url: str, credential: str) -> str:
    """Give an HTTP address without a slash at its end; refuse what httpx would choke on."""
    example = f"{name}: must be an address like https://{name.split('_')[1].lower()}.example"
    try:
        parts = urlsplit(url)
        right = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        # Half an IPv6 address, or a port that is none. Its text would quote the rest.
        raise SettingsError(example) from None
    if parts.username is not None or parts.password is not None:
        raise SettingsError(f"{name}: must hold no credentials; give {credential}")
    if not right or parts.query or parts.fragment or not re.fullmatch(r"[!-~]+", url):
        raise SettingsError(example)
    return url.rstrip("/")


def check_token(name: str, text: str) -> str | None:
    """Give a credential without the blanks around it; None where there is none.

    Raises
    ------
    SettingsError
        When no header can hold it. What httpx says then would quote it.
    """
    token = text.strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise SettingsError(f"{name}: must be printable ASCII characters, no blanks")
    return token or None


def check_number(name: str, number: float) -> float:
    """Give a number as it is.

    Raises
    ------
    SettingsError
        When it is infinite or none at all, which `float` takes.
    """
    if not math.isfinite(number):
        raise SettingsError(f"{name}: must be a finite number")
    return number


def check_workdir(workdir: str) -> Path:
    """Give the jobs' directory, made if it is not there.

    Raises
    ------
    SettingsError
        When it is relative, holds `..` or cannot be written to.
    """
    path = Path(workdir or DEFAULT_WORKDIR)
    if not path.is_absolute() or ".." in path.parts:
        raise SettingsError(f'MOONMIND_WORKDIR: {workdir} must be an absolute path without ".."')
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"MOONMIND_WORKDIR: {error.filename}: {error.strerror}") from error
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise SettingsError(f"MOONMIND_WORKDIR: {workdir} cannot be read and written")
    return path


def check_worker_id(worker_id: str) -> str:
    """Give the worker's name.

    Raises
    ------
    SettingsError
        When it has blanks or control characters, or is too long for the server.
    """
    if not re.fullmatch(rf"[!-~]{{1,{_MAX_WORKER_ID}}}", worker_id):
        raise SettingsError(
            f"MOONMIND_WORKER_ID: must be 1 to {_MAX_WORKER_ID} printable characters, no blanks"
        )
    return worker_id


def check_types(types: Iterable[str]) -> None:
    """Refuse types of jobs that this worker cannot run.

    Raises
    ------
    SettingsError
        When there are others than `task`.
    """
    others = [name for name in types if name != TASK]
    if others:
        raise SettingsError(
            f"MOONMIND_WORKER_ALLOWED_TYPES: this worker runs jobs of type {TASK!r} only, not "
            f"{', '.join(others)}; MoonMind's own worker takes those (docs/moonmind.md)"
        )


def split_list(text: str) -> tuple[str, ...]:
    """Read a list with commas, as MoonMind's settings have them; blanks do not count."""
    return tuple(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))


def read_patterns(
    name: str, environment: Mapping[str, str], given: str, *, may_be_none: bool = False
) -> tuple[str, ...]:
    """Read patterns of what is allowed; `none` allows nothing.

    Parameters
    ----------
    name
        The variable's: one that is set to nothing, by a template that lacks a value
        say, must not allow what the default does.
    given
        The setting, or its default where there is none.

    Raises
    ------
    SettingsError
        When there is no pattern.
    """
    if not split_list(given) or not split_list(environment.get(name, given)):
        raise SettingsError(
            f"{name}: is empty; name patterns, * for everything"
            f"{', none for nothing' if may_be_none else ''}, or leave it unset"
        )
    patterns = split_list(given)
    return () if may_be_none and patterns == ("none",) else patterns


def read_memory(text: str) -> int | None:
    """Read a size in Docker's notation, as bytes; None where there is none.

    Raises
    ------
    SettingsError
        When it is no size.
    """
    if not text.strip():
        return None
    try:
        return Resources(memory=text.strip()).memory_bytes
    except ValidationError:
        raise SettingsError("MOONMIND_ENGINE_MEMORY: must be a size like 16g or 512m") from None


def read_vault(environment: Mapping[str, str]) -> VaultSettings | None:
    """Read MoonMind's settings of Vault; None where it names no address.

    Raises
    ------
    SettingsError
        When a setting is broken, or there is an address without a token.
    """
    address = environment.get("MOONMIND_VAULT_ADDR", "").strip()
    if not address:
        return None
    address = _address("MOONMIND_VAULT_ADDR", address, "MOONMIND_VAULT_TOKEN")
    token = environment.get("MOONMIND_VAULT_TOKEN", "").strip()
    file = environment.get("MOONMIND_VAULT_TOKEN_FILE", "").strip()
    from_file = not token and bool(file)
    if from_file:
        try:
            token = Path(file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"MOONMIND_VAULT_TOKEN_FILE: {error}") from error
    token = check_token("MOONMIND_VAULT_TOKEN", token) or ""
    if not token:
        raise SettingsError(
            "MOONMIND_VAULT_ADDR is set: MOONMIND_VAULT_TOKEN or MOONMIND_VAULT_TOKEN_FILE must be"
        )
    seconds = environment.get("MOONMIND_VAULT_TIMEOUT_SECONDS", "").strip() or "10"
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", seconds) or float(seconds) <= 0:
        raise SettingsError("MOONMIND_VAULT_TIMEOUT_SECONDS: must be a number above 0")
    return VaultSettings(
        address=address,
        token=token,
        token_file=Path(file) if from_file else None,
        namespace=check_token(
            "MOONMIND_VAULT_NAMESPACE", environment.get("MOONMIND_VAULT_NAMESPACE", "")
        ),
        mounts=split_list(environment.get("MOONMIND_VAULT_ALLOWED_MOUNTS", "")) or ("kv",),
        seconds=float(seconds),
    )
