"""A job's events on their way to the queue: in order, live output in batches."""

from collections import deque
from dataclasses import replace
from typing import Protocol

import anyio
import structlog

from moonmind_ext.run.events import LOG, Event
from moonmind_ext.worker.claim import pause_after
from moonmind_ext.worker.queue import QueueError

BATCH_SECONDS = 1.0
"""From one event with output to the next."""

GATHER_SECONDS = 0.25
"""From the first output to its event, where the one before is longer ago: most of what
a short command prints is one event then."""

BATCH_BYTES = 16 << 10
"""Of output in one event. What is more is left out, the older first: who watches
wants to see what happens now, and the log has it all."""

FLUSH_SECONDS = 10.0
"""For events that are still waiting when their job is about to end. They tell how it
ran; that it ended must not wait for them any longer."""

EVENT_SECONDS = 120.0
"""For one event, while the server does not take it: twice what a restart of it may
last. One that it will never take must not hold up those behind it."""

MAX_WAITING = 1000
"""Events without output, while the server is away. A job has about twenty."""

log = structlog.get_logger()


class Recipient(Protocol):
    """Who is sent a job's events: the queue, or somebody who knows it."""

    async def event(self, job_id: str, event: Event) -> None:
        """Add an event to a job; a `QueueError` when it did not arrive."""


class Feed:
    """Takes events at any time, and sends them while `run` runs."""

    def __init__(self, queue: Recipient, job_id: str) -> None:
        self._queue = queue
        self._job_id = job_id
        # A mark among the events is set when all before it are sent.
        self._waiting: deque[Event | anyio.Event] = deque()
        self._more = anyio.Event()
        # By anyio's clock: the last event with output was sent, the next was begun.
        self._sent_output = self._began_output = float("-inf")
        # Set when something else stands behind the output that is gathered.
        self._followed = anyio.Event()

    def put(self, event: Event) -> None:
        """Take an event; its texts are masked already."""
        if event.message == LOG:
            self._put_output(event)
        elif len(self._waiting) < MAX_WAITING:
            self._append(event)

    def _put_output(self, event: Event) -> None:
        last = self._waiting[-1] if self._waiting else None
        if not isinstance(last, Event) or last.message != LOG:
            self._append(_newest(event))
            self._began_output, self._followed = anyio.current_time(), anyio.Event()
            return
        text = last.payload["text"] + event.payload["text"]
        self._waiting[-1] = _newest(replace(last, payload={**last.payload, "text": text}))

    def _append(self, item: Event | anyio.Event) -> None:
        self._waiting.append(item)
        self._followed.set()
        self._more.set()

    async def run(self) -> None:
        """Send what comes until this is cancelled."""
        while True:
            while self._waiting:
                await self._send_first()
            self._more = anyio.Event()
            await self._more.wait()

    async def _send_first(self) -> None:
        first = self._waiting[0]
        if isinstance(first, Event) and first.message == LOG:
            await anyio.sleep_until(self._sent_output + BATCH_SECONDS)
            # But not when the command is over, and its end waits behind.
            with anyio.CancelScope(deadline=self._began_output + GATHER_SECONDS):
                await self._followed.wait()
            self._sent_output = anyio.current_time()
        # Taken only now: what was printed meanwhile is in it.
        first = self._waiting.popleft()
        if isinstance(first, Event):
            await self._send(first)
        else:
            first.set()

    async def _send(self, event: Event) -> None:
        attempt, gives_up = 0, anyio.current_time() + EVENT_SECONDS
        while True:
            attempt += 1
            try:
                await self._queue.event(self._job_id, event)
            except QueueError as error:
                # Of output the newest is soon there; it is not worth holding others up.
                late = anyio.current_time() > gives_up
                if late or not error.may_pass or event.message == LOG:
                    log.warning("an event was lost", event_message=event.message, error=str(error))
                    return
                await anyio.sleep(pause_after(attempt))
            else:
                return

    async def flush(self) -> None:
        """Wait until everything is sent, or `FLUSH_SECONDS` are over."""
        mark = anyio.Event()
        self._append(mark)
        with anyio.move_on_after(FLUSH_SECONDS):
            await mark.wait()


def _newest(event: Event) -> Event:
    """Cut an event with output to its newest `BATCH_BYTES`."""
    text = event.payload["text"].encode()
    left_out = len(text) - BATCH_BYTES
    if left_out <= 0:
        return event
    # In the middle of a character its first half goes too.
    kept = text[left_out:].decode("utf-8", "ignore")
    offset = event.payload["offset"] + len(text) - len(kept.encode())
    return replace(event, payload={**event.payload, "text": kept, "offset": offset})
