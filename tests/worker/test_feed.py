"""A job's events on their way: in order, output in few and true pieces."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moonmind_ext.run.events import LOG, Event
from moonmind_ext.worker import feed as feed_module
from moonmind_ext.worker.feed import BATCH_BYTES, BATCH_SECONDS, MAX_WAITING, Feed
from moonmind_ext.worker.queue import QueueClient, QueueError
from tests.worker.servers import Way, claimed, client_of, open_way, until
from tests.worker.support import AT_ONCE, Desk, open_desk, payload


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait; how long the pauses are is a test of its own."""
    monkeypatch.setattr("moonmind_ext.worker.claim.RETRY_SECONDS", (0.05, 0.1))


@dataclass
class Recipient:
    """Takes events, and notes when; what a test raises for one is raised."""

    events: list[Event] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    problems: dict[str, list[QueueError]] = field(default_factory=dict)

    async def event(self, job_id: str, event: Event) -> None:
        if problems := self.problems.get(event.message):
            raise problems.pop(0)
        self.events.append(event)
        self.times.append(anyio.current_time())

    def messages(self) -> list[str]:
        return [event.message for event in self.events]

    def output(self) -> list[Event]:
        return [event for event in self.events if event.message == LOG]


def said(message: str) -> Event:
    return Event(message, {})


class Printer:
    """Gives pieces of output as a run does: with the offsets of their first bytes."""

    def __init__(self) -> None:
        self.all = b""

    def __call__(self, text: str) -> Event:
        event = Event(LOG, {"stream": "stdout", "text": text, "offset": len(self.all)})
        self.all += text.encode()
        return event

    def is_true(self, event: Event) -> bool:
        """Whether an event has what was printed at its offset."""
        text: bytes = event.payload["text"].encode()
        offset: int = event.payload["offset"]
        return self.all[offset : offset + len(text)] == text


@asynccontextmanager
async def feeding(recipient: Recipient) -> AsyncIterator[Feed]:
    feed = Feed(recipient, "1")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(feed.run)
        yield feed
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def on_a_queue(folder: Path) -> AsyncIterator[tuple[Desk, Way, str, QueueClient]]:
    async with (
        open_desk(folder / "queue.db", AT_ONCE) as desk,
        open_way(desk.url) as (way, url),
        client_of(url) as queue,
    ):
        await desk.submit(payload("busybox", "true"))
        yield desk, way, (await claimed(queue)).id, queue


async def test_events_arrive_in_their_order_and_output_stays_in_its_place() -> None:
    recipient, printed = Recipient(), Printer()
    async with feeding(recipient) as feed:
        for event in (said("a"), printed("1"), printed("2"), said("b"), printed("3"), said("c")):
            feed.put(event)
        await feed.flush()
    assert recipient.messages() == ["a", LOG, "b", LOG, "c"]
    assert [event.payload["text"] for event in recipient.output()] == ["12", "3"]
    assert all(map(printed.is_true, recipient.output()))


async def test_output_is_at_most_one_event_a_second() -> None:
    recipient, printed = Recipient(), Printer()
    async with feeding(recipient) as feed:
        end = anyio.current_time() + 2.2
        number = 0
        while anyio.current_time() < end:
            feed.put(printed(f"line {number}\n"))
            if number % 7 == 0:
                # Something else between makes no exception.
                feed.put(said(f"event {number}"))
            number += 1
            await anyio.sleep(0.02)
    times = [
        time
        for time, event in zip(recipient.times, recipient.events, strict=True)
        if event.message == LOG
    ]
    assert len(times) >= 2
    assert all(b - a >= BATCH_SECONDS * 0.95 for a, b in pairwise(times))
    assert all(map(printed.is_true, recipient.output()))


async def test_output_that_goes_on_is_seen_though_nothing_follows_it() -> None:
    recipient, printed = Recipient(), Printer()
    async with feeding(recipient) as feed:
        feed.put(printed("asleep now"))
        await until(lambda: bool(recipient.events), 30)
    assert recipient.output()[0].payload["text"] == "asleep now"


async def test_what_a_short_command_prints_is_one_event_and_does_not_wait() -> None:
    recipient, printed = Recipient(), Printer()
    async with feeding(recipient) as feed:
        begin = anyio.current_time()
        for number in range(100):
            feed.put(printed(f"{number}\n"))
            await anyio.sleep(0)
        feed.put(said("finished"))
        await feed.flush()
        assert anyio.current_time() - begin < BATCH_SECONDS
    assert recipient.messages() == [LOG, "finished"]
    assert recipient.output()[0].payload == {
        "stream": "stdout",
        "text": printed.all.decode(),
        "offset": 0,
    }


async def test_of_much_output_the_newest_is_kept_with_its_true_offset() -> None:
    recipient, printed = Recipient(), Printer()
    async with feeding(recipient) as feed:
        for number in range(5000):
            feed.put(printed(f"line {number}\n"))
        feed.put(said("finished"))
        await feed.flush()
    (event,) = recipient.output()
    assert len(event.payload["text"].encode()) == BATCH_BYTES
    assert event.payload["text"].endswith("line 4999\n")
    assert event.payload["offset"] == len(printed.all) - BATCH_BYTES
    assert printed.is_true(event)


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(1, 6000)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_cut_keeps_whole_characters_and_nothing_that_would_have_fitted(
    pieces: list[tuple[str, int]],
) -> None:
    feed, printed = Feed(Recipient(), "1"), Printer()

    async def put() -> None:
        for text, times in pieces:
            feed.put(printed(text * times))

    anyio.run(put)
    (event,) = feed._waiting
    assert isinstance(event, Event)
    size = len(event.payload["text"].encode())
    assert printed.is_true(event)
    assert event.payload["offset"] + size == len(printed.all)
    # Three bytes fewer at most: the end of a character whose begin did not fit.
    assert min(len(printed.all), BATCH_BYTES) - 3 <= size <= BATCH_BYTES


async def test_events_wait_for_a_server_that_is_away(tmp_path: Path) -> None:
    async with on_a_queue(tmp_path) as (desk, way, job_id, queue):
        way.is_away = True
        feed = Feed(queue, job_id)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(feed.run)
            for number in range(5):
                feed.put(said(f"event {number}"))
            await until(lambda: way.count("/events") >= 2)
            way.is_away = False
            await feed.flush()
            tasks.cancel_scope.cancel()
        heard = [message for message in await desk.messages(job_id) if message.startswith("event")]
    assert heard == [f"event {number}" for number in range(5)]


async def test_output_that_could_not_be_sent_holds_nothing_up() -> None:
    away = [QueueError("away") for _ in range(2)]
    recipient, printed = Recipient(problems={LOG: away}), Printer()
    async with feeding(recipient) as feed:
        feed.put(printed("lost"))
        feed.put(said("a"))
        feed.put(printed("lost too"))
        feed.put(said("b"))
        feed.put(printed("kept"))
        await feed.flush()
    assert recipient.messages() == ["a", "b", LOG]
    # The gap is seen by the offset.
    assert recipient.output()[0].payload["offset"] == len("lostlost too")


async def test_a_refused_event_is_dropped_and_the_others_go_on() -> None:
    recipient = Recipient(
        problems={"bad": [QueueError("no", 422)], "soon": [QueueError("oh", 503)]}
    )
    async with feeding(recipient) as feed:
        for message in ("a", "bad", "soon", "b"):
            feed.put(said(message))
        await feed.flush()
    assert recipient.messages() == ["a", "soon", "b"]


async def test_the_end_of_a_job_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "FLUSH_SECONDS", 0.3)
    recipient = Recipient(problems={"a": [QueueError("away") for _ in range(99)]})
    async with feeding(recipient) as feed:
        feed.put(said("a"))
        with anyio.fail_after(20):
            await feed.flush()
    assert recipient.events == []


async def test_while_the_server_is_away_not_more_than_so_many_events_are_kept() -> None:
    recipient, printed = Recipient(), Printer()
    feed = Feed(recipient, "1")
    for number in range(MAX_WAITING + 50):
        feed.put(said(f"event {number}"))
        feed.put(printed("x" * 100))
    # Of both kinds together, and output is merged where it can be.
    assert len(feed._waiting) <= MAX_WAITING + 1
