"""The digest that a tag has right now.

The engine resolves a tag once and keeps what it found, over sessions. So `pull:
always` asks the registry itself, with Docker's own credentials, and runs by digest.
"""

import ipaddress
import json
import os
from pathlib import Path
from typing import Any

import requests
from oras.container import Container
from oras.provider import Registry
from requests.adapters import HTTPAdapter

from pipelines.report import EngineFailedError, ImageUnavailableError

REGISTRY_SECONDS = 30
"""For one request. Registries answer in well under a second; a dead one must not
hold a task up."""

_HUB = "registry-1.docker.io"

_MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)


def current_reference(reference: str) -> str:
    """Look a tag's digest up; blocking.

    Parameters
    ----------
    reference
        As in a payload: `python:3.12`, `ghcr.io/owner/name:tag`, or by digest.

    Returns
    -------
    str
        The same image by digest.

    Raises
    ------
    ImageUnavailableError
        When the registry has no such image, or not for us.
    EngineFailedError
        When the registry cannot be reached or fails.
    """
    if "@" in reference:
        return reference
    container = Container(_with_registry(reference))
    registry = Registry(insecure=_is_plain_http(container.registry))
    try:
        _load_credentials(registry, container)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        # Its text may quote what it could not read.
        raise EngineFailedError(
            f"Docker's credentials for {container.registry} cannot be read: {type(error).__name__}"
        ) from None
    for scheme in ("https://", "http://"):
        registry.session.mount(scheme, _TimeLimited())
    try:
        answer = _ask(registry, f"{registry.prefix}://{container.manifest_url()}")
    except (requests.RequestException, OSError) as error:
        raise EngineFailedError(f"registry {container.registry}: {error}") from error
    if answer.status_code in {401, 403, 404}:
        raise ImageUnavailableError(
            f"image {reference} is not available: registry {container.registry} says "
            f"{answer.status_code} {answer.reason}"
        )
    digest = answer.headers.get("Docker-Content-Digest")
    if not answer.ok or not digest:
        raise EngineFailedError(
            f"registry {container.registry}: {answer.status_code} {answer.reason}"
        )
    tag = reference.rpartition("/")[2].partition(":")[2]
    return f"{reference.removesuffix(f':{tag}')}@{digest}"


def _ask(registry: Registry, url: str) -> requests.Response:
    """Ask for a manifest, as somebody when the registry wants to know who.

    Once only: oras' own way tries for two minutes, and whether to try again is the
    queue's decision.

    Returns
    -------
    requests.Response
        The registry's answer, or the token server's when that gave no token.
    """
    headers = {"Accept": ", ".join(_MANIFESTS)}
    session: requests.Session = registry.session
    answer = last = session.request("HEAD", url, headers=headers)
    challenge = answer.headers.get("WWW-Authenticate", "")
    if answer.status_code != requests.codes.unauthorized or not challenge:
        return answer
    if challenge.lower().startswith("basic"):
        basic = getattr(registry.auth, "_basic_auth", None)
        if basic is None:
            return answer
        headers["Authorization"] = f"Basic {basic}"
    else:

        def keep(response: requests.Response, **_: object) -> None:
            nonlocal last
            last = response

        session.hooks["response"].append(keep)
        headers, has_token = registry.auth.authenticate_request(answer, headers)
        if not has_token:
            return last
    return session.request("HEAD", url, headers=headers)


class _TimeLimited(HTTPAdapter):
    """Gives every request a time limit, the ones for a token included."""

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        return super().send(*args, **{**kwargs, "timeout": REGISTRY_SECONDS})


def _load_credentials(registry: Registry, container: Container) -> None:
    """Take Docker's own credentials for a registry, if it has some."""
    login = Container(container.uri)
    if login.registry == _HUB:
        # What `docker login` has called its hub since its first days.
        login.registry = "https://index.docker.io/v1/"
    # oras looks into the home directory alone.
    file = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker", "config.json")
    config = json.loads(file.read_text()) if file.exists() else {}
    names = ("auths", "credHelpers")
    registry.auth._auth_config = {  # noqa: SLF001
        **{name: config.get(name) or {} for name in names},
        "credsStore": config.get("credsStore"),
    }
    registry.auth.load_configs(login)


def _with_registry(reference: str) -> str:
    """Spell out what Docker leaves unsaid of an image on its own hub."""
    first, slash, rest = reference.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        if first in {"docker.io", "index.docker.io"}:
            return _with_registry(rest)
        # Without a dot or a port oras takes it for a folder of Docker's hub.
        return f"localhost:80{slash}{rest}" if first == "localhost" else reference
    return f"{_HUB}/{reference if slash else f'library/{reference}'}"


def _is_plain_http(registry: str) -> bool:
    """Whether a registry is on this host: as Docker does, those are asked without TLS."""
    host = registry.rsplit(":", 1)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
