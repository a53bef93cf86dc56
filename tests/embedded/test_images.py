"""The images that the embedded engine knows."""

import dagger
import pytest

from moonmind_ext.embedded.images import static_busybox
from tests.embedded.support import Connect, shell

needs_busybox = pytest.mark.skipif(
    static_busybox() is None, reason="no static busybox (busybox-static)"
)


async def test_any_reference_is_the_hosts_own_root(connect: Connect) -> None:
    async with connect() as dag:
        container = dag.container().from_("docker.io/library/python:3.12")
        assert await container.image_ref() == "docker.io/library/python:3.12"
        assert await container.exists("/bin/sh")
        assert await container.user() == ""


async def test_an_image_that_is_missing_fails_as_on_a_real_engine(connect: Connect) -> None:
    async with connect() as dag:
        with pytest.raises(dagger.QueryError, match=r"failed to resolve image .* not found"):
            await dag.container().from_("embedded.test/missing:1").sync()


async def test_an_image_without_a_shell_has_none(connect: Connect) -> None:
    async with connect() as dag:
        container = dag.container().from_("embedded.test/no-shell")
        assert not await container.exists("/bin/sh")
        assert not await container.exists("/bin/bash")
        assert await container.with_exec(["printf", "runs"]).stdout() == "runs"
        ran = container.with_exec(["sh", "-c", "true"], expect=dagger.ReturnType.ANY)
        assert await ran.exit_code() == 127


async def test_an_image_of_an_ordinary_user_runs_as_him_in_his_home(connect: Connect) -> None:
    async with connect() as dag:
        container = dag.container().from_("embedded.test/not-root")
        assert await container.user() == "1000:1000"
        assert await container.workdir() == "/home/app"
        ran = shell(container, "id -u; pwd; touch mine; stat -c %u mine")
        assert await ran.stdout() == "1000\n/home/app\n1000\n"
        assert await ran.exists("mine")


async def test_an_image_with_an_entrypoint_has_it(connect: Connect) -> None:
    async with connect() as dag:
        container = dag.container().from_("embedded.test/entrypoint:1")
        assert await container.entrypoint() == ["/entry"]
        assert await shell(container, "echo $ENTRY", use_entrypoint=True).stdout() == "yes\n"
        assert await shell(container, "echo $ENTRY").stdout() == "\n"


@needs_busybox
@pytest.mark.parametrize(
    "reference", ["embedded.test/busybox", "docker.io/library/busybox:1.37.0-musl"]
)
async def test_a_busybox_runs_where_nothing_else_is(connect: Connect, reference: str) -> None:
    async with connect() as dag:
        busybox = dag.container().from_(reference).file("/bin/busybox")
        container = dag.container().with_file("/busybox", busybox)
        ran = container.with_exec(["/busybox", "sh", "-c", "echo $0; /busybox ls /"])
        assert "busybox" in await ran.stdout()


async def test_a_container_of_no_image_is_empty(connect: Connect) -> None:
    async with connect() as dag:
        ran = dag.container().with_exec(["true"], expect=dagger.ReturnType.ANY)
        assert await ran.exit_code() == 127
        with pytest.raises(dagger.QueryError, match=r"Container\.From"):
            await dag.container().image_ref()
