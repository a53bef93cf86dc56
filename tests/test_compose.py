"""The images and the Compose file: what must hold of them, without Docker where that can be."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from dagger._engine._version import CLI_VERSION

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE = (ROOT / "docker-compose.yaml").read_text("utf-8")
ENGINE = json.loads((ROOT / "deploy/engine.json").read_text("utf-8"))
WORKERS = ["worker", "worker-docker-proxy"]
GROUP = "10001"


def argument(name: str) -> str:
    [value] = re.findall(rf"^ARG {name}=(\S+)$", DOCKERFILE, re.MULTILINE)
    return str(value)


def stages() -> dict[str, str]:
    parts = re.split(r"^FROM (\S+) AS (\S+)\n", DOCKERFILE, flags=re.MULTILINE)[1:]
    return {
        name: f"FROM {base}\n{text}"
        for base, name, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }


def compose(**settings: str) -> dict[str, Any]:
    """Compose's own reading of the file, all profiles, in an environment of these settings."""
    docker = shutil.which("docker")
    if docker is None:
        pytest.skip("there is no docker command")
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker has no compose plugin")
    passed = {name: value for name, value in os.environ.items() if name in {"HOME", "PATH"}}
    files = ["--env-file", os.devnull, "--file", str(ROOT / "docker-compose.yaml")]
    result = subprocess.run(
        [docker, "compose", *files, "--profile", "*", "config", "--format", "json"],
        capture_output=True,
        check=False,
        env=passed | settings,
    )
    assert result.returncode == 0, result.stderr.decode()
    config: dict[str, Any] = json.loads(result.stdout)
    return config


def seconds(text: str) -> float:
    parts = re.findall(r"([0-9.]+)(h|m|s)", text)
    return sum(float(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in parts)


def test_engine_and_command_have_the_version_that_the_sdk_expects() -> None:
    assert argument("DAGGER_VERSION") == CLI_VERSION
    pins = (ROOT / "constraints.txt").read_text("utf-8")
    assert f"dagger-io=={CLI_VERSION} " in pins


def test_what_the_image_installs_is_pinned() -> None:
    """The builder takes packages from constraints.txt alone."""
    pins = re.findall(
        r"^([a-z0-9-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    [extras] = re.findall(r"'\.\[(.+)\]'$", DOCKERFILE, re.MULTILINE)
    wanted = [*project["dependencies"]]
    for extra in extras.split(","):
        wanted += project["optional-dependencies"][extra]
    names = {re.split(r"[^A-Za-z0-9-]", item)[0] for item in wanted}
    assert names - {project["name"]} <= set(pins)


def test_the_version_stands_in_one_place() -> None:
    assert DOCKERFILE.count(CLI_VERSION) == 1
    assert CLI_VERSION not in COMPOSE


def test_engine_and_command_come_from_one_image() -> None:
    parts = stages()
    assert parts["engine"].startswith("FROM ${ENGINE_IMAGE}:v${DAGGER_VERSION}\n")
    assert "COPY --from=engine /usr/local/bin/dagger /usr/local/bin/dagger" in parts["base"]
    assert argument("ENGINE_IMAGE") == "registry.dagger.io/engine"


def test_the_images_of_workers_are_not_roots() -> None:
    parts = stages()
    assert list(parts)[-1] == "worker"  # what `docker build .` makes
    assert parts["worker"].strip() == "FROM base"
    for name in ["base", "worker-docker-proxy"]:
        assert re.findall(r"^USER (\S+)$", parts[name], re.MULTILINE)[-1] == f"{GROUP}:{GROUP}"
    assert f"--gid={GROUP}" in parts["base"]


def test_images_from_elsewhere_have_a_version() -> None:
    named = re.findall(r"^ +image: (\S+)$", COMPOSE, re.MULTILINE)
    for image in [argument("PYTHON_IMAGE"), *named]:
        assert re.search(r":v?\d+\.\d+", image) or image.startswith("localhost/"), image


def test_only_the_proxy_has_the_docker_socket() -> None:
    services = re.split(r"^(?:  |x-)(\S+):.*$", COMPOSE, flags=re.MULTILINE)
    having = {
        name
        for name, text in zip(services[1::2], services[2::2], strict=True)
        if "docker.sock" in text
    }
    assert having == {"docker-proxy"}


def test_what_the_images_are_made_of_is_sent_to_the_builder() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sent = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert any(Path(path).is_relative_to(name) for path in sent), name
    # The project's own metadata names these.
    assert {"LICENSE", "README.md", "pyproject.toml", "examples/python"} <= set(sent)


def test_the_engine_gives_no_command_root_on_the_host() -> None:
    assert ENGINE["security"] == {"insecureRootCapabilities": False}


def test_the_engine_is_told_what_to_keep() -> None:
    # An engine with a key that it does not know does not start.
    assert set(ENGINE) == {"logLevel", "security", "gc"}
    *others, last = ENGINE["gc"]["policies"]
    assert last == {"all": True, "maxUsedSpace": "75%", "minFreeSpace": "5%"}
    # Cache volumes go last: tasks are slow without them.
    assert not any("cachemount" in item for policy in others for item in policy["filters"])


@pytest.mark.parametrize("profile", ["", "trial", "docker-proxy"])
def test_every_service_belongs_to_its_profile(profile: str) -> None:
    names = {
        "": {"worker", "engine"},
        "trial": {"queue"},
        "docker-proxy": {"worker-docker-proxy", "docker-proxy"},
    }
    services = compose()["services"]
    found = {name for name, service in services.items() if profile in service.get("profiles", [""])}
    assert found == names[profile]


@pytest.mark.parametrize("name", [*WORKERS, "queue"])
def test_workers_have_no_privileges(name: str) -> None:
    service = compose()["services"][name]
    assert not service.get("privileged")
    assert service["cap_drop"] == ["ALL"]
    assert service["read_only"] is True
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "user" not in service  # the image's
    assert all(mount["type"] == "volume" for mount in service["volumes"])


def test_the_worker_reaches_the_engine_by_a_socket_of_its_group() -> None:
    config = compose()
    worker, engine = config["services"]["worker"], config["services"]["engine"]
    for service in [worker, engine]:
        mounts = {mount["target"]: mount["source"] for mount in service["volumes"]}
        assert mounts["/run/dagger"] == "engine-socket"
    runner = worker["environment"]["_EXPERIMENTAL_DAGGER_RUNNER_HOST"]
    assert runner == "unix:///run/dagger/engine.sock"
    assert engine["command"] == ["--group", GROUP]
    assert worker["depends_on"]["engine"]["condition"] == "service_healthy"
    # Tasks are in the engine's network: it is nobody else's.
    shared = set(worker["networks"]) & set(engine["networks"])
    assert not shared


def test_the_state_of_the_engine_is_kept_and_written_down() -> None:
    engine = compose()["services"]["engine"]
    mounts = {mount["target"]: mount["source"] for mount in engine["volumes"]}
    assert mounts["/var/lib/dagger"] == "engine-state"
    # The engine gives itself five minutes.
    assert seconds(engine["stop_grace_period"]) > 300
    assert "stop_signal" not in engine  # SIGTERM


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_has_time_to_drain(name: str) -> None:
    worker = compose()["services"][name]
    drain = float(worker["environment"]["MOONMIND_WORKER_DRAIN_SECONDS"])
    assert seconds(worker["stop_grace_period"]) >= drain + 60


def test_settings_come_from_the_environment() -> None:
    config = compose(
        MOONMIND_URL="https://moonmind.example",
        MOONMIND_WORKER_TOKEN="a-token",
        MOONMIND_WORKER_DRAIN_SECONDS="600",
        MOONMIND_WORKER_STOP_GRACE="700s",
        MOONMIND_ENGINE_CPUS="6",
        MOONMIND_ENGINE_MEMORY="12g",
    )
    worker, engine = config["services"]["worker"], config["services"]["engine"]
    environment = worker["environment"]
    assert environment["MOONMIND_URL"] == "https://moonmind.example"
    assert environment["MOONMIND_WORKER_TOKEN"] == "a-token"
    assert environment["MOONMIND_WORKER_DRAIN_SECONDS"] == "600"
    assert seconds(worker["stop_grace_period"]) == 700
    # What the worker counts with is what the engine has.
    assert float(engine["cpus"]) == float(environment["MOONMIND_ENGINE_CPUS"]) == 6
    assert int(engine["mem_limit"]) == 12 << 30
    assert environment["MOONMIND_ENGINE_MEMORY"] == "12g"
    runner = config["services"]["worker-docker-proxy"]["environment"][
        "_EXPERIMENTAL_DAGGER_RUNNER_HOST"
    ]
    assert runner.endswith("&cpus=6&memory=12g")


def test_what_is_not_set_is_not_there() -> None:
    environment = compose()["services"]["worker"]["environment"]
    assert environment["MOONMIND_WORKER_TOKEN"] is None
    assert environment["MOONMIND_ENGINE_CPUS"] is None


def test_the_proxy_lets_through_what_starting_an_engine_needs() -> None:
    config = compose()
    proxy = config["services"]["docker-proxy"]
    allowed = {name for name, value in proxy["environment"].items() if value == "1"}
    assert allowed == {"CONTAINERS", "EXEC", "IMAGES", "POST"}
    # The default of 10 minutes would end every command that prints nothing for so long.
    assert "timeout tunnel" in proxy["entrypoint"][-1]
    assert config["networks"]["docker-proxy"]["internal"] is True
    worker = config["services"]["worker-docker-proxy"]
    assert worker["environment"]["DOCKER_HOST"] == "tcp://docker-proxy:2375"
    # An image of this name is in no registry: nobody else's is started for it.
    image = config["services"]["engine"]["image"]
    assert image.startswith("localhost/")
    assert f"//{image}?" in worker["environment"]["_EXPERIMENTAL_DAGGER_RUNNER_HOST"]
