"""Looking a tag's digest up at a registry, which a real HTTP server on loopback plays."""

import base64
import json
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oras.container import Container
from oras.provider import Registry as OrasRegistry

from moonmind_ext.engine import registry as module
from moonmind_ext.engine.registry import (
    _is_plain_http,
    _load_credentials,
    _with_registry,
    current_reference,
)
from pipelines.report import EngineFailedError, ImageUnavailableError
from tests.engine.support import Place, Registry

PASSWORD = "s3cr3t-passw0rd"
ANN = {"ann": PASSWORD}


@pytest.fixture(autouse=True)
def docker_config(place: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whoever runs the tests has credentials of their own; none of them counts here."""
    for name in ("DOCKER_CONFIG", "NETRC", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(place.home))
    monkeypatch.setenv("PATH", str(place.bin))
    return place.home / ".docker" / "config.json"


def write(config: Path, content: object) -> None:
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(content))


def login(user: str, password: str) -> dict[str, str]:
    """What `docker login` writes for a registry."""
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


# --- the lookup ---


def test_a_tag_becomes_the_digest_that_the_registry_tells(registry: Registry) -> None:
    digest = registry.has("owner/name:1.2")

    found = current_reference(f"{registry.host}/owner/name:1.2")

    assert found == f"{registry.host}/owner/name@{digest}"
    assert registry.asked == [("HEAD", "/v2/owner/name/manifests/1.2", "")]


def test_a_tag_that_has_moved_is_seen_at_once(registry: Registry) -> None:
    first = registry.has("name:1")
    assert current_reference(f"{registry.host}/name:1").endswith(first)
    registry.digests["name:1"] = "sha256:" + "e" * 64
    assert current_reference(f"{registry.host}/name:1").endswith("e" * 64)


def test_without_a_tag_it_is_latest(registry: Registry) -> None:
    digest = registry.has("name:latest")
    assert current_reference(f"{registry.host}/name") == f"{registry.host}/name@{digest}"


def test_deep_names_and_odd_tags_are_asked_for_as_they_are(registry: Registry) -> None:
    digest = registry.has("a/b-c/d_e/name:v1.0_RC-2")
    found = current_reference(f"{registry.host}/a/b-c/d_e/name:v1.0_RC-2")
    assert found == f"{registry.host}/a/b-c/d_e/name@{digest}"


def test_a_tag_that_is_spelled_as_the_name_is_no_trouble(registry: Registry) -> None:
    digest = registry.has("name/name:name")
    found = current_reference(f"{registry.host}/name/name:name")
    assert found == f"{registry.host}/name/name@{digest}"


@pytest.mark.parametrize("tag", ["", ":1"])
def test_a_digest_is_given_back_without_asking(registry: Registry, tag: str) -> None:
    reference = f"{registry.host}/name{tag}@sha256:{'a' * 64}"
    assert current_reference(reference) == reference
    assert registry.asked == []


# --- who asks ---


def test_an_anonymous_token_is_fetched_where_one_is_wanted(registry: Registry) -> None:
    registry.needs = "token"
    digest = registry.has("owner/name:1")

    assert current_reference(f"{registry.host}/owner/name:1").endswith(digest)
    first, token, second = registry.asked
    assert first == ("HEAD", "/v2/owner/name/manifests/1", "")
    assert token[:2] == ("GET", "/token?service=test&scope=repository%3Aowner%2Fname%3Apull")
    assert token[2] == ""
    assert second[2].startswith("Bearer ")


def test_dockers_credentials_are_used_for_the_token_and_nothing_else(
    registry: Registry, docker_config: Path
) -> None:
    registry.needs, registry.users = "token", ANN
    digest = registry.has("private/name:1")
    write(docker_config, {"auths": {registry.host: login("ann", PASSWORD)}})

    assert current_reference(f"{registry.host}/private/name:1").endswith(digest)
    basic = [path for _, path, authorization in registry.asked if "Basic" in authorization]
    assert [path.partition("?")[0] for path in basic] == ["/token"]


def test_docker_config_names_another_folder_as_it_does_for_docker(
    registry: Registry, docker_config: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.needs, registry.users = "token", ANN
    digest = registry.has("name:1")
    write(docker_config, {"auths": {registry.host: login("ann", "an old one")}})
    write(place.home / "other/config.json", {"auths": {registry.host: login("ann", PASSWORD)}})
    monkeypatch.setenv("DOCKER_CONFIG", str(place.home / "other"))

    assert current_reference(f"{registry.host}/name:1").endswith(digest)


def test_credentials_for_another_registry_are_not_sent(
    registry: Registry, docker_config: Path
) -> None:
    registry.needs = "token"
    registry.has("name:1")
    write(docker_config, {"auths": {"ghcr.io": login("ann", PASSWORD)}})
    current_reference(f"{registry.host}/name:1")

    assert not any("Basic" in authorization for _, _, authorization in registry.asked)


def test_a_registry_with_passwords_alone_is_asked_with_one(
    registry: Registry, docker_config: Path
) -> None:
    # The challenge of `registry:2` with an htpasswd file.
    registry.needs, registry.users = "basic", ANN
    digest = registry.has("name:1")
    write(docker_config, {"auths": {registry.host: login("ann", PASSWORD)}})

    assert current_reference(f"{registry.host}/name:1").endswith(digest)


HELPER = (
    "read -r host",
    'echo "$1 $host" >> "$0.log"',
    f"""echo '{{"ServerURL": "x", "Username": "ann", "Secret": "{PASSWORD}"}}'""",
)


@pytest.mark.parametrize("kind", ["credHelpers", "credsStore"])
def test_a_credential_helper_is_asked(
    registry: Registry, docker_config: Path, place: Place, kind: str
) -> None:
    registry.needs, registry.users = "token", ANN
    digest = registry.has("name:1")
    helper = place.command("docker-credential-vault", *HELPER)
    named = {registry.host: "vault"} if kind == "credHelpers" else "vault"
    # What `docker login` leaves in the file where a helper keeps the rest.
    write(docker_config, {"auths": {registry.host: {}}, kind: named})

    assert current_reference(f"{registry.host}/name:1").endswith(digest)
    assert Path(f"{helper}.log").read_text() == f"get {registry.host}\n"


def test_a_helper_without_credentials_leaves_the_question_anonymous(
    registry: Registry, docker_config: Path, place: Place
) -> None:
    registry.needs = "token"
    digest = registry.has("name:1")
    place.command(
        "docker-credential-vault", "echo credentials not found in native keychain", "exit 1"
    )
    write(docker_config, {"credsStore": "vault"})

    assert current_reference(f"{registry.host}/name:1").endswith(digest)


def test_a_helper_that_is_not_installed_leaves_the_question_anonymous(
    registry: Registry, docker_config: Path
) -> None:
    registry.needs = "token"
    digest = registry.has("name:1")
    write(docker_config, {"credsStore": "desktop"})

    assert current_reference(f"{registry.host}/name:1").endswith(digest)


@pytest.mark.parametrize(
    "answer", [f"echo password is {PASSWORD}", "echo '{}'", "echo '[]'", "true"]
)
def test_a_helper_that_says_rubbish_is_our_failure(
    registry: Registry, docker_config: Path, place: Place, answer: str
) -> None:
    registry.has("name:1")
    place.command("docker-credential-vault", answer)
    write(docker_config, {"credsStore": "vault"})

    with pytest.raises(EngineFailedError, match="credentials") as caught:
        current_reference(f"{registry.host}/name:1")
    assert PASSWORD not in str(caught.value)


def test_a_broken_docker_configuration_is_our_failure(
    registry: Registry, docker_config: Path
) -> None:
    registry.has("name:1")
    write(docker_config, {})
    docker_config.write_text(f'{{"auths": "{PASSWORD}')

    with pytest.raises(EngineFailedError, match="credentials") as caught:
        current_reference(f"{registry.host}/name:1")
    assert PASSWORD not in str(caught.value)


# --- images that are not to be had ---


@pytest.mark.parametrize("needs", ["", "token"])
def test_an_image_that_does_not_exist_is_unavailable(registry: Registry, needs: str) -> None:
    registry.needs = needs
    reference = f"{registry.host}/name:1"
    with pytest.raises(ImageUnavailableError, match="404") as caught:
        current_reference(reference)

    assert reference in str(caught.value)
    assert registry.host in str(caught.value)


def test_an_image_that_a_token_does_not_open_is_unavailable(registry: Registry) -> None:
    registry.needs, registry.refuses_token = "token", True
    registry.has("private/name:1")
    with pytest.raises(ImageUnavailableError, match="401"):
        current_reference(f"{registry.host}/private/name:1")


def test_an_image_that_a_token_forbids_is_unavailable(registry: Registry) -> None:
    registry.has("private/name:1")
    registry.needs, registry.status_with_token = "token", 403
    with pytest.raises(ImageUnavailableError, match="403"):
        current_reference(f"{registry.host}/private/name:1")


@pytest.mark.parametrize("needs", ["token", "basic"])
@pytest.mark.parametrize("password", [None, "wr0ng-passw0rd"], ids=["none", "wrong"])
def test_an_image_for_others_is_unavailable_and_not_worth_a_retry(
    registry: Registry, docker_config: Path, needs: str, password: str | None
) -> None:
    registry.needs, registry.users = needs, ANN
    registry.has("private/name:1")
    if password:
        write(docker_config, {"auths": {registry.host: login("ann", password)}})
    with pytest.raises(ImageUnavailableError, match="private/name:1") as caught:
        current_reference(f"{registry.host}/private/name:1")

    assert "401" in str(caught.value)


def test_no_secret_is_in_any_error(
    registry: Registry, docker_config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    registry.users = {"ann": "another"}
    registry.has("name:1")
    write(docker_config, {"auths": {registry.host: login("ann", PASSWORD)}})
    texts = []
    for needs, status, hangs_at in (
        ("token", 0, ""),
        ("basic", 0, ""),
        ("", 500, ""),
        ("token", 0, "/token"),
    ):
        registry.needs, registry.status, registry.hangs_at = needs, status, hangs_at
        registry.hang_ends.set()
        with pytest.raises((EngineFailedError, ImageUnavailableError)) as caught:
            current_reference(f"{registry.host}/name:1")
        error: BaseException | None = caught.value
        while error is not None:
            texts.append(repr(error))
            error = error.__cause__ or error.__context__

    assert len(texts) >= 4
    auth = login("ann", PASSWORD)["auth"]
    for text in [*texts, caplog.text]:
        assert PASSWORD not in text
        assert auth not in text
        assert "bearer-" not in text


# --- registries that fail ---


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_registry_that_fails_is_our_failure_and_is_asked_once(
    registry: Registry, status: int
) -> None:
    registry.status = status
    registry.has("name:1")
    began = monotonic()
    with pytest.raises(EngineFailedError, match=f"{registry.host}.*{status}"):
        current_reference(f"{registry.host}/name:1")

    assert monotonic() - began < 15
    assert len(registry.asked) == 1, "whether to try again is the queue's decision"


def test_a_token_server_that_fails_is_our_failure(registry: Registry) -> None:
    registry.needs, registry.token_status = "token", 503
    registry.has("name:1")
    with pytest.raises(EngineFailedError, match=registry.host):
        current_reference(f"{registry.host}/name:1")


def test_a_token_server_that_says_rubbish_is_our_failure(registry: Registry) -> None:
    registry.needs, registry.token_body = "token", b"<html>Log in</html>"
    registry.has("name:1")
    with pytest.raises(EngineFailedError, match=registry.host):
        current_reference(f"{registry.host}/name:1")


def test_a_registry_that_tells_no_digest_is_our_failure(registry: Registry) -> None:
    registry.status = 200
    with pytest.raises(EngineFailedError, match=registry.host):
        current_reference(f"{registry.host}/name:1")


def test_a_registry_that_is_not_there_is_our_failure_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
    began = monotonic()
    with pytest.raises(EngineFailedError, match=f"registry {host}"):
        current_reference(f"{host}/name:1")

    assert monotonic() - began < 15


@pytest.mark.parametrize("where", ["/v2/", "/token"])
def test_a_registry_that_never_answers_is_our_failure_after_the_limit(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(module, "REGISTRY_SECONDS", 1)
    registry.needs, registry.hangs_at = "token", where
    registry.has("name:1")
    began = monotonic()
    with pytest.raises(EngineFailedError, match=f"registry {registry.host}.*timed out"):
        current_reference(f"{registry.host}/name:1")

    assert 0.9 < monotonic() - began < 15


@pytest.fixture
def talks_something_else() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                connection.recv(1 << 16)

        thread = threading.Thread(target=talk)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(30)


def test_what_is_no_registry_is_our_failure(talks_something_else: str) -> None:
    with pytest.raises(EngineFailedError, match=f"registry {talks_something_else}"):
        current_reference(f"{talks_something_else}/name:1")


# --- references, where the public function cannot show it without the network ---


@pytest.mark.parametrize(
    ("reference", "url"),
    [
        ("python", "registry-1.docker.io/v2/library/python/manifests/latest"),
        ("python:3.12", "registry-1.docker.io/v2/library/python/manifests/3.12"),
        ("owner/name:1", "registry-1.docker.io/v2/owner/name/manifests/1"),
        ("docker.io/python:3.12", "registry-1.docker.io/v2/library/python/manifests/3.12"),
        ("docker.io/library/python", "registry-1.docker.io/v2/library/python/manifests/latest"),
        ("docker.io/owner/name:1", "registry-1.docker.io/v2/owner/name/manifests/1"),
        ("index.docker.io/owner/name:1", "registry-1.docker.io/v2/owner/name/manifests/1"),
        ("ghcr.io/owner/name:1", "ghcr.io/v2/owner/name/manifests/1"),
        ("quay.io/a/b/c", "quay.io/v2/a/b/c/manifests/latest"),
        ("registry:5000/name", "registry:5000/v2/name/manifests/latest"),
        ("registry:5000/name:1", "registry:5000/v2/name/manifests/1"),
        ("localhost:5000/owner/name:1", "localhost:5000/v2/owner/name/manifests/1"),
        # Not a folder of Docker's hub.
        ("localhost/name:1", "localhost/v2/name/manifests/1"),
        ("[::1]:5000/name:1", "[::1]:5000/v2/name/manifests/1"),
    ],
)
def test_every_form_of_a_reference_leads_to_its_registry(reference: str, url: str) -> None:
    container = Container(_with_registry(reference))
    assert container.manifest_url().replace("localhost:80/", "localhost/") == url


@given(
    path=st.lists(st.from_regex(r"[a-z0-9]+([._-][a-z0-9]+)*", fullmatch=True), min_size=1),
    tag=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True),
)
def test_a_name_on_a_registry_is_neither_cut_nor_moved(path: list[str], tag: str) -> None:
    name = "/".join(path)
    container = Container(_with_registry(f"registry.test:5000/{name}:{tag}"))
    assert container.manifest_url() == f"registry.test:5000/v2/{name}/manifests/{tag}"


@pytest.mark.parametrize("reference", ["python", "docker.io/owner/name:1"])
def test_credentials_for_dockers_hub_are_found_under_its_old_name(
    docker_config: Path, reference: str
) -> None:
    entry = login("ann", PASSWORD)
    write(docker_config, {"auths": {"https://index.docker.io/v1/": entry}})
    registry = OrasRegistry()
    _load_credentials(registry, Container(_with_registry(reference)))

    assert registry.auth._basic_auth == entry["auth"]


def test_credentials_for_dockers_hub_are_not_for_others(docker_config: Path) -> None:
    write(docker_config, {"auths": {"https://index.docker.io/v1/": login("ann", PASSWORD)}})
    registry = OrasRegistry()
    _load_credentials(registry, Container(_with_registry("ghcr.io/owner/name")))

    assert not hasattr(registry.auth, "_basic_auth")


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:5000", "127.0.0.1", "127.0.0.1:5000", "127.9.8.7", "[::1]:80"]
)
def test_a_registry_on_this_host_is_asked_without_tls(host: str) -> None:
    assert _is_plain_http(host)


@pytest.mark.parametrize(
    "host",
    [
        "ghcr.io",
        "registry:5000",
        "10.0.0.1:5000",
        "localhost.example.org",
        "127.0.0.1.example.org:5000",
        "registry-1.docker.io",
        "[2001:db8::1]:443",
    ],
)
def test_every_other_registry_is_asked_with_tls(host: str) -> None:
    assert not _is_plain_http(host)
