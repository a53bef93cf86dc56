"""How git runs: which addresses it clones, and who gets the token."""

import os
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import date
from pathlib import Path

import anyio
import pytest

from moonmind_ext.run.stage_log import StageLog
from moonmind_ext.worker.checkout import check_out
from moonmind_ext.worker.git import Credential, clone_url, git_environment
from moonmind_ext.worker.process import CommandError, Runner
from moonmind_ext.worker.publish import PublishError, publish, separate_git
from pipelines.masking import Masker
from pipelines.payload import Git, Publish, PublishMode
from tests.worker.servers import GitServer, Request, answer, certificate, git_server, http_server
from tests.worker.support import Origin, make_origin

DAY = date(2026, 2, 16)

TOKEN = "ghp-0123456789abcdef"


@pytest.mark.parametrize(
    ("repository", "url"),
    [
        ("acme/widgets", "https://github.com/acme/widgets.git"),
        ("acme/widgets.git", "https://github.com/acme/widgets.git"),
        ("a.b-c_d/e.f-g_h", "https://github.com/a.b-c_d/e.f-g_h.git"),
        ("https://git.example/a/b.git", "https://git.example/a/b.git"),
        ("http://git.example:8080/~user/b", "http://git.example:8080/~user/b"),
        ("https://git.example/a@b", "https://git.example/a@b"),
        ("git@github.com:acme/widgets.git", "git@github.com:acme/widgets.git"),
        ("git@host:/srv/git/a.git", "git@host:/srv/git/a.git"),
    ],
)
def test_a_repository_has_an_address(repository: str, url: str) -> None:
    assert clone_url(repository) == url


@pytest.mark.parametrize(
    "repository",
    [
        "",
        "widgets",
        "/srv/git/widgets",
        "./widgets",
        "../acme/widgets",
        ".acme/widgets",
        "-acme/widgets",
        "acme/widgets/more",
        "acme/wid gets",
        "acme/widgets\n",
        "file:///srv/git/widgets",
        "ssh://git@host/widgets",
        "git://host/widgets",
        "ext::sh -c id",
        "ext::sh/-c",
        "http::https://host/a",
        "https:///widgets",
        "https://host",
        "https://host/",
        "https://host/a b",
        "https://host/a\nb",
        "https://host/a\0b",
        "https://user@host/a",
        "https://user:wordpass@host/a",
        "https://host?@evil.example/a",
        "https://host#@evil.example/a",
        r"https://host\@evil.example/a",
        "https://host?/@evil.example/a",
        "https://host#/@evil.example/a",
        "HTTPS://host/a",
        "--upload-pack=id",
        "git@-oProxyCommand=id:a/b",
        "git@host:-a",
        "git@host",
        "git@:a/b",
        # With a slash before the colon git takes it for a path.
        "git@host/../../srv:git",
        "root@host:a/b",
    ],
)
def test_what_leads_elsewhere_is_refused(repository: str) -> None:
    with pytest.raises(ValueError, match="must be owner/name, an http") as error:
        clone_url(repository)
    assert "wordpass" not in str(error.value)


def header_for(url: str, environment: dict[str, str]) -> str:
    result = subprocess.run(
        ["git", "config", "--get-urlmatch", "http.extraHeader", url],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("host", "url", "is_for_it"),
    [
        ("github.com", "https://github.com/acme/widgets.git", True),
        ("github.com", "https://GitHub.com:443/acme", True),
        ("github.com", "http://github.com/acme", False),
        ("github.com", "https://github.com:8443/acme", False),
        ("github.com", "https://github.com.evil.example/acme", False),
        ("github.com", "https://evil.example/github.com/acme", False),
        ("github.com", "https://api.github.com/acme", False),
        ("git.example:8443", "https://git.example:8443/acme", True),
        ("git.example:8443", "https://git.example/acme", False),
    ],
)
def test_the_token_is_for_its_host_only(host: str, url: str, is_for_it: bool) -> None:
    environment = git_environment(os.environ, Credential(TOKEN, host=host))
    expected = f"Authorization: {Credential(TOKEN).header}" if is_for_it else ""
    assert header_for(url, environment) == expected


def test_without_a_credential_nobody_gets_one() -> None:
    environment = git_environment({**os.environ, "GH_TOKEN": TOKEN, "GITHUB_TOKEN": TOKEN}, None)
    assert header_for("https://github.com/acme", environment) == ""
    assert TOKEN not in environment.values()


def test_the_workers_own_credentials_are_left_out_and_settings_kept() -> None:
    names = ["MOONMIND_WORKER_TOKEN", "MOONMIND_VAULT_TOKEN", "GITHUB_TOKEN", "GH_TOKEN"]
    names += ["GH_ENTERPRISE_TOKEN", "GITHUB_ENTERPRISE_TOKEN"]
    own = {
        **dict.fromkeys(names, "another-0123456789"),
        "PATH": os.environ["PATH"],
        "HTTPS_PROXY": "http://proxy",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "user.name",
        "GIT_CONFIG_VALUE_0": "Operator",
        "GIT_SSH_COMMAND": "ssh -i key",
        "LC_ALL": "de_DE.UTF-8",
    }
    environment = git_environment(own, Credential(TOKEN))
    assert "another-0123456789" not in environment.values()
    assert environment["HTTPS_PROXY"] == "http://proxy"
    assert environment["GIT_SSH_COMMAND"] == "ssh -i key"
    assert environment["GIT_TERMINAL_PROMPT"] == "0"
    # What went wrong is read from the messages.
    assert environment["LC_ALL"] == "C"

    def config(name: str) -> str:
        command = ["git", "config", "--get", name]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        ).stdout.strip()

    assert config("user.name") == "Operator"
    assert config("core.hooksPath") == "/dev/null"
    assert config("core.fsmonitor") == "false"


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("github.com", "GH_TOKEN"),
        ("acme.ghe.com", "GH_TOKEN"),
        # gh reads the other one for github.com alone.
        ("git.example", "GH_ENTERPRISE_TOKEN"),
    ],
)
def test_gh_gets_the_token_under_the_name_that_it_reads_for_the_host(host: str, name: str) -> None:
    environment = git_environment({}, Credential(TOKEN, host=host))
    found = {key for key, value in environment.items() if value == TOKEN}
    assert found == {name}
    assert environment["GH_HOST"] == host


def test_a_credential_does_not_show_its_token() -> None:
    assert TOKEN not in repr(Credential(TOKEN))


@asynccontextmanager
async def served(
    folder: Path, token: str = TOKEN
) -> AsyncIterator[tuple[GitServer, Runner, Origin]]:
    """An HTTPS git server that asks for the token, and a runner that has one."""
    origin = make_origin(folder)
    tls = certificate(folder)
    (folder / "job").mkdir()
    async with git_server(origin.path, tls, TOKEN) as server:
        credential = Credential(token, host=server.host)
        environment = git_environment(
            {"PATH": os.environ["PATH"], "HOME": str(folder), "GIT_SSL_CAINFO": str(tls)},
            credential,
        )
        masker = Masker([token, credential.header])
        with StageLog(folder / "job" / "stage.log", masker) as log:
            yield server, Runner(folder / "job", environment, log), origin


def secrets_below(folder: Path, *secrets: str) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(s.encode() in path.read_bytes() for s in secrets)]


async def test_a_private_repository_is_cloned_and_pushed_to_and_the_token_is_in_no_file(
    tmp_path: Path,
) -> None:
    async with served(tmp_path) as (server, runner, origin):
        seen: set[str] = set()

        async def watch() -> None:
            # Arguments are visible to everybody on the host, as long as a process lives.
            while True:
                for path in Path("/proc").glob("[0-9]*/cmdline"):
                    try:
                        seen.add(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
                    except OSError:
                        continue
                await anyio.sleep(0.005)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            checkout = await check_out(
                runner, server.url, Git(), job_id="job-1", skill="auto", day=DAY
            )
            (runner.cwd / "repo" / "new.txt").write_text("new\n")
            variables = separate_git(runner.cwd, checkout)
            publisher = Runner(runner.cwd, {**runner.environment, **variables}, runner.log)
            publishing = Publish(mode=PublishMode.BRANCH)
            published = await publish(publisher, publishing, checkout, "gh")
            tasks.cancel_scope.cancel()
        assert origin.file(published.branch, "new.txt") == "new"
        encoded = Credential(TOKEN).header.removeprefix("Basic ")
        assert secrets_below(runner.cwd, TOKEN, encoded) == []
        # The server's own commands have been seen, so ours were looked at too.
        assert any("http-backend" in line or "clone" in line for line in seen)
        assert not any(TOKEN in line or encoded in line for line in seen)
        assert server.refused == 0


async def test_a_wrong_token_is_a_clone_that_failed_and_shows_nothing(tmp_path: Path) -> None:
    wrong = "ghp-wrong-0123456789"
    async with served(tmp_path, wrong) as (server, runner, _):
        with pytest.raises(CommandError, match="^git clone failed"):
            await check_out(runner, server.url, Git(), job_id="job-1", skill="auto", day=DAY)
        assert server.refused > 0
        assert secrets_below(runner.cwd, wrong) == []


async def test_a_push_without_the_right_is_refused_and_not_tried_again(tmp_path: Path) -> None:
    async with served(tmp_path) as (server, runner, _):
        checkout = await check_out(runner, server.url, Git(), job_id="job-1", skill="auto", day=DAY)
        (runner.cwd / "repo" / "new.txt").write_text("new\n")
        wrong = git_environment(
            {name: runner.environment[name] for name in ("PATH", "HOME", "GIT_SSL_CAINFO")},
            Credential("ghp-wrong-0123456789", host=server.host),
        )
        variables = separate_git(runner.cwd, checkout)
        publisher = Runner(runner.cwd, {**wrong, **variables}, runner.log)
        with pytest.raises(PublishError) as error:
            await publish(publisher, Publish(mode=PublishMode.BRANCH), checkout, "gh")
        assert error.value.is_refused
        assert (runner.cwd / "stage.log").read_text().count(" push --quiet ") == 1


async def test_the_token_does_not_follow_a_redirection_to_another_host(tmp_path: Path) -> None:
    tls = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls, tls.with_suffix(".key"))
    async with git_server(make_origin(tmp_path).path, tls, None) as other:

        async def redirect(request: Request) -> bytes | None:
            return answer(302, Location=f"https://{other.host}{request.path}")

        async with http_server(redirect, tls=context) as url:
            environment = git_environment(
                {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "GIT_SSL_CAINFO": str(tls)},
                Credential(TOKEN, host=url.removeprefix("https://")),
            )
            with StageLog(tmp_path / "stage.log", Masker()) as log:
                runner = Runner(tmp_path, environment, log)
                # Whether git follows is all the same to this.
                with suppress(CommandError):
                    await runner.run("git", "clone", f"{url}/origin.git", "repo", seconds=60)
    assert [header for _, header in other.told if header] == []
