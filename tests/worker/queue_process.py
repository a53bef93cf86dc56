"""A queue as a process of its own, to be killed: `… queue_process DB PORT RULES`."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import anyio

from moonmind_ext.queue.rules import QueueRules
from moonmind_ext.queue.server import serve_queue
from tests.worker.support import AT_ONCE, WAIT_SECONDS

ROOT = Path(__file__).parents[2]


class QueueProcess:
    """A queue server that can be killed, and started again as if nothing had been."""

    def __init__(self, db: Path, rules: QueueRules) -> None:
        self._db = db
        self._rules = json.dumps(asdict(rules))
        self._port = 0
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def start(self) -> None:
        assert self._process is None
        command = [sys.executable, "-m", "tests.worker.queue_process"]
        command += [str(self._db), str(self._port), self._rules]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        assert self.url, "the queue server did not start"
        self._port = int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate(timeout=WAIT_SECONDS)
            self._process = None


@contextmanager
def queue_process(db: Path, rules: QueueRules = AT_ONCE) -> Iterator[QueueProcess]:
    """Serve a queue in a process; what is left of it is killed."""
    server = QueueProcess(db, rules)
    server.start()
    try:
        yield server
    finally:
        server.kill()


async def _serve(db: Path, port: int, rules: QueueRules) -> None:
    async with serve_queue(db, rules, port=port) as url:
        print(url, flush=True)  # noqa: T201
        await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(_serve, Path(sys.argv[1]), int(sys.argv[2]), QueueRules(**json.loads(sys.argv[3])))
