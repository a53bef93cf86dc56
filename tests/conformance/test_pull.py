"""Tags that move, in a registry that the tests may write to."""

import hashlib
import json
import os
from typing import Any

import httpx
import pytest

from moonmind_ext.engine.choice import EngineChoice
from tests.conformance.support import Task, sh
from tests.engines import Engine

MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)


@pytest.fixture
def registry(engine: Engine) -> str:
    if engine.choice is EngineChoice.EMBEDDED:
        pytest.skip("the embedded engine pulls no images")
    if not (registry := os.environ.get("MOONMIND_TEST_REGISTRY")):
        pytest.skip("MOONMIND_TEST_REGISTRY names no registry that a tag can be moved in")
    return registry


def move_tag(registry: str, tag: str, greeting: str) -> str:
    """Let a tag of busybox name an image whose GREETING is another; give its digest."""
    with httpx.Client(base_url=f"http://{registry}/v2/busybox/", timeout=30) as client:
        answer = client.get("manifests/1.36", headers={"Accept": ", ".join(MANIFESTS)})
        manifest: dict[str, Any] = answer.raise_for_status().json()
        config = client.get(f"blobs/{manifest['config']['digest']}").raise_for_status().json()
        config["config"].setdefault("Env", []).append(f"GREETING={greeting}")
        blob = json.dumps(config).encode()
        digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
        upload = client.post("blobs/uploads/").raise_for_status().headers["Location"]
        client.put(
            httpx.URL(upload).copy_merge_params({"digest": digest}), content=blob
        ).raise_for_status()
        manifest["config"] |= {"digest": digest, "size": len(blob)}
        content = json.dumps(manifest).encode()
        media_type = answer.headers["Content-Type"]
        client.put(
            f"manifests/{tag}", content=content, headers={"Content-Type": media_type}
        ).raise_for_status()
        return f"sha256:{hashlib.sha256(content).hexdigest()}"


async def test_pull_always_runs_what_the_tag_names_now(
    task: Task, registry: str, unique: str
) -> None:
    container = {"image": f"{registry}/busybox:{unique}"}
    for greeting in ("first", "second"):
        digest = move_tag(registry, unique, greeting)
        result = await task(*sh("echo $GREETING"), pull="always", fields=container)

        assert result.log.decode().strip() == greeting
        assert result.report.image_digest == digest
        assert digest in result.report.reproduce


async def test_pull_if_missing_stays_with_what_the_session_has(
    engine: Engine, task: Task, registry: str, unique: str
) -> None:
    container = {"image": f"{registry}/busybox:{unique}"}
    move_tag(registry, unique, "first")
    async with engine.session() as session:
        await task("true", fields=container, session=session)
        move_tag(registry, unique, "second")
        result = await task(*sh("echo $GREETING"), fields=container, session=session)

    assert result.log == b"first\n"


async def test_pull_always_of_an_image_that_is_gone_is_final(
    task: Task, registry: str, unique: str
) -> None:
    container = {"image": f"{registry}/busybox:never-{unique}"}
    result = await task("true", pull="always", fields=container)

    assert result.report.outcome == "image-unavailable"
    assert not result.report.retryable
