"""Many jobs of all kinds, and everything breaks: `python -m tests.worker.soak --jobs 500`.

Two workers share a queue. At random times their world breaks, in every way of the
worker's tests of faults. At the end the server's record, and a file outside to which
each start of a command adds a line, must tell the same story, and nothing may be left.
"""

# ruff: noqa: T201

import argparse
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from random import Random
from statistics import median
from time import monotonic, time

import anyio
import httpx

from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.queue.rules import QueueRules, Row
from moonmind_ext.run.events import LOG
from tests.engines import EMBEDDED_IMAGES, Engine, real_engine
from tests.worker.faults import (
    RESTART,
    Ledger,
    Proxy,
    fill,
    kill_sessions_of,
    mount_disk,
    open_proxy,
    processes,
    unmount_disk,
)
from tests.worker.queue_process import ROOT, QueueProcess, queue_process
from tests.worker.support import Origin, make_origin, payload

LEASE_SECONDS = 6
MAX_ATTEMPTS = 8
DRAIN_SECONDS = 2
RULES = QueueRules(sweep_delay_seconds=0.2, retry_base_seconds=0.5, retry_max_seconds=3)
DISK = "48m"
PAUSE_SECONDS = 4.0
"""Between one fault and the next, on average."""
ENDED = {"succeeded", "failed", "cancelled", "dead_letter"}

BIG_LOG_BYTES = 1_500_000
SCRIPTS = {
    "success": "true",
    "output": """
        n=0
        while [ $n -lt 15 ]; do
            read -r up _ </proc/uptime
            echo "T $up"
            sleep 0.1
            n=$((n + 1))
        done
    """,
    "artifacts": """
        mkdir "$ARTIFACT_DIR/sub"
        echo "$TOKEN" >"$ARTIFACT_DIR/sub/a"
        head -c 100000 /dev/zero >"$ARTIFACT_DIR/zeros"
    """,
    "publish": 'echo "$TOKEN" >published',
    "big-log": f"head -c {BIG_LOG_BYTES} /dev/zero | tr '\\0' 'x' | fold -w 99",
    "final": "sleep 1",
    "long": "sleep 4",
    "failing": "echo x >published; echo the reason; exit 3",
    "timeout": "echo x >published; sleep 600",
    "cancelled": "echo x >published; sleep 600",
}
"""What a job does, by its kind. All but the last three succeed."""

EXPECTED = {"failing": "failed", "timeout": "failed", "cancelled": "cancelled"}
"""How a job must end; where nothing is said, well."""

WEIGHTS = {"success": 4, "output": 3, "artifacts": 2, "publish": 3, "failing": 2}


@dataclass
class Job:
    """A job, and what is expected of it."""

    kind: str
    token: str
    id: str = ""

    def payload(self, image: str, ledger: Ledger) -> Row:
        script = f'echo "$TOKEN" >>/ledger/lines; {SCRIPTS[self.kind]}'
        more: Row = {"timeoutSeconds": 2} if self.kind == "timeout" else {}
        publishes = self.kind in {"publish", "failing", "timeout", "cancelled"}
        return payload(
            image,
            "sh",
            "-c",
            script,
            publish="branch" if publishes else "none",
            task={"git": {"newBranch": f"job-{self.token}"}},
            env={"TOKEN": self.token},
            cacheVolumes=ledger.volumes,
            gracePeriodSeconds=1,
            retryable=self.kind != "final",
            **more,
        )


@dataclass
class Worker:
    """One of the workers, and what was seen of it."""

    number: int
    command: list[str]
    environment: dict[str, str]
    log: Path
    process: "subprocess.Popen[bytes] | None" = None
    memory: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def is_ready(self) -> bool:
        """Whether it handles SIGTERM: before, in its first second, that just ends it."""
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
            caught = next(line for line in lines if line.startswith("SigCgt:"))
            return bool(int(caught.split()[1], 16) & (1 << (signal.SIGTERM - 1)))
        return False

    async def until_ready(self) -> None:
        with anyio.move_on_after(30):
            while not self.is_ready:
                await anyio.sleep(0.1)

    async def end(self, number: signal.Signals, seconds: float) -> int | None:
        """Send a signal and wait for the end; None when there was none in time."""
        assert self.process is not None
        self.process.send_signal(number)
        with anyio.move_on_after(seconds):
            while self.process.poll() is None:
                await anyio.sleep(0.02)
        return self.process.returncode

    def measure(self) -> None:
        with suppress(OSError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    self.memory[self.pid].append(int(line.split()[1]) / 1024)


class Soak:
    """All of it, from the first job to the last check."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, engine: Engine) -> None:
        self.random = Random(arguments.seed)
        self.folder = folder
        self.engine = engine
        self.limit_seconds = arguments.limit or 120 + arguments.jobs * 4
        self.count = arguments.jobs
        self.concurrency = arguments.concurrency
        self.nonce = secrets.token_hex(6)
        self.ledger = Ledger(engine, f"soak-{self.nonce}")
        self.origin: Origin = make_origin(folder)
        self.db = folder / "queue.db"
        self.faults: Counter[str] = Counter()
        self.problems: list[str] = []
        self.jobs = self._make_jobs()
        self.is_disk_small = False
        self.engine_was_killed = False
        self.memory: list[str] = []
        self.seconds = 0.0
        self.queue: QueueProcess
        self.workers: list[Worker] = []
        self.proxies: list[Proxy] = []

    def _make_jobs(self) -> list[Job]:
        # Every kind at least once, whatever the number.
        kinds = list(SCRIPTS)
        weights = [WEIGHTS.get(kind, 1) for kind in kinds]
        chosen = kinds[: self.count]
        chosen += self.random.choices(kinds, weights, k=self.count - len(chosen))
        self.random.shuffle(chosen)
        return [Job(kind, f"{self.nonce}-{index}") for index, kind in enumerate(chosen)]

    async def run(self) -> bool:
        """Run it; whether all was well."""
        jobs = self.folder / "jobs"
        jobs.mkdir()
        self.is_disk_small = mount_disk(jobs, DISK)
        try:
            with queue_process(self.db, RULES) as self.queue:
                async with AsyncExitStack() as stack:
                    for _ in range(2):
                        proxy = await stack.enter_async_context(open_proxy(self.queue.url))
                        self.proxies.append(proxy)
                    with self._workers(jobs):
                        await self._submit()
                        await self._run_jobs()
                        await self._end_workers(jobs)
            await self._check()
        finally:
            if self.is_disk_small:
                unmount_disk(jobs)
        self._tell()
        return not self.problems

    @contextmanager
    def _workers(self, jobs: Path) -> Iterator[None]:
        for number, proxy in enumerate(self.proxies, 1):
            workdir = jobs / f"worker-{number}"
            workdir.mkdir()
            environment = {
                **{name: v for name, v in os.environ.items() if not name.startswith("MOONMIND_")},
                "MOONMIND_URL": proxy.url,
                "MOONMIND_WORKER_ID": f"worker-{number}",
                "MOONMIND_WORKDIR": str(workdir),
                "MOONMIND_WORKER_ENGINE": self.engine.choice.value,
                "MOONMIND_HELPER_IMAGE": self.engine.image("busybox"),
                "MOONMIND_POLL_INTERVAL_MS": "100",
                "MOONMIND_LEASE_SECONDS": str(LEASE_SECONDS),
                "MOONMIND_WORKER_DRAIN_SECONDS": str(DRAIN_SECONDS),
                # Of four jobs at once the first worker has the larger half.
                "MOONMIND_WORKER_CONCURRENCY": str((self.concurrency + 2 - number) // 2 or 1),
                "GIT_CONFIG_GLOBAL": str(self.origin.config),
                "MOONMIND_SOAK": self.nonce,
                "NO_COLOR": "1",
            }
            command = [sys.executable, "-m", "tests.worker.soak_worker", "worker"]
            log = self.folder / f"worker-{number}.log"
            worker = Worker(number, command, environment, log)
            worker.start()
            self.workers.append(worker)
        try:
            yield
        finally:
            for worker in self.workers:
                if worker.process is not None:
                    worker.process.kill()
                    worker.process.wait()

    async def _submit(self) -> None:
        async with httpx.AsyncClient(base_url=self.queue.url, timeout=60) as http:
            for job in self.jobs:
                body = {
                    "type": "task",
                    "payload": job.payload(self.engine.image("base"), self.ledger),
                    "maxAttempts": MAX_ATTEMPTS,
                }
                answer = await http.post("/api/queue/jobs", json=body)
                job.id = answer.raise_for_status().json()["id"]

    async def _run_jobs(self) -> None:
        began = monotonic()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._break_things)
            tasks.start_soon(self._cancel_some)
            tasks.start_soon(self._measure)
            with anyio.move_on_after(self.limit_seconds) as limit:
                while self._count_ended() < len(self.jobs):
                    await anyio.sleep(0.2)
            if limit.cancelled_caught:
                self.problems.append(f"not all jobs ended within {self.limit_seconds}s")
            self.seconds = monotonic() - began
            tasks.cancel_scope.cancel()

    def rows(self, query: str, *values: object) -> list[Row]:
        """Ask the server's record, whether it runs or not."""
        with sqlite3.connect(f"file:{self.db}?mode=ro", uri=True, timeout=30) as db:
            db.row_factory = sqlite3.Row
            rows = [dict(row) for row in db.execute(query, values)]
        db.close()
        return rows

    def _count_ended(self) -> int:
        rows = self.rows("SELECT status FROM jobs")
        return sum(row["status"] in ENDED for row in rows)

    async def _measure(self) -> None:
        while True:
            for worker in self.workers:
                worker.measure()
            await anyio.sleep(1)

    async def _cancel_some(self) -> None:
        """Cancel what wants to be, in the middle of it."""
        to_cancel = {job.id for job in self.jobs if job.kind == "cancelled"}
        async with httpx.AsyncClient(base_url=self.queue.url, timeout=2) as http:
            while to_cancel:
                for row in self.rows(
                    "SELECT jobId, max(createdAt) AS at FROM events"
                    " WHERE message = 'moonmind.task.container.started' GROUP BY jobId"
                ):
                    if row["jobId"] in to_cancel:
                        await anyio.sleep(self.random.uniform(0, 1))
                        with suppress(httpx.HTTPError):
                            answer = await http.post(
                                f"/api/queue/jobs/{row['jobId']}/cancel", json={}
                            )
                            if answer.is_success or answer.is_client_error:
                                to_cancel.discard(row["jobId"])
                await anyio.sleep(0.3)

    async def _break_things(self) -> None:
        """Throw faults at random times, each kind one at a time."""
        kinds: dict[str, tuple[int, Callable[[], Awaitable[object]]]] = {
            "queue server killed": (3, self._kill_queue),
            "engine killed": (3, self._kill_engine),
            "worker killed": (2, self._kill_worker),
            "worker drained": (2, self._drain_worker),
            "uploads refused": (2, self._refuse_uploads),
            "clones failing": (2, self._hide_origin),
            "connection cut for longer than the lease": (1, self._cut),
        }
        if self.is_disk_small:
            kinds["disk full"] = 2, self._fill_disk
        if self.engine.choice is EngineChoice.DAGGER:
            kinds["session killed"] = 3, self._kill_session
            if os.environ.get(RESTART):
                kinds["engine killed"] = 1, self._kill_engine
            else:
                del kinds["engine killed"]
        busy: set[str] = set()

        async def throw(name: str) -> None:
            busy.add(name)
            self.faults[name] += 1
            await kinds[name][1]()
            busy.remove(name)

        # The first of each in an order of its own, so that a short soak has them all.
        first = self.random.sample(sorted(kinds), len(kinds))
        async with anyio.create_task_group() as tasks:
            while True:
                pause = min(self.random.expovariate(1 / PAUSE_SECONDS), 3 * PAUSE_SECONDS)
                await anyio.sleep(pause)
                names = sorted(kinds)
                weights = [kinds[name][0] for name in names]
                name = first.pop() if first else self.random.choices(names, weights)[0]
                # Killing and draining are for the same worker.
                same = {other for other in kinds if other.startswith("worker")}
                if not busy & (same if name in same else {name}):
                    tasks.start_soon(throw, name)

    async def _kill_queue(self) -> None:
        self.queue.kill()
        # Sometimes longer than a lease.
        await anyio.sleep(self.random.choice([0.5, 1, 2, 4, LEASE_SECONDS + 2]))
        self.queue.start()

    async def _kill_engine(self) -> None:
        if self.engine.choice is EngineChoice.EMBEDDED:
            worker = self.random.choice(self.workers)
            if worker.is_ready:
                os.kill(worker.pid, signal.SIGUSR1)
            return
        self.engine_was_killed = True
        await anyio.run_process(shlex.split(os.environ[RESTART]))
        await anyio.sleep(20)

    async def _kill_session(self) -> None:
        kill_sessions_of(self.random.choice(self.workers).pid)

    async def _kill_worker(self) -> None:
        worker = self.workers[0]
        await worker.end(signal.SIGKILL, 10)
        await anyio.sleep(self.random.uniform(0, 2))
        worker.start()

    async def _drain_worker(self) -> None:
        worker = self.workers[0]
        await worker.until_ready()
        code = await worker.end(signal.SIGTERM, 90)
        if code is None:
            self.problems.append("a drain took longer than 90s")
            await worker.end(signal.SIGKILL, 10)
        elif code:
            self.problems.append(f"a drained worker ended with {code}")
        worker.start()

    async def _refuse_uploads(self) -> None:
        for proxy in self.proxies:
            proxy.refuse = "/artifacts/upload"
        await anyio.sleep(self.random.uniform(1, 6))
        for proxy in self.proxies:
            proxy.refuse = None

    async def _hide_origin(self) -> None:
        away = self.folder / "away.git"
        self.origin.path.rename(away)
        await anyio.sleep(self.random.uniform(0.5, 2))
        away.rename(self.origin.path)

    async def _fill_disk(self) -> None:
        filler = self.folder / "jobs" / "filler"
        fill(filler)
        await anyio.sleep(self.random.uniform(0.5, 2))
        filler.unlink()

    async def _cut(self) -> None:
        proxy = self.random.choice(self.proxies)
        proxy.cut = True
        await anyio.sleep(LEASE_SECONDS + 3)
        proxy.cut = False

    async def _end_workers(self, jobs: Path) -> None:
        """Make everything whole, end the workers, and look for what they have left."""
        self.queue.kill()
        self.queue.start()
        for proxy in self.proxies:
            proxy.cut, proxy.refuse = False, None
        (jobs / "filler").unlink(missing_ok=True)
        away = self.folder / "away.git"
        if away.exists():
            away.rename(self.origin.path)
        for worker in self.workers:
            if worker.process is None or worker.process.poll() is not None:
                worker.start()
            await worker.until_ready()
            code = await worker.end(signal.SIGTERM, 60)
            if code:
                self.problems.append(f"worker {worker.number} ended with {code}")
            if code is None:
                self.problems.append(f"worker {worker.number} did not end")
        left = [str(path) for worker in jobs.iterdir() for path in worker.iterdir()]
        if left:
            self.problems.append(f"directories are left: {left}")
        with anyio.move_on_after(20):
            while self._left_processes():
                await anyio.sleep(0.2)
        if found := self._left_processes():
            self.problems.append(f"processes are left: {found}")
        if self.engine.choice is EngineChoice.EMBEDDED:
            sessions = Path(os.environ["XDG_CACHE_HOME"], "moonmind-ext", "embedded", "sessions")
            if names := [path.name for path in sessions.iterdir()]:
                self.problems.append(f"sessions are left: {names}")

    def _left_processes(self) -> list[int]:
        """Find processes that a worker has started, or a command of a job."""
        marker = f"MOONMIND_SOAK={self.nonce}".encode()
        found = processes(self.nonce)
        for path in Path("/proc").iterdir():
            with suppress(OSError):
                if path.name.isdecimal() and marker in (path / "environ").read_bytes():
                    found.append(int(path.name))
        return found

    async def _check(self) -> None:
        """Compare the server's record with what was to be."""
        rows = {row["id"]: row for row in self.rows("SELECT * FROM jobs")}
        events: dict[str, list[Row]] = defaultdict(list)
        for event in self.rows("SELECT * FROM events ORDER BY createdAt"):
            event["payload"] = json.loads(event["payload"] or "null")
            events[event["jobId"]].append(event)
        starts = Counter(await self.ledger.lines())
        branches = set(self.origin.branches())
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.claims = 0
        for job in self.jobs:
            self._check_job(job, rows[job.id], events[job.id], starts, branches)
        self.starts = sum(starts.values())
        self.lags = list(_lags(events))
        for worker in self.workers:
            self._check_memory(worker)

    def _check_job(
        self, job: Job, row: Row, events: list[Row], starts: Counter[str], branches: set[str]
    ) -> None:
        claims = sum(event["message"] == "Job claimed" for event in events)
        self.claims += claims
        status, error = row["status"], row["errorMessage"] or ""
        taken = Counter(
            event["message"]
            for event in events
            if event["message"] in {"Job completed", "Job failed"}
            and "workerId" in (event["payload"] or {})
        )
        name = f"{job.kind} {job.id} ({status}, attempt {row['attempt']}, {error!r})"

        def must(fact: object, what: str) -> None:
            if not fact:
                self.problems.append(f"{name}: {what}")

        must(status in ENDED, "has not ended")
        must(starts[job.token] <= claims, f"{starts[job.token]} starts in {claims} claims")
        must(taken["Job completed"] == (status == "succeeded"), f"ended so often: {dict(taken)}")
        expected = EXPECTED.get(job.kind, "succeeded")
        outcome = status
        if status == expected == "failed" and _is_own_failure(job.kind, error):
            pass
        elif status != expected or expected == "failed":
            outcome = f"{status} by faults"
            used_up = row["attempt"] == MAX_ATTEMPTS and status in {"failed", "dead_letter"}
            final = job.kind == "final" and status == "failed" and _is_ours(error)
            must(used_up or final, f"must be {expected}")
        self.outcomes[job.kind][outcome] += 1
        if status == "succeeded":
            must(starts[job.token] or self.engine_was_killed, "no start")
            self._check_result(job, events, must)
        branch = f"job-{job.token}"
        if job.kind == "publish" and status == "succeeded":
            must(branch in branches, "nothing was published")
            must(
                branch in branches and self.origin.file(branch, "published") == job.token,
                "something else was published",
            )
        elif branch in branches:
            # Pushed, and then the worker lost the job before it could say so.
            must(job.kind == "publish", "was published")

    def _check_result(
        self, job: Job, events: list[Row], must: Callable[[object, str], None]
    ) -> None:
        missing = any(event["message"] == "moonmind.task.artifacts" for event in events)
        if job.kind != "artifacts" or missing:
            return
        found = self.rows(
            "SELECT id FROM artifacts WHERE jobId = ? AND name = ? ORDER BY seq DESC LIMIT 1",
            job.id,
            "container/sub/a",
        )
        must(found, "its artifact is not there")
        if found:
            data = (self.db.with_name(f"{self.db.name}.artifacts") / found[0]["id"]).read_text()
            must(data == f"{job.token}\n", f"its artifact is {data!r}")

    def _check_memory(self, worker: Worker) -> None:
        samples = max(worker.memory.values(), key=len, default=[])
        quarter = len(samples) // 4
        # A minute at least: before, modules and caches are still being loaded.
        if quarter < 15:
            self.memory.append(f"worker {worker.number}: too short")
            return
        early, late = median(samples[quarter : 2 * quarter]), median(samples[3 * quarter :])
        self.memory.append(
            f"worker {worker.number}: {early:.0f} MB, later {late:.0f} MB, in {len(samples)}s"
        )
        if late > early * 1.2 + 20:
            self.problems.append(f"the memory of worker {worker.number} grows: {self.memory[-1]}")

    def _tell(self) -> None:
        rate = len(self.jobs) / self.seconds
        print(f"{len(self.jobs)} jobs in {self.seconds:.0f}s: {rate:.2f} jobs/s")
        print(f"claims: {self.claims}, starts: {self.starts}")
        for name, count in sorted(self.faults.items()):
            print(f"fault: {name}: {count}")
        for kind, outcomes in sorted(self.outcomes.items()):
            print(f"jobs: {kind}: {', '.join(f'{n} {what}' for what, n in outcomes.items())}")
        for line in self.memory:
            print(f"memory: {line}")
        if self.lags:
            print(f"lag of live logs: median {median(self.lags):.2f}s, most {max(self.lags):.2f}s")
        for problem in self.problems:
            print(f"PROBLEM: {problem}")


def _is_own_failure(kind: str, error: str) -> bool:
    said = {"failing": "container command failed (3)", "timeout": "timed out after 2s"}
    return said[kind] in error


def _is_ours(error: str) -> bool:
    """Whether a failure is one of the worker's world, and not of the command."""
    return not re.search("container command failed|timed out after|invalid", error)


def _lags(events: dict[str, list[Row]]) -> Iterator[float]:
    """Give the seconds from a line with its time to the server's record of it."""
    boot = time() - float(Path("/proc/uptime").read_text().split()[0])
    for of_job in events.values():
        for event in of_job:
            if event["message"] == LOG:
                recorded = datetime.fromisoformat(event["createdAt"]).timestamp()
                for uptime in re.findall(r"(?m)^T (\d+\.\d\d)$", event["payload"]["text"]):
                    yield recorded - boot - float(uptime)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=4, help="of both workers together")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    parser.add_argument("--engine", choices=["embedded", "dagger"], default="embedded")
    parser.add_argument("--limit", type=float, help="seconds for all jobs together")
    return parser.parse_args()


def main() -> int:
    """Run the soak; gives 1 when something was wrong, and then keeps what there is."""
    arguments = _arguments()
    # A proxy that breaks a connection is an application that leaves its answer.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    print(f"seed: {arguments.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="moonmind-soak-"))
    if arguments.engine == "embedded":
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        engine = Engine(EngineChoice.EMBEDDED, EMBEDDED_IMAGES)
    else:
        engine = real_engine()
    if anyio.run(Soak(arguments, folder, engine).run):
        shutil.rmtree(folder)
        return 0
    print(f"what there is: {folder}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
