"""The engine's session that all jobs of a worker share, replaced when it is broken."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import structlog
from anyio.abc import TaskGroup, TaskStatus

from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.session import EngineSession, NoEngineError, open_session
from moonmind_ext.worker.metrics import Metrics
from moonmind_ext.worker.settings import without_secrets
from pipelines.concurrency import task_group

MAX_AGE_SECONDS = 3600.0
"""Of a session. While it is open the engine keeps everything that was made in it,
whatever its garbage collection is told; a new one costs half a second."""

TRUST_SECONDS = 10.0
"""For how long an answer of the engine is taken as a sign of life. A session whose
engine went away costs the job that finds out one of its attempts."""

WAIT_SECONDS = 60.0
"""For a job that needs a session when there is none. An engine that restarts is back
in seconds; after this the job goes back to the queue."""

REOPEN_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Between attempts to open a session; the last again and again."""

log = structlog.get_logger()


@dataclass(eq=False)
class _Lent:
    """A session, and who uses it."""

    session: EngineSession
    answered: float
    users: int = 0
    retired: anyio.Event = field(default_factory=anyio.Event)
    unused: anyio.Event = field(default_factory=anyio.Event)


class EngineKeeper:
    """Lends one session to all, and opens the next when that one is of no use.

    A session that is replaced is closed when its last user has gone: those of a
    broken one fail by themselves, those of an old one go on.

    Attributes
    ----------
    problem
        Why there is no session; None while there is one.
    """

    def __init__(self, choice: EngineChoice, open_seconds: float, metrics: Metrics) -> None:
        self._choice = choice
        self._open_seconds = open_seconds
        self._metrics = metrics
        self._current: _Lent | None = None
        self._changed = anyio.Event()
        self._reason = "first"
        self.problem: str | None = "no session was opened yet"
        self._missing_since = anyio.current_time()

    @property
    def is_healthy(self) -> bool:
        """Whether there is a session, or has been one a moment ago."""
        missing = anyio.current_time() - self._missing_since
        return self.problem is None or missing < WAIT_SECONDS

    async def run(self, patient: bool = True) -> None:
        """Keep a session open until this is cancelled.

        Parameters
        ----------
        patient
            Whether to wait for an engine that is not there at the beginning.

        Raises
        ------
        NoEngineError
            When it is not there, and not to be waited for.
        """
        async with task_group() as tasks:
            while True:
                lent = await self._open(tasks, patient)
                # Later there are jobs under way, which have to report what became of them.
                patient = True
                with anyio.move_on_after(MAX_AGE_SECONDS):
                    await lent.retired.wait()
                self._retire(lent, "renewed")

    async def _open(self, tasks: TaskGroup, patient: bool) -> _Lent:
        attempt = 0
        while True:
            try:
                lent: _Lent = await tasks.start(self._hold)
            # OSError: the disk of the embedded engine is full.
            except (NoEngineError, OSError) as error:
                if not patient:
                    raise
                self.problem = str(error)
                self._notify()
                pause = REOPEN_SECONDS[min(attempt, len(REOPEN_SECONDS) - 1)]
                log.warning("no engine", error=str(error), next_try_seconds=pause)
                attempt += 1
                await anyio.sleep(pause)
            else:
                self._metrics.session_opened(self._reason)
                log.info("engine", how=lent.session.how, version=lent.session.version)
                self._current, self.problem = lent, None
                self._notify()
                return lent

    async def _hold(self, *, task_status: TaskStatus[_Lent]) -> None:
        """Keep one session open until it is retired and nobody uses it."""
        lent = None
        try:
            async with open_session(
                self._choice,
                environment=without_secrets(os.environ),
                open_seconds=self._open_seconds,
                for_many=True,
            ) as session:
                lent = _Lent(session, anyio.current_time())
                task_status.started(lent)
                await lent.retired.wait()
                if lent.users:
                    await lent.unused.wait()
        except Exception as error:
            if lent is None:
                raise
            # A broken session may not close well; its processes are gone anyway.
            log.warning("the session did not close well", error=str(error) or repr(error))
            self._retire(lent, "replaced")

    @asynccontextmanager
    async def session(self) -> AsyncIterator[EngineSession]:
        """Lend the session, with an engine that has just answered.

        Raises
        ------
        NoEngineError
            When there is none within `WAIT_SECONDS`.
        """
        try:
            with anyio.fail_after(WAIT_SECONDS):
                lent = await self._ready()
        except TimeoutError:
            raise NoEngineError(f"no engine within {WAIT_SECONDS:g}s: {self.problem}") from None
        lent.users += 1
        try:
            yield lent.session
        finally:
            lent.users -= 1
            if not lent.users:
                lent.unused.set()
                lent.unused = anyio.Event()

    async def ready(self) -> None:
        """Wait until there is an engine that answers."""
        await self._ready()

    async def _ready(self) -> _Lent:
        while True:
            lent = self._current
            if lent is None:
                await self._changed.wait()
            elif await self._answers(lent):
                return lent

    async def suspect(self, session: EngineSession) -> None:
        """Replace a session in which a run has failed, if it is the session's fault."""
        lent = self._current
        if lent is not None and lent.session is session:
            lent.answered = float("-inf")
            await self._answers(lent)

    async def _answers(self, lent: _Lent) -> bool:
        """Ask the engine, unless it answered a moment ago; a session that fails is retired."""
        if anyio.current_time() - lent.answered < TRUST_SECONDS:
            return not lent.retired.is_set()
        try:
            await lent.session.check()
        except Exception as error:  # noqa: BLE001, whatever the SDK raises
            log.warning("the session with the engine is broken", error=str(error) or repr(error))
            self._retire(lent, "replaced")
            return False
        lent.answered = anyio.current_time()
        return not lent.retired.is_set()

    def _retire(self, lent: _Lent, reason: str) -> None:
        if lent is self._current:
            self._current, self._reason = None, reason
            self.problem = "the session is being replaced"
            self._missing_since = anyio.current_time()
        lent.retired.set()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
