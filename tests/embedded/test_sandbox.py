"""Where sandboxes can be made, and how."""

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moonmind_ext.embedded import sandbox as sandboxes
from moonmind_ext.embedded import sandbox_problem, server
from moonmind_ext.embedded.sandbox import (
    Identity,
    MountOptions,
    Sandbox,
    find_identity,
    find_sandbox,
)
from tests.embedded.support import Connect, host, shell


def options(**changes: object) -> list[str]:
    arguments = {
        "root": [MountOptions(("--bind", "/layer", "/"))],
        "mounts": [MountOptions(("--tmpfs", "/t"))],
        "identity": Identity(),
        "workdir": "/w",
        "environment": {"A": "1"},
    }
    return Sandbox("bwrap", overlay=True).options(**arguments | changes)  # type: ignore[arg-type]


def test_a_sandbox_dies_with_us_and_has_its_own_namespaces() -> None:
    found = options()
    assert {"--die-with-parent", "--new-session", "--unshare-pid", "--unshare-ipc"} <= set(found)
    assert not {"--unshare-net", "--unshare-cgroup"} & set(found)


def test_mounts_come_after_the_root_and_in_their_order() -> None:
    found = options()
    assert found.index("--bind") < found.index("--proc") < found.index("--tmpfs")
    assert found[-5:] == ["--chdir", "/w", "--setenv", "A", "1"]


def test_beside_a_mount_of_the_host_overlays_are_to_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Mounting takes rights that a test does not have.
    monkeypatch.setattr(sandboxes, "_host_mounts", lambda: {"usr/share/somewhere"})
    layer, work = tmp_path / "layer", tmp_path / "work"
    layer.mkdir()
    work.mkdir()

    mounts = [mount.options for mount in sandboxes.assemble(layer, work, overlay=True)]

    assert ("--dir", "/usr/share") in mounts
    assert any(options[:2] == ("--overlay-src", "/usr/lib") for options in mounts)


def test_another_user_is_a_user_namespace() -> None:
    found = options(identity=Identity(1000, 100))
    assert found[found.index("--uid") + 1] == "1000"
    assert found[found.index("--gid") + 1] == "100"


def test_users_are_read_as_docker_reads_them() -> None:
    me = pwd.getpwuid(os.getuid())
    assert find_identity("") == Identity(0, 0, "/root")
    assert find_identity(me.pw_name) == Identity(me.pw_uid, me.pw_gid, me.pw_dir)
    assert find_identity("4242:17") == Identity(4242, 17, "/")
    with pytest.raises(LookupError, match="unable to find user"):
        find_identity("nobody-knows")


def test_without_bubblewrap_the_problem_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sandboxes, "_bwraps", lambda: iter(()))
    problem = find_sandbox(tmp_path)
    assert isinstance(problem, str)
    assert "install" in problem


def test_a_bubblewrap_that_fails_is_reported_with_its_own_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setattr(sandboxes, "_bwraps", lambda: iter([str(broken)]))
    problem = find_sandbox(tmp_path / "state")
    assert isinstance(problem, str)
    assert "No permissions to create new namespace" in problem


def test_a_state_directory_that_cannot_be_made_is_named(sandbox: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    problem = find_sandbox(tmp_path / "file" / "state")
    assert isinstance(problem, str)
    assert str(tmp_path / "file") in problem


async def test_without_overlays_everything_but_the_hosts_root_is_writable(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = find_sandbox(tmp_path)
    assert isinstance(found, Sandbox)
    monkeypatch.setattr(server, "find_sandbox", lambda _: Sandbox(found.bwrap, overlay=False))
    async with connect() as dag:
        container = (
            host(dag)
            .with_mounted_directory("/usr/share/no/where", dag.directory())
            .with_workdir("/usr/share/no/where")
        )
        ran = shell(
            container,
            "touch here /tmp/a /root/b /new; ls /usr/share | wc -l; touch /etc/x || echo read-only",
        )
        lines, said = (await ran.stdout()).split()
        assert int(lines) == len(os.listdir("/usr/share")) + 1
        assert said == "read-only"
        assert await shell(ran, "ls /tmp /root").stdout() == "/root:\nb\n\n/tmp:\na\n"
        assert await ran.exists("/new")
        assert await ran.directory("/usr/share/no/where").entries() == ["here"]
        bare = dag.container().from_("embedded.test/no-shell")
        assert not await bare.exists("/bin/sh")
        assert await bare.with_exec(["printf", "x"]).stdout() == "x"
        user = dag.container().from_("embedded.test/not-root")
        assert await shell(user, "touch a; ls; id -u").stdout() == "a\n1000\n"


AS_ORDINARY_USER = """
import anyio, os, sys
from pathlib import Path
from moonmind_ext.embedded import sandbox_problem, serve
from tests.embedded.support import connected, host, shell

async def main():
    state = Path(sys.argv[1])
    if problem := sandbox_problem():
        print("SKIP", problem)
        return
    async with serve(state_dir=state) as engine, connected(engine) as dag:
        directory = dag.directory().with_new_file("f", "1")
        script = "id -u; cat f; touch new; mkdir shut; touch shut/x; chmod 0 shut; touch /tmp/x /root/y"
        ran = shell(host(dag).with_mounted_directory("/work/a/b", directory).with_workdir("/work/a/b"), script)
        print((await ran.stdout()).split())
        print(await ran.directory("/work/a/b").changes(directory).added_paths())
        print(await shell(ran, "ls /root; whoami").stdout())
        print(await shell(dag.container().from_("embedded.test/not-root"), "id -u; touch x; ls").stdout())
    print(os.listdir(state / "sessions"))

anyio.run(main)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_an_ordinary_user_can_do_it_too(sandbox: None) -> None:
    root = Path(__file__).parents[2]
    state = Path("/tmp") / f"embedded-of-nobody-{os.getpid()}"
    state.mkdir()
    os.chown(state, 65534, 65534)
    try:
        command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
        command += [sys.executable, "-c", AS_ORDINARY_USER, str(state)]
        environment = {"PATH": os.environ["PATH"], "HOME": str(state), "PYTHONPATH": str(root)}
        result = subprocess.run(
            command,
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        subprocess.run(["rm", "-rf", str(state)], check=True)
    if "Permission denied" in result.stderr or result.stdout.startswith("SKIP"):
        pytest.skip(result.stdout + result.stderr)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n") == [
        "['0', '1']",
        "['new', 'shut/', 'shut/x']",
        "y",
        "root",
        "",
        "1000",
        "x",
        "",
        "[]",
        "",
    ]


def test_here_sandboxes_can_be_made_or_the_problem_is_one_short_message() -> None:
    problem = sandbox_problem()
    assert problem is None or "\n" not in problem
