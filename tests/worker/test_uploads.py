"""A job's files on their way: whole, under names for everybody, and no failure of the job."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moonmind_ext.queue.rules import QueueRules
from moonmind_ext.worker import uploads
from moonmind_ext.worker.uploads import (
    LEAST_PART_BYTES,
    PART_BYTES,
    Upload,
    Uploaded,
    Uploader,
    job_files,
    part_names,
    read_part,
)
from pipelines.masking import Masker
from tests.worker.servers import (
    Request,
    Way,
    claimed,
    client_of,
    http_server,
    json_answer,
    open_way,
    refusal,
    until,
)
from tests.worker.support import Desk, open_desk, payload

SECRET = "s3cret-0123456789"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait; how long the pauses are is a test of its own."""
    monkeypatch.setattr("moonmind_ext.worker.claim.RETRY_SECONDS", (0.05, 0.1))


@asynccontextmanager
async def on_a_queue(
    folder: Path, limit: int = PART_BYTES
) -> AsyncIterator[tuple[Desk, Way, str, Uploader]]:
    rules = QueueRules(upload_limit_bytes=limit)
    async with (
        open_desk(folder / "queue.db", rules) as desk,
        open_way(desk.url) as (way, url),
        client_of(url) as queue,
    ):
        await desk.submit(payload("busybox", "true"))
        job_id = (await claimed(queue)).id
        yield desk, way, job_id, Uploader(queue, job_id, Masker([SECRET]))


def files_of(folder: Path, *contents: bytes) -> list[Upload]:
    found = []
    for number, content in enumerate(contents):
        (folder / f"f{number}").write_bytes(content)
        found.append(Upload(folder / f"f{number}", f"container/f{number}"))
    return found


def noise(size: int) -> bytes:
    return hashlib.shake_128(b"noise").digest(size)


async def test_files_are_stored_as_they_are(tmp_path: Path) -> None:
    contents = [b"1", noise(1000), noise(PART_BYTES)]
    async with on_a_queue(tmp_path) as (desk, _, job_id, uploader):
        assert await uploader.upload(files_of(tmp_path, *contents)) == Uploaded()
        found = await desk.artifacts(job_id)
        answer = await desk.http.get(f"/api/queue/jobs/{job_id}/artifacts")
    assert found == {f"container/f{n}": content for n, content in enumerate(contents)}
    for item in answer.json()["items"]:
        assert item["digest"] == f"sha256:{hashlib.sha256(found[item['name']]).hexdigest()}"


@pytest.mark.parametrize(
    ("size", "limit", "parts"),
    [
        # Over MoonMind's limit by one byte.
        (PART_BYTES + 1, PART_BYTES, 2),
        (3 << 20, 1 << 20, 4),
        # Limits a little above the least, for a file that is not much larger.
        (100 << 10, 70 << 10, 2),
        (LEAST_PART_BYTES + 1, LEAST_PART_BYTES, 2),
        (1 << 20, LEAST_PART_BYTES, 16),
    ],
)
async def test_a_file_over_the_servers_limit_goes_in_parts_that_make_it_whole(
    tmp_path: Path, size: int, limit: int, parts: int
) -> None:
    content = noise(size)
    async with on_a_queue(tmp_path, limit) as (desk, _, job_id, uploader):
        uploaded = await uploader.upload(files_of(tmp_path, content, b"small"))
        found = await desk.artifacts(job_id)
    assert uploaded == Uploaded(parts={"container/f0": parts})
    assert found.pop("container/f1") == b"small"
    # In the order that a shell's `cat name.part-*` takes them.
    assert b"".join(found[name] for name in sorted(found)) == content
    assert min(found) == "container/f0.part-0001"
    assert len(found) == parts


async def test_a_server_that_takes_next_to_nothing_is_not_asked_for_ever(tmp_path: Path) -> None:
    async with on_a_queue(tmp_path, 1000) as (desk, way, job_id, uploader):
        uploaded = await uploader.upload(files_of(tmp_path, noise(1 << 20), b"small"))
        assert await desk.artifacts(job_id) == {"container/f1": b"small"}
    assert list(uploaded.missing) == ["container/f0"]
    assert "artifact_too_large" in uploaded.missing["container/f0"]
    assert way.count("/upload") < 10


@given(st.integers(1, 3000), st.integers(1, 700))
def test_parts_joined_are_the_file(size: int, part: int) -> None:
    content = noise(size)
    # Not tmp_path: each example has a file of its own.
    with NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        names = part_names("name", size, part)
        assert names == sorted(names)
        pieces = [read_part(Path(file.name), index, part) for index in range(len(names))]
    assert b"".join(pieces) == content
    assert all(0 < len(piece) <= part for piece in pieces)


async def test_an_empty_file_is_not_sent_and_not_missed(tmp_path: Path) -> None:
    async with on_a_queue(tmp_path) as (desk, way, job_id, uploader):
        assert await uploader.upload(files_of(tmp_path, b"")) == Uploaded()
        assert await desk.artifacts(job_id) == {}
    assert way.count("/upload") == 0


async def test_a_name_is_too_long_where_the_server_says_so_and_no_sooner(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"1")
    longest = "ü" * 502
    files = [Upload(tmp_path / "f", longest), Upload(tmp_path / "f", longest + "x")]
    async with on_a_queue(tmp_path) as (desk, _, job_id, uploader):
        uploaded = await uploader.upload(files)
        assert set(await desk.artifacts(job_id)) == {longest}
    assert uploaded.missing == {longest + "x": "its name is too long for the server"}


async def test_secrets_in_names_are_masked_also_where_something_went_wrong(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"1")
    files = [
        Upload(tmp_path / "f", f"container/{SECRET}.txt"),
        Upload(tmp_path / f"gone-{SECRET}", f"container/gone-{SECRET}"),
    ]
    async with on_a_queue(tmp_path) as (desk, _, job_id, uploader):
        uploaded = await uploader.upload(files)
        assert set(await desk.artifacts(job_id)) == {"container/***.txt"}
    assert uploaded.missing == {"container/gone-***": "No such file or directory"}


async def test_of_two_files_with_one_name_for_all_none_is_overwritten(tmp_path: Path) -> None:
    # Masked, or no UTF-8, or with blanks at the end, which the server takes away.
    other = "0ther-0123456789"
    (tmp_path / "f").write_bytes(b"first")
    (tmp_path / "g").write_bytes(b"second")
    names = [(SECRET, other), ("a\udcff", "a\udcfe"), ("b", "b ")]
    async with on_a_queue(tmp_path) as (desk, _, job_id, first_uploader):
        uploader = Uploader(first_uploader._queue, job_id, Masker([SECRET, other]))
        for first, second in names:
            uploaded = await uploader.upload(
                [Upload(tmp_path / "f", first), Upload(tmp_path / "g", second)]
            )
        assert await desk.artifacts(job_id) == dict.fromkeys(("***", "a?", "b"), b"first")
    assert set(uploaded.missing) == {"***", "a?", "b "}
    assert set(uploaded.missing.values()) == {"another file has this name already"}


def test_a_jobs_files_are_its_logs_its_documents_and_its_artifacts(tmp_path: Path) -> None:
    for name in (
        "logs/prepare.log",
        "logs/execute.log",
        "logs/other.txt",
        "task_context.json",
        "other.txt",
        "container/b/c.txt",
        "container/a.txt",
        "elsewhere/x.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [file.name for file in job_files(tmp_path, "container")] == [
        "logs/execute.log",
        "logs/prepare.log",
        "task_context.json",
        "container/a.txt",
        "container/b/c.txt",
    ]
    assert job_files(tmp_path / "nothing", "container") == []


def test_links_and_what_is_no_file_stay_behind(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    (outside / "secret.log").write_text("x")
    artifacts = tmp_path / "artifacts"
    (artifacts / "container").mkdir(parents=True)
    (artifacts / "logs").mkdir()
    (artifacts / "logs" / "link.log").symlink_to(outside / "secret.log")
    (artifacts / "link.json").symlink_to(outside / "secret.log")
    (artifacts / "container" / "file").symlink_to(outside / "secret.log")
    (artifacts / "container" / "folder").symlink_to(outside)
    (artifacts / "container" / "nowhere").symlink_to("nowhere")
    os.mkfifo(artifacts / "container" / "fifo")
    assert job_files(artifacts, "container") == []
    # Nor is the directory itself followed.
    (artifacts / "linked").symlink_to(outside)
    assert job_files(artifacts, "linked") == []


async def test_a_name_that_is_no_utf_8_is_stored_under_one_that_is(tmp_path: Path) -> None:
    folder = tmp_path / "artifacts" / "container"
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"a\xffb")).write_bytes(b"1")
    async with on_a_queue(tmp_path) as (desk, _, job_id, uploader):
        assert await uploader.upload(job_files(tmp_path / "artifacts", "container")) == Uploaded()
        assert await desk.artifacts(job_id) == {"container/a?b": b"1"}


async def test_a_refused_file_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    async def respond(request: Request) -> bytes | None:
        return (
            refusal(422, "invalid", "not this")
            if b"container/f3" in request.body
            else json_answer({})
        )

    async with http_server(respond) as url, client_of(url) as queue:
        files = files_of(tmp_path, *[b"x"] * 8)
        uploaded = await Uploader(queue, "1", Masker()).upload(files)
    assert list(uploaded.missing) == ["container/f3"]
    assert "422 Unprocessable Entity: invalid: not this" in uploaded.missing["container/f3"]


async def test_files_wait_for_a_server_that_is_away(tmp_path: Path) -> None:
    contents = [noise(n + 1) for n in range(10)]
    async with on_a_queue(tmp_path) as (desk, way, job_id, uploader):
        way.is_away = True

        async def come_back() -> None:
            await until(lambda: way.count("/upload") >= 6)
            way.is_away = False

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(come_back)
            assert await uploader.upload(files_of(tmp_path, *contents)) == Uploaded()
        found = await desk.artifacts(job_id)
    assert found == {f"container/f{n}": content for n, content in enumerate(contents)}


async def test_a_lost_answer_makes_no_difference(tmp_path: Path) -> None:
    async with on_a_queue(tmp_path) as (desk, way, job_id, uploader):
        way.lost.append("/upload")
        assert await uploader.upload(files_of(tmp_path, b"1")) == Uploaded()
        assert await desk.artifacts(job_id) == {"container/f0": b"1"}
    assert way.count("/upload") == 2


async def test_a_server_that_stays_away_is_given_up_and_every_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PATIENCE_SECONDS", 0.4)
    asked: Counter[bytes] = Counter()

    async def respond(request: Request) -> bytes | None:
        asked.update(re.findall(rb"container/f[0-9]+", request.body))
        return refusal(503)

    async with http_server(respond) as url, client_of(url) as queue:
        with anyio.fail_after(20):
            files = files_of(tmp_path, *[b"x"] * 12)
            uploaded = await Uploader(queue, "1", Masker()).upload(files)
    assert len(uploaded.missing) == 12
    # The first were waited for, and those after them not again.
    assert asked[b"container/f0"] > 1
    assert [asked[f"container/f{n}".encode()] for n in range(uploads.AT_ONCE, 12)] == [0] * 8


async def test_files_for_which_there_was_no_time_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "ALL_SECONDS", 0.5)

    async def respond(request: Request) -> bytes | None:
        # The first arrives; of the others nobody hears.
        return json_answer({}, 201) if b"container/f0" in request.body else None

    async with http_server(respond) as url, client_of(url) as queue:
        with anyio.fail_after(20):
            files = files_of(tmp_path, *[b"x"] * 6)
            uploaded = await Uploader(queue, "1", Masker()).upload(files)
    assert uploaded.missing == {
        f"container/f{n}": "there was no time left for it" for n in range(1, 6)
    }


async def test_not_more_than_a_few_files_are_on_their_way_at_once(tmp_path: Path) -> None:
    now = most = 0

    async def respond(_: Request) -> bytes | None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await anyio.sleep(0.02)
        now -= 1
        return json_answer({})

    async with http_server(respond) as url, client_of(url) as queue:
        await Uploader(queue, "1", Masker()).upload(files_of(tmp_path, *[b"x"] * 20))
    assert most == uploads.AT_ONCE


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.log", "text/plain"), ("a.json", "application/json"), ("a", "application/octet-stream")],
)
def test_a_file_has_the_type_of_its_name(name: str, kind: str) -> None:
    assert Upload(Path("/x") / name, name).content_type == kind
