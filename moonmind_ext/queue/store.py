"""The queue itself: jobs, their events and artifacts in an SQLite file.

Every call is one transaction, written when it returns. Calls block, and may come from
any thread. What they give has MoonMind's names, ready for JSON.
"""

import json
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

from moonmind_ext.queue.rules import HEARTBEAT, Code, QueueError, QueueRules, Row, Status
from moonmind_ext.run.events import Level

MAX_NAME_LENGTH = 512
"""Of an artifact; MoonMind's column holds no more."""

# Columns are named as in JSON, so that a row is an answer. `seq` is the order of arrival,
# whatever the clock says.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    type TEXT NOT NULL,
    status TEXT NOT NULL,
    priority INTEGER NOT NULL,
    payload TEXT NOT NULL,
    affinityKey TEXT,
    attempt INTEGER NOT NULL,
    maxAttempts INTEGER NOT NULL,
    claimedBy TEXT,
    leaseExpiresAt TEXT,
    nextAttemptAt TEXT,
    cancelRequestedAt TEXT,
    cancelReason TEXT,
    resultSummary TEXT,
    errorMessage TEXT,
    artifactsPath TEXT,
    startedAt TEXT,
    finishedAt TEXT,
    createdAt TEXT NOT NULL,
    updatedAt TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS jobs_in_turn ON jobs (status, priority DESC, seq);
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    jobId TEXT NOT NULL,
    level TEXT NOT NULL,
    message TEXT NOT NULL,
    payload TEXT,
    createdAt TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS events_of_job ON events (jobId, createdAt);
CREATE TABLE IF NOT EXISTS artifacts (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    jobId TEXT NOT NULL,
    name TEXT NOT NULL,
    contentType TEXT,
    sizeBytes INTEGER NOT NULL,
    digest TEXT,
    createdAt TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS artifacts_of_job ON artifacts (jobId, name);
"""


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Store:
    """A queue in a file, which is made where there is none.

    Parameters
    ----------
    db
        The SQLite file; artifacts are in a directory beside it, `<db>.artifacts`.
    rules
        Default: MoonMind's.
    clock
        Tells the time, with its zone.
    """

    def __init__(
        self,
        db: Path,
        rules: QueueRules | None = None,
        *,
        clock: Callable[[], datetime] = _utc_now,
    ) -> None:
        self.rules = rules or QueueRules()
        self._clock = clock
        self._artifacts = db.with_name(f"{db.name}.artifacts")
        self._artifacts.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(db, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        # With these a killed server loses nothing that it has answered. A power cut may
        # take the last moments, which is no matter here.
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def create(
        self,
        kind: str,
        payload: Row,
        *,
        priority: int = 0,
        affinity_key: str | None = None,
        max_attempts: int = 3,
    ) -> Row:
        """Put a job in the queue, its payload as it is."""
        with self._transaction():
            now = self._now()
            job: Row = {
                "id": str(uuid4()),
                "type": kind,
                "status": Status.QUEUED.value,
                "priority": priority,
                "payload": _json(payload),
                "affinityKey": affinity_key,
                "maxAttempts": max_attempts,
                "now": now,
            }
            self._db.execute(
                "INSERT INTO jobs (id, type, status, priority, payload, affinityKey, attempt,"
                " maxAttempts, createdAt, updatedAt) VALUES (:id, :type, :status, :priority,"
                " :payload, :affinityKey, 1, :maxAttempts, :now, :now)",
                job,
            )
            self._append(job["id"], Level.INFO, "Job queued", {"type": kind})
            return self._shown(self._job(job["id"]))

    def jobs(self, limit: int = 50) -> list[Row]:
        """Give the jobs, the newest first."""
        with self._transaction():
            rows = self._db.execute("SELECT * FROM jobs ORDER BY seq DESC LIMIT ?", (limit,))
            return [self._shown(dict(row)) for row in rows]

    def job(self, job_id: str) -> Row:
        """Give one job."""
        with self._transaction():
            return self._shown(self._job(job_id))

    def claim(
        self,
        worker: str,
        lease_seconds: float,
        *,
        types: Collection[str] = (),
        capabilities: Collection[str] = (),
    ) -> Row | None:
        """Give the job whose turn it is to a worker that is able to do it.

        The only time when leases that ran out are noticed.

        Parameters
        ----------
        types
            What the worker takes; empty for everything.
        """
        with self._transaction():
            self._sweep()
            now = self._now()
            waiting = self._db.execute(
                "SELECT * FROM jobs WHERE status = 'queued'"
                " AND (nextAttemptAt IS NULL OR nextAttemptAt <= ?)"
                " ORDER BY priority DESC, seq",
                (now,),
            )
            able = _words(capabilities)
            for row in waiting:
                job = dict(row)
                if (not types or job["type"] in types) and _required(job) <= able:
                    break
            else:
                return None
            job |= {
                "status": Status.RUNNING.value,
                "claimedBy": worker,
                "leaseExpiresAt": self._now(lease_seconds),
                "nextAttemptAt": None,
                "startedAt": job["startedAt"] or now,
            }
            self._save(job)
            self._append(job["id"], Level.INFO, "Job claimed", {"workerId": worker})
            return self._shown(job)

    def heartbeat(self, job_id: str, worker: str, lease_seconds: float) -> Row:
        """Extend a lease, even one that ran out, if nobody has noticed yet."""
        with self._transaction():
            job = self._running(job_id, worker)
            job["leaseExpiresAt"] = self._now(lease_seconds)
            self._save(job)
            beat = {"workerId": worker, "leaseSeconds": lease_seconds}
            self._append(job_id, Level.INFO, HEARTBEAT, beat)
            return self._shown(job)

    def complete(self, job_id: str, worker: str, summary: str | None = None) -> Row:
        """End a job well; a request to cancel it came too late then."""
        with self._transaction():
            job = self._running(job_id, worker)
            job["resultSummary"] = summary
            self._end(job, Status.SUCCEEDED)
            self._append(job_id, Level.INFO, "Job completed", {"workerId": worker})
            return self._shown(job)

    def fail(self, job_id: str, worker: str, error: str, *, retryable: bool = False) -> Row:
        """End an attempt badly: the job waits for its next one where it may have one."""
        with self._transaction():
            job = self._running(job_id, worker)
            job["errorMessage"] = error
            if job["cancelRequestedAt"]:
                self._end(job, Status.CANCELLED)
            elif not retryable:
                self._end(job, Status.FAILED)
            elif job["attempt"] >= job["maxAttempts"]:
                self._end(job, Status.DEAD_LETTER)
            else:
                self._queue_again(job, self._retry_delay(job["attempt"]))
            if job["status"] == Status.CANCELLED:
                self._append(job_id, Level.WARN, "Job cancelled", {"workerId": worker})
            else:
                outcome = {"status": job["status"], "nextAttemptAt": job["nextAttemptAt"]}
                message = "Job failed (retryable)" if retryable else "Job failed"
                level = Level.WARN if retryable else Level.ERROR
                self._append(job_id, level, message, {"workerId": worker, **outcome})
            return self._shown(job)

    def cancel(self, job_id: str, reason: str | None = None) -> Row:
        """Cancel a job that waits, or ask its worker to; once more changes nothing."""
        with self._transaction():
            job = self._job(job_id)
            status = Status(job["status"])
            if status.is_end and status is not Status.CANCELLED:
                raise QueueError(Code.WRONG_STATE, f"the job is {status}: too late to cancel it")
            if not job["cancelRequestedAt"]:
                job |= {"cancelRequestedAt": self._now(), "cancelReason": reason}
                if status is Status.QUEUED:
                    self._end(job, Status.CANCELLED)
                    self._append(job_id, Level.INFO, "Job cancelled", {"reason": reason})
                else:
                    self._save(job)
                    self._append(job_id, Level.WARN, "Cancellation requested", {"reason": reason})
            return self._shown(job)

    def acknowledge(self, job_id: str, worker: str, message: str | None = None) -> Row:
        """End a job as cancelled, as its worker was asked to."""
        with self._transaction():
            job = self._job(job_id)
            if job["status"] != Status.CANCELLED:
                job = self._running(job_id, worker)
                if not job["cancelRequestedAt"]:
                    raise QueueError(Code.WRONG_STATE, "nobody has asked to cancel the job")
                self._end(job, Status.CANCELLED)
                acknowledged = {"workerId": worker, "message": message}
                self._append(job_id, Level.INFO, "Job cancelled", acknowledged)
            return self._shown(job)

    def append(self, job_id: str, level: Level, message: str, payload: Row | None = None) -> Row:
        """Add an event; anybody may, whatever the job's state."""
        with self._transaction():
            self._job(job_id)
            return self._append(job_id, level, message, payload)

    def events(self, job_id: str, *, after: datetime | None = None, limit: int = 200) -> list[Row]:
        """Give a job's events, the oldest first, of those later than a time."""
        with self._transaction():
            self._job(job_id)
            rows = self._db.execute(
                "SELECT id, jobId, level, message, payload, createdAt FROM events"
                " WHERE jobId = ? AND createdAt > ? ORDER BY createdAt LIMIT ?",
                (job_id, _text(after) if after else "", limit),
            )
            return [dict(row) | {"payload": _from_json(row["payload"])} for row in rows]

    def upload(
        self,
        job_id: str,
        worker: str,
        name: str,
        data: bytes,
        *,
        content_type: str | None = None,
        digest: str | None = None,
    ) -> Row:
        """Keep a file of a running job.

        The same name again has a second row; the bytes are the newer ones in both.
        """
        if not data:
            raise QueueError(Code.INVALID, "file must not be empty")
        if len(data) > self.rules.upload_limit_bytes:
            limit = self.rules.upload_limit_bytes
            raise QueueError(Code.TOO_LARGE, f"the artifact has more than {limit} bytes")
        with self._transaction():
            job = self._job(job_id)
            if job["status"] != Status.RUNNING or job["claimedBy"] != worker:
                raise QueueError(Code.NOT_AUTHORIZED, "the worker does not have the job")
            if len(name) > MAX_NAME_LENGTH:
                raise QueueError(Code.INTERNAL, "the name is too long for the database")
            older = self._newest_artifact(job_id, name)
            artifact: Row = {
                "id": str(uuid4()),
                "jobId": job_id,
                "name": name,
                "contentType": content_type,
                "sizeBytes": len(data),
                "digest": digest,
                "createdAt": self._now(),
            }
            self._db.execute(
                "INSERT INTO artifacts (id, jobId, name, contentType, sizeBytes, digest, createdAt)"
                " VALUES (:id, :jobId, :name, :contentType, :sizeBytes, :digest, :createdAt)",
                artifact,
            )
            self._append(job_id, Level.INFO, "Artifact uploaded", {"name": name})
            # Before the row is committed, so that no row is without its file; named by the
            # id, so that no name leads anywhere.
            self._file(artifact["id"]).write_bytes(data)
        if older:
            self._file(older).unlink(missing_ok=True)
        return artifact

    def artifacts(self, job_id: str, limit: int = 200) -> list[Row]:
        """Give the rows of a job's artifacts, the newest first."""
        with self._transaction():
            self._job(job_id)
            rows = self._db.execute(
                "SELECT id, jobId, name, contentType, sizeBytes, digest, createdAt FROM artifacts"
                " WHERE jobId = ? ORDER BY seq DESC LIMIT ?",
                (job_id, limit),
            )
            return [dict(row) for row in rows]

    def download(self, job_id: str, artifact_id: str) -> bytes:
        """Give the bytes that an artifact's name has now."""
        with self._transaction():
            self._job(job_id)
            row = self._db.execute(
                "SELECT name FROM artifacts WHERE id = ? AND jobId = ?", (artifact_id, job_id)
            ).fetchone()
            if row is None:
                raise QueueError(Code.NO_ARTIFACT, f"the job has no artifact {artifact_id}")
            newest = self._newest_artifact(job_id, row["name"])
            return self._file(newest or artifact_id).read_bytes()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield

    def _now(self, seconds_later: float = 0) -> str:
        return _text(self._clock() + timedelta(seconds=seconds_later))

    def _job(self, job_id: str) -> Row:
        row = self._db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise QueueError(Code.NO_JOB, f"there is no job {job_id}")
        return dict(row)

    def _running(self, job_id: str, worker: str) -> Row:
        job = self._job(job_id)
        if job["status"] != Status.RUNNING:
            raise QueueError(Code.WRONG_STATE, f"the job is {job['status']}, not running")
        if job["claimedBy"] != worker:
            raise QueueError(Code.NOT_OWNER, "another worker has the job")
        return job

    def _shown(self, job: Row) -> Row:
        hidden = {"seq"}
        if not self.rules.cancellation:
            hidden |= {"cancelRequestedAt", "cancelReason"}
        shown = {name: value for name, value in job.items() if name not in hidden}
        return shown | {"payload": json.loads(job["payload"])}

    def _sweep(self) -> None:
        """Take back the jobs whose leases ran out. No event says so."""
        expired = self._db.execute(
            "SELECT * FROM jobs WHERE status = 'running' AND leaseExpiresAt < ?", (self._now(),)
        ).fetchall()
        for row in expired:
            job = dict(row)
            if job["cancelRequestedAt"]:
                self._end(job, Status.CANCELLED)
            elif job["attempt"] >= job["maxAttempts"]:
                job["errorMessage"] = job["errorMessage"] or "the lease of the last attempt ran out"
                self._end(job, Status.DEAD_LETTER)
            else:
                self._queue_again(job, self.rules.sweep_delay_seconds)

    def _retry_delay(self, attempt: int) -> float:
        # By its hundredth attempt any job waits the longest; 2.0**1024 would be an error.
        doubled: float = self.rules.retry_base_seconds * 2.0 ** min(attempt - 1, 100)
        return min(doubled, self.rules.retry_max_seconds)

    def _queue_again(self, job: Row, delay_seconds: float) -> None:
        job |= {
            "status": Status.QUEUED.value,
            "attempt": job["attempt"] + 1,
            "nextAttemptAt": self._now(delay_seconds),
            "claimedBy": None,
            "leaseExpiresAt": None,
        }
        self._save(job)

    def _end(self, job: Row, status: Status) -> None:
        job |= {
            "status": status.value,
            "finishedAt": self._now(),
            "claimedBy": None,
            "leaseExpiresAt": None,
            "nextAttemptAt": None,
        }
        self._save(job)

    def _save(self, job: Row) -> None:
        job["updatedAt"] = self._now()
        self._db.execute(
            "UPDATE jobs SET status = :status, attempt = :attempt, claimedBy = :claimedBy,"
            " leaseExpiresAt = :leaseExpiresAt, nextAttemptAt = :nextAttemptAt,"
            " cancelRequestedAt = :cancelRequestedAt, cancelReason = :cancelReason,"
            " resultSummary = :resultSummary, errorMessage = :errorMessage,"
            " startedAt = :startedAt, finishedAt = :finishedAt, updatedAt = :updatedAt"
            " WHERE id = :id",
            job,
        )

    def _append(self, job_id: str, level: Level, message: str, payload: Row | None) -> Row:
        # No two of a job's events have one time, for readers go on from the last one's.
        latest = self._db.execute(
            "SELECT max(createdAt) FROM events WHERE jobId = ?", (job_id,)
        ).fetchone()[0]
        now = self._clock()
        if latest is not None:
            now = max(now, datetime.fromisoformat(latest) + timedelta(microseconds=1))
        event = {
            "id": str(uuid4()),
            "jobId": job_id,
            "level": level.value,
            "message": message,
            "payload": None if payload is None else _json(payload),
            "createdAt": _text(now),
        }
        self._db.execute(
            "INSERT INTO events (id, jobId, level, message, payload, createdAt)"
            " VALUES (:id, :jobId, :level, :message, :payload, :createdAt)",
            event,
        )
        return event | {"payload": payload}

    def _newest_artifact(self, job_id: str, name: str) -> str | None:
        row = self._db.execute(
            "SELECT id FROM artifacts WHERE jobId = ? AND name = ? ORDER BY seq DESC LIMIT 1",
            (job_id, name),
        ).fetchone()
        return None if row is None else str(row["id"])

    def _file(self, artifact_id: str) -> Path:
        return self._artifacts / artifact_id


def _required(job: Row) -> set[str]:
    required = json.loads(job["payload"]).get("requiredCapabilities")
    return _words(required) if isinstance(required, list) else set()


def _words(values: Collection[object]) -> set[str]:
    words = (str(value).strip().lower() for value in values)
    return {word for word in words if word}


def _text(moment: datetime) -> str:
    """Write a time so that the order of texts is the order of times."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _json(value: Row) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _from_json(text: str | None) -> Row | None:
    return None if text is None else json.loads(text)
