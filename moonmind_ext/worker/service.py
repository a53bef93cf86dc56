"""The worker itself: claims jobs, does several at once, and comes to an orderly end."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum

import anyio
import anyio.to_thread
import structlog
from anyio.abc import TaskGroup

from moonmind_ext.asgi import serve
from moonmind_ext.worker.admission import Admission, Capacity
from moonmind_ext.worker.claim import Claim
from moonmind_ext.worker.directory import probe, sweep
from moonmind_ext.worker.engine import EngineKeeper
from moonmind_ext.worker.job import JobLife, Shop
from moonmind_ext.worker.metrics import Metrics, metrics_app
from moonmind_ext.worker.policy import foreign_reason
from moonmind_ext.worker.queue import QueueError, open_queue
from moonmind_ext.worker.settings import WorkerSettings
from pipelines.concurrency import task_group

MAX_POLL_SECONDS = 30.0
"""Between claims, while the queue does not answer, or every job fails for want of
something here: claiming on would use up all the attempts of all jobs in a minute."""

_INFRASTRUCTURE = {"engine-failed", "publish-failed"}
"""Outcomes of which the jobs' own part is small."""

SHUTTING_DOWN = "the worker is shutting down"

log = structlog.get_logger()


class End(StrEnum):
    """Why a worker came to its end."""

    DRAINED = "drained"
    ENOUGH_JOBS = "enough jobs"
    EMPTY_QUEUE = "the queue was empty"
    FOREIGN_JOB = "foreign job"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a worker does.

    Attributes
    ----------
    claims
        Questions for a job, at most; None is no limit.
    jobs
        Jobs that it takes, at most.
    """

    claims: int | None = None
    jobs: int | None = None

    @property
    def are_there(self) -> bool:
        """Whether the worker is to end by itself."""
        return self.claims is not None or self.jobs is not None


@asynccontextmanager
async def open_shop(settings: WorkerSettings, metrics: Metrics) -> AsyncIterator[Shop]:
    """Put together what the jobs of a worker share."""
    host = Capacity.of_this_host()
    capacity = Capacity(settings.cpus or host.cpus, settings.memory_bytes or host.memory_bytes)
    async with open_queue(settings, metrics) as queue:
        yield Shop(
            settings=settings,
            queue=queue,
            engines=EngineKeeper(settings.engine, settings.engine_open_seconds, metrics),
            admission=Admission(capacity),
            metrics=metrics,
        )


async def run_worker(
    settings: WorkerSettings,
    draining: anyio.Event,
    *,
    limits: Limits | None = None,
    metrics_port: int | None = None,
) -> End:
    """Work until there is a reason to end.

    When this is cancelled everything stops at once: commands are killed, and their
    jobs go back to the queue when their leases run out.

    Parameters
    ----------
    draining
        When set, no more jobs are taken; running ones have the settings'
        `drain_seconds` to end.
    metrics_port
        Where `/metrics` and `/healthz` are served, to everybody; None for nowhere.

    Raises
    ------
    NoEngineError
        When a worker with limits finds no engine. One without waits for it.
    QueueError
        When the only claim of a worker did not get through.
    """
    limits = limits or Limits()
    metrics = Metrics()
    await anyio.to_thread.run_sync(sweep, settings.workdir)
    async with AsyncExitStack() as stack:
        shop = await stack.enter_async_context(open_shop(settings, metrics))
        worker = _Worker(shop, draining, limits)
        if metrics_port is not None:
            app = metrics_app(metrics, lambda: shop.engines.is_healthy and worker.problem is None)
            await stack.enter_async_context(serve(app, host="0.0.0.0", port=metrics_port))  # noqa: S104
        async with task_group() as background:
            background.start_soon(shop.engines.run, not limits.are_there)
            end = await worker.run()
            background.cancel_scope.cancel()
    return end


class _Worker:
    """The jobs under way, and the decision to take another."""

    def __init__(self, shop: Shop, draining: anyio.Event, limits: Limits) -> None:
        self._shop = shop
        self._draining = draining
        self._limits = limits
        self._slots = anyio.Semaphore(shop.settings.concurrency)
        self._lives: set[JobLife] = set()
        self._claims = self._jobs = self._failures = 0
        # Jobs in a row that failed for want of something here.
        self._troubles = 0
        self.problem: str | None = None
        # Set when the time to drain is over.
        self._is_over = False

    async def run(self) -> End:
        end = End.DRAINED
        async with task_group() as watch:
            async with task_group() as jobs:
                with anyio.CancelScope() as claiming:
                    watch.start_soon(self._drain, claiming)
                    end = await self._claim_jobs(jobs)
                # What is under way goes on to its end, and can still be drained.
                log.info("no more jobs are taken", reason=end.value, running=len(self._lives))
            watch.cancel_scope.cancel()
        return end

    async def _drain(self, claiming: anyio.CancelScope) -> None:
        await self._draining.wait()
        claiming.cancel()
        await anyio.sleep(self._shop.settings.drain_seconds)
        self._is_over = True
        for life in self._lives:
            life.stop(SHUTTING_DOWN)

    async def _claim_jobs(self, jobs: TaskGroup) -> End:
        limits, settings = self._limits, self._shop.settings
        while limits.jobs is None or self._jobs < limits.jobs:
            await self._slots.acquire()
            life = None
            try:
                await self._shop.admission.calm()
                await self._shop.engines.ready()
                await self._room_on_disk()
                await anyio.sleep(self._pause(self._troubles))
                # Never given up half-way: the answer may be a job, which nobody else
                # would have then.
                with anyio.CancelScope(shield=True):
                    life = await self._claim()
                if life is not None:
                    jobs.start_soon(self._live, life)
            finally:
                if life is None:
                    self._slots.release()
            if life is not None and life.foreign is not None:
                log.error("this queue has jobs of another kind", reason=life.foreign)
                return End.FOREIGN_JOB
            if limits.claims is not None and self._claims >= limits.claims:
                return End.ENOUGH_JOBS if self._jobs else End.EMPTY_QUEUE
            if life is None:
                await anyio.sleep(settings.poll_seconds + self._pause(self._failures))
        return End.ENOUGH_JOBS

    def _pause(self, failures: int) -> float:
        """Give the seconds to wait after some failures in a row; none after none."""
        return min(float(2**failures - 1), MAX_POLL_SECONDS)

    async def _room_on_disk(self) -> None:
        """Wait until a job's directory can be made: a job that found out would fail."""
        failures = 0
        while True:
            try:
                await anyio.to_thread.run_sync(probe, self._shop.settings.workdir)
            except OSError as error:
                failures = min(failures + 1, 10)
                self.problem = f"{self._shop.settings.workdir}: {error.strerror or error}"
                log.warning("no job can be done here", error=self.problem)
                await anyio.sleep(self._pause(failures))
            else:
                self.problem = None
                return

    async def _claim(self) -> JobLife | None:
        """Ask for a job, and begin its life."""
        shop = self._shop
        self._claims += 1
        asked = anyio.current_time()
        try:
            job = await shop.queue.claim()
        except QueueError as error:
            if self._limits.claims is not None:
                raise
            # Not without end: 2 to its power is a number of seconds.
            self._failures = min(self._failures + 1, 10)
            log.warning("no job could be claimed", error=str(error))
            return None
        self._failures = 0
        if job is None:
            return None
        self._jobs += 1
        lease = shop.settings.lease_seconds
        claim = Claim(job, shop.queue, lease_seconds=lease, claimed=asked)
        return JobLife(shop, claim, foreign_reason(job.type, job.payload))

    async def _live(self, life: JobLife) -> None:
        self._lives.add(life)
        if self._is_over:
            # The claim was under way when the drain began, and its answer took long.
            life.stop(SHUTTING_DOWN)
        try:
            outcome = await life.live()
            self._troubles = min(self._troubles + 1, 10) if outcome in _INFRASTRUCTURE else 0
        except Exception as error:  # noqa: BLE001
            # A fault of this program. The lease runs out, and the others go on.
            log.error("the worker lost a job", exception=life.masked(error))  # noqa: TRY400
        finally:
            self._lives.discard(life)
            self._slots.release()
