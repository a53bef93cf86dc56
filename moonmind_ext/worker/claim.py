"""The hold on a claimed job: heartbeats from the claim to the last call."""

from collections.abc import Awaitable, Callable

import anyio
import structlog

from moonmind_ext.worker.queue import Job, QueueClient, QueueError

MAX_BEAT_SECONDS = 5.0
"""As MoonMind's own worker where cancellation exists: a request for it is seen by
then. A third of the lease, if that is shorter, leaves room for one lost beat."""

END_SECONDS = 300.0
"""For the last call of a job whose heartbeats do get through. Then the server has a
fault that more calls will not mend: the lease runs out, and the queue goes on."""

RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0)
"""Between attempts of a call; the last again and again."""

log = structlog.get_logger()


def pause_after(attempt: int) -> float:
    """Give the seconds to wait after a number of attempts that failed."""
    return RETRY_SECONDS[min(attempt, len(RETRY_SECONDS)) - 1]


class Claim:
    """A job that is ours, as long as `lost` is not set.

    Attributes
    ----------
    job
        As it was claimed.
    lost
        Set when the server has given the job away, or may have: no beat got through
        for a whole lease.
    cancelled
        Set when somebody has asked for the job's end.
    """

    def __init__(self, job: Job, queue: QueueClient, *, lease_seconds: int, claimed: float) -> None:
        self.job = job
        self._queue = queue
        self._lease_seconds = lease_seconds
        # When the last call that extended the lease was sent, by anyio's clock: the
        # server's own begins a little later, never earlier.
        self._extended = claimed
        self.lost = anyio.Event()
        self.cancelled = anyio.Event()
        # While the last call is on its way, a beat may find the job ended by it.
        self._is_ending = self._is_over = False

    async def keep(self) -> None:
        """Beat until the job is lost, or this is cancelled."""
        while not self._is_over:
            if not await self._beat_in_time():
                self.lost.set()
                return

    async def _beat_in_time(self) -> bool:
        """Wait, then beat; whether the job is still ours."""
        interval = min(self._lease_seconds / 3, MAX_BEAT_SECONDS)
        with anyio.CancelScope(deadline=self._extended + self._lease_seconds) as lease:
            await anyio.sleep(interval)
            return self._is_over or await self._beat()
        assert lease.cancelled_caught
        log.warning("no heartbeat got through for a whole lease; the job is not ours any more")
        return False

    async def _beat(self) -> bool:
        sent = anyio.current_time()
        try:
            job = await self._queue.heartbeat(self.job.id)
        except QueueError as error:
            if error.is_gone and self._is_ending:
                return True
            if error.is_gone:
                log.warning("the job is not ours any more", error=str(error))
                return False
            log.warning("missed a heartbeat", error=str(error))
            return True
        if job.attempt != self.job.attempt and not self._is_ending:
            # Given away and claimed again, by another worker of the same name or by this one.
            log.warning("the job is not ours any more", attempt=job.attempt)
            return False
        self._extended = sent
        if job.cancel_requested_at is not None:
            self.cancelled.set()
        return True

    async def end(self, call: Callable[[], Awaitable[None]]) -> bool:
        """Make the last call of the job, until it is heard.

        It counts once: after an answer that was lost the server is asked first.

        Returns
        -------
        bool
            Whether the job's end is on the server's record as ours to say.
        """
        self._is_ending = True
        self._is_over = await self._say_the_end(call)
        self._is_ending = False
        if not self._is_over:
            log.error("the job's end could not be reported; its lease will run out")
        return self._is_over

    async def _say_the_end(self, call: Callable[[], Awaitable[None]]) -> bool:
        attempt = 0
        with anyio.move_on_after(END_SECONDS):
            while not self.lost.is_set():
                attempt += 1
                try:
                    await call()
                except QueueError as error:
                    log.warning("the job's end was not taken", error=str(error), attempt=attempt)
                    if error.is_gone and attempt == 1:
                        return False
                else:
                    return True
                await anyio.sleep(pause_after(attempt))
                if await self._has_ended():
                    return True
        return False

    async def _has_ended(self) -> bool:
        try:
            job = await self._queue.read(self.job.id)
        except QueueError:
            return False
        # Queued again counts too: that was a `fail` of ours with attempts left.
        return job.status != "running" or job.attempt != self.job.attempt
