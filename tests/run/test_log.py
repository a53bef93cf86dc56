from pathlib import Path

import anyio
from hypothesis import given
from hypothesis import strategies as st

from moonmind_ext.run.events import Event
from moonmind_ext.run.log import LiveOutput, end_of, write_excerpt, write_log
from pipelines.masking import Masker

SECRET = "the-secret-value"


def live(masker: Masker) -> tuple[LiveOutput, list[Event]]:
    events: list[Event] = []
    return LiveOutput(masker, events.append), events


@given(st.text(), st.data())
def test_live_text_is_whole_however_it_is_cut(text: str, data: st.DataObject) -> None:
    output, events = live(Masker([SECRET]))
    cut = data.draw(st.integers(0, len(text)))
    for piece in (text[:cut], text[cut:]):
        output.feed(piece)
    output.finish()

    shown = "".join(event.payload["text"] for event in events)
    assert shown == text.encode("utf-8", "replace").decode()
    offset = 0
    for event in events:
        assert event.payload["offset"] == offset
        offset += len(event.payload["text"].encode())


def test_a_secret_that_comes_in_two_pieces_is_masked_live() -> None:
    output, events = live(Masker([SECRET]))
    output.feed(f"a {SECRET[:7]}")
    output.feed(f"{SECRET[7:]} b")
    output.finish()

    assert "".join(event.payload["text"] for event in events) == "a *** b"


async def test_settling_waits_for_text_that_is_on_its_way() -> None:
    output, events = live(Masker())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(output.settle, 4)
        await anyio.sleep(0.05)
        output.feed("late")

    assert [event.payload["text"] for event in events] == ["late"]


async def test_settling_says_how_much_never_came() -> None:
    output, _ = live(Masker())
    output.feed("some")

    assert await output.settle(10) == 6


@given(st.binary(max_size=300))
def test_a_log_is_the_commands_bytes(tmp_path_factory: object, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("log")  # type: ignore[attr-defined]
    (folder / "raw").write_bytes(data)
    write_log(folder / "raw", folder / "log", Masker([SECRET]))

    assert (folder / "log").read_bytes() == data


def test_a_cut_log_shows_no_half_of_a_secret(tmp_path: Path) -> None:
    (tmp_path / "head").write_text(f"begin {SECRET[:9]}")
    (tmp_path / "tail").write_text(f"{SECRET[9:]}{' and much more text' * 5}, then the end")
    write_excerpt(tmp_path / "head", tmp_path / "tail", tmp_path / "log", Masker([SECRET]), 10_000)

    log = (tmp_path / "log").read_text()
    assert "the-se" not in log
    assert "value" not in log
    assert log.endswith("then the end")
    assert "of 10000 bytes" in log


def test_the_end_of_a_log_is_text_whatever_it_is(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 10_000 + b"\xff\nlast\n")
    assert end_of(log).endswith("\ufffd\nlast\n")
    assert len(end_of(log)) < 10_000
    log.write_bytes(b"")
    assert end_of(log) == ""
