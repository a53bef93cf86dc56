"""What a worker refuses to start with, and what it says then."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moonmind_ext.worker.settings import (
    SettingsError,
    VaultSettings,
    WorkerSettings,
    check_number,
    check_token,
    check_types,
    check_url,
    check_workdir,
    check_worker_id,
    read_memory,
    read_patterns,
    read_vault,
    split_list,
)

TOKEN = "wtok-0123456789abcdef"
GITHUB = "ghp-0123456789abcdef"
VAULT = "hvs-0123456789abcdef"


def run_worker(*options: str, folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run `moonmind-ext worker` for one claim, where nobody answers."""
    environment = {
        **{
            name: text
            for name, text in os.environ.items()
            if not name.startswith(("MOONMIND_", "GITHUB_", "GH_"))
        },
        # A port that nothing listens on.
        "MOONMIND_URL": "http://127.0.0.1:9",
        "MOONMIND_WORKDIR": str(folder / "jobs"),
        "MOONMIND_WORKER_ENGINE": "embedded",
        "MOONMIND_WORKER_TOKEN": TOKEN,
        "GITHUB_TOKEN": GITHUB,
        "MOONMIND_VAULT_ADDR": "http://127.0.0.1:9",
        "MOONMIND_VAULT_TOKEN": VAULT,
        "NO_COLOR": "1",
        "COLUMNS": "200",
        **variables,
    }
    return subprocess.run(
        [sys.executable, "-m", "moonmind_ext.cli", "worker", "--once", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )


BAD = {
    "MOONMIND_URL": ["", "moonmind.example", "ftp://moonmind.example", "http://u:wordpass@host"],
    "MOONMIND_WORKDIR": ["jobs", "/dev/null/jobs"],
    "MOONMIND_WORKER_ID": ["two words"],
    "MOONMIND_WORKER_ENGINE": ["docker"],
    "MOONMIND_WORKER_CONCURRENCY": ["0"],
    "MOONMIND_WORKER_ALLOWED_TYPES": ["task,codex_exec"],
    "MOONMIND_POLL_INTERVAL_MS": ["often"],
    "MOONMIND_LEASE_SECONDS": ["0"],
    "MOONMIND_CONTAINER_TIMEOUT_SECONDS": ["-1"],
    "MOONMIND_WORKER_DRAIN_SECONDS": ["nan"],
    "MOONMIND_ENGINE_CPUS": ["inf"],
    "MOONMIND_ENGINE_MEMORY": ["16 gallons"],
    "MOONMIND_ENGINE_OPEN_SECONDS": ["nan"],
    "MOONMIND_WORKER_METRICS_PORT": ["65536"],
    "MOONMIND_LOG_FORMAT": ["xml"],
    "MOONMIND_WORKER_TOKEN": [f"{TOKEN}\n{TOKEN}"],
    "GITHUB_TOKEN": [f"{GITHUB}é"],
    "MOONMIND_VAULT_ADDR": ["vault.example"],
    "MOONMIND_VAULT_TOKEN": ["", f"{VAULT}\r{VAULT}"],
    "MOONMIND_VAULT_TIMEOUT_SECONDS": ["0"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_the_command_line_names_a_bad_setting_and_ends_with_2(
    tmp_path: Path, name: str, value: str
) -> None:
    result = run_worker(folder=tmp_path, **{name: value})
    assert result.returncode == 2, result.stderr
    assert name in result.stderr
    assert result.stdout == ""
    for hidden in ("Traceback", TOKEN, GITHUB, VAULT, "wordpass"):
        assert hidden not in result.stderr


def test_without_a_setting_too_many_the_worker_gets_as_far_as_the_queue(tmp_path: Path) -> None:
    # The counterpart of the test above: its other settings are not what was refused.
    result = run_worker(folder=tmp_path)
    assert result.returncode == 75, result.stderr
    assert "queue http://127.0.0.1:9, claim:" in result.stderr
    for hidden in ("Traceback", TOKEN, GITHUB, VAULT):
        assert hidden not in result.stdout + result.stderr


def test_help_names_every_setting_and_every_exit_code() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "moonmind_ext.cli", "worker", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "COLUMNS": "300", "MOONMIND_WORKER_TOKEN": TOKEN},
    )
    options = set(BAD) - {"GITHUB_TOKEN", "MOONMIND_VAULT_TIMEOUT_SECONDS"}
    options |= {"MOONMIND_WORKER_CAPABILITIES", "MOONMIND_WORKER_ALLOWED_IMAGES"}
    options |= {"MOONMIND_WORKER_ALLOWED_SECRETS", "GITHUB_TOKEN"}
    assert [name for name in sorted(options) if name not in result.stdout] == []
    for code in (0, 2, 65, 75, 130):
        assert re.search(rf"\b{code}\b", result.stdout)
    assert TOKEN not in result.stdout


def test_no_credential_can_be_an_option() -> None:
    # Arguments are visible to everybody on the host.
    result = subprocess.run(
        [sys.executable, "-m", "moonmind_ext.cli", "worker", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    options = re.findall(r"--[a-z][a-z-]*", result.stdout)
    assert [name for name in options if "token" in name or "vault" in name] == []


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("https://moonmind.example", "https://moonmind.example"),
        ("http://moonmind:8000/", "http://moonmind:8000"),
        ("http://[::1]:8000/base//", "http://[::1]:8000/base"),
    ],
)
def test_an_address_has_no_slash_at_its_end(given: str, url: str) -> None:
    assert check_url(given) == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "moonmind",
        "http://",
        "http:///path",
        "file:///etc/passwd",
        "http://[::1",
        "http://host:port",
        "http://host:65536",
        "http://ho st",
        "http://host/?a=b",
        "http://host/#a",
        "http://user@host",
        "http://:password@host",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="^MOONMIND_URL: must"):
        check_url(url)


def test_a_refused_address_is_not_repeated_with_its_password() -> None:
    with pytest.raises(SettingsError) as error:
        check_url("https://user:wordpass@host")
    assert "wordpass" not in str(error.value)


def test_the_jobs_directory_is_made(tmp_path: Path) -> None:
    assert check_workdir(f"{tmp_path}/a/b/") == tmp_path / "a/b"
    assert (tmp_path / "a/b").is_dir()


def test_a_jobs_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    # A path with `..` would be another one inside of the container.
    for workdir in ("jobs", "./jobs", "~/jobs", f"{tmp_path}/file", f"{tmp_path}/x/../jobs"):
        with pytest.raises(SettingsError, match="^MOONMIND_WORKDIR: "):
            check_workdir(workdir)


@pytest.mark.parametrize("worker_id", ["a", "host-1.example", "x" * 255, "{worker}/1"])
def test_a_worker_id_is_taken_as_it_is(worker_id: str) -> None:
    assert check_worker_id(worker_id) == worker_id


@pytest.mark.parametrize("worker_id", ["", "two words", "x" * 256, "tab\t", "new\n", "é", "\0"])
def test_a_worker_id_that_no_header_or_log_takes_is_refused(worker_id: str) -> None:
    with pytest.raises(SettingsError, match="^MOONMIND_WORKER_ID: "):
        check_worker_id(worker_id)


def test_only_tasks_are_taken() -> None:
    check_types(["task"])
    check_types([])
    with pytest.raises(SettingsError, match="not codex_exec, codex_skill; "):
        check_types(["task", "codex_exec", "codex_skill"])


def test_a_list_has_no_blanks_and_nothing_twice() -> None:
    assert split_list(" b, a,,b , ") == ("b", "a")
    assert split_list("") == ()


@pytest.mark.parametrize("blank", ["", " ", ","])
def test_a_setting_that_is_empty_does_not_allow_what_the_default_does(blank: str) -> None:
    name = "MOONMIND_WORKER_ALLOWED_SECRETS"
    with pytest.raises(SettingsError, match=f"{name}: is empty; .*none for nothing"):
        # The command line takes an empty variable for none, and gives the default.
        read_patterns(name, {name: blank}, "vault://*", may_be_none=True)
    assert read_patterns(name, {}, "vault://*") == ("vault://*",)
    assert read_patterns(name, {name: "none"}, "none", may_be_none=True) == ()


@pytest.mark.parametrize(
    ("text", "size"),
    [("", None), (" ", None), ("512m", 512 << 20), ("1.5g", 3 << 29), (" 16GiB ", 16 << 30)],
)
def test_memory_is_in_dockers_notation(text: str, size: int | None) -> None:
    assert read_memory(text) == size


@pytest.mark.parametrize("text", ["-1g", "16Gi", "lots", "nan"])
def test_memory_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="^MOONMIND_ENGINE_MEMORY: "):
        read_memory(text)


def test_a_number_of_seconds_or_cpus_is_finite() -> None:
    assert check_number("NAME", 1.5) == 1.5
    for number in (float("nan"), float("inf")):
        with pytest.raises(SettingsError, match="^NAME: "):
            check_number("NAME", number)


def test_a_token_is_what_a_header_can_hold() -> None:
    assert check_token("NAME", f" {TOKEN}\n") == TOKEN
    assert check_token("NAME", " ") is None
    # What httpx says of these quotes them.
    for token in (f"{TOKEN}\nX-Other: 1", f"{TOKEN} {TOKEN}", f"{TOKEN}\x7f", f"{TOKEN}ü"):
        with pytest.raises(SettingsError, match="^NAME: ") as error:
            check_token("NAME", token)
        assert TOKEN not in str(error.value)


def test_without_an_address_there_is_no_vault() -> None:
    assert read_vault({}) is None
    assert read_vault({"MOONMIND_VAULT_ADDR": " ", "MOONMIND_VAULT_TOKEN": VAULT}) is None


def test_a_vault_has_moonminds_settings(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{VAULT}\n")
    environment = {
        "MOONMIND_VAULT_ADDR": "https://vault.example/",
        "MOONMIND_VAULT_TOKEN_FILE": str(tmp_path / "token"),
        "MOONMIND_VAULT_NAMESPACE": "team",
        "MOONMIND_VAULT_ALLOWED_MOUNTS": "kv, ci",
        "MOONMIND_VAULT_TIMEOUT_SECONDS": "2.5",
    }
    expected = VaultSettings(
        address="https://vault.example",
        token=VAULT,
        token_file=tmp_path / "token",
        namespace="team",
        mounts=("kv", "ci"),
        seconds=2.5,
    )
    assert read_vault(environment) == expected
    assert read_vault(environment | {"MOONMIND_VAULT_TOKEN": "other"}) != expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MOONMIND_VAULT_ADDR", "vault.example"),
        ("MOONMIND_VAULT_ADDR", "https://"),
        ("MOONMIND_VAULT_ADDR", "https://[::1"),
        ("MOONMIND_VAULT_ADDR", "https://user:wordpass@vault.example"),
        ("MOONMIND_VAULT_TOKEN", ""),
        ("MOONMIND_VAULT_TOKEN", f"{VAULT}\n{VAULT}"),
        ("MOONMIND_VAULT_NAMESPACE", "té\nam"),
        ("MOONMIND_VAULT_TIMEOUT_SECONDS", "0.0"),
        ("MOONMIND_VAULT_TIMEOUT_SECONDS", "1e9"),
        ("MOONMIND_VAULT_TIMEOUT_SECONDS", "soon"),
    ],
)
def test_a_vault_that_cannot_be_asked_is_refused(name: str, value: str) -> None:
    good = {"MOONMIND_VAULT_ADDR": "https://vault.example", "MOONMIND_VAULT_TOKEN": VAULT}
    with pytest.raises(SettingsError, match=name) as error:
        read_vault(good | {name: value})
    assert VAULT not in str(error.value)
    assert "wordpass" not in str(error.value)


def test_a_token_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for file in ("absent", "binary"):
        environment = {
            "MOONMIND_VAULT_ADDR": "https://vault.example",
            "MOONMIND_VAULT_TOKEN_FILE": str(tmp_path / file),
        }
        with pytest.raises(SettingsError, match="^MOONMIND_VAULT_TOKEN_FILE: "):
            read_vault(environment)


def test_settings_show_no_credential() -> None:
    vault = VaultSettings(address="https://vault.example", token=VAULT)
    settings = WorkerSettings(
        url="http://host",
        worker_id="w",
        workdir=Path("/jobs"),
        token=TOKEN,
        github_token=GITHUB,
        vault=vault,
    )
    assert settings.credentials == (TOKEN, GITHUB, VAULT)
    for hidden in settings.credentials:
        assert hidden not in repr(settings)
