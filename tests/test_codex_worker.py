"""MoonMind's own worker with the drop-in, on every engine there is."""

import asyncio
import json
from collections import deque
from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import pytest

from moonmind_ext.codex_worker import WorkerMismatchError, install
from moonmind_ext.engine.choice import EngineChoice
from moonmind_ext.engine.session import open_session
from moonmind_ext.run.events import FINISHED, LOG, STARTED
from moonmind_ext.worker import engine as keeping
from moonmind_ext.worker.settings import SettingsError
from tests import moonmind
from tests.conformance.support import sh
from tests.engine.support import QuietHandler, http_server
from tests.engines import Engine
from tests.moonmind import ClaimedJob, CodexWorker, CodexWorkerConfig, Queue
from tests.worker.support import WAIT_SECONDS, payload

TOKEN = "correct-horse-battery"
WITNESS = [{"name": "moonmind-witness", "target": "/witness"}]


@dataclass
class Place:
    """A worker of MoonMind with the drop-in, and its queue."""

    worker: CodexWorker
    engine: Engine
    workdir: Path
    queue: Queue = field(default_factory=Queue)

    def submit(self, *command: str, image: str = "base", **fields: Any) -> UUID:
        return self.queue.submit(payload(self.engine.image(image), *command, **fields))

    async def do(self, *command: str, **fields: Any) -> UUID:
        """Let the worker do one job."""
        job_id = self.submit(*command, **fields)
        with anyio.fail_after(WAIT_SECONDS):
            assert await self.worker.run_once()
        return job_id

    def messages(self) -> list[str]:
        return [said.message for said in self.queue.events]

    def payload_of(self, message: str) -> dict[str, Any]:
        return next(said.payload or {} for said in self.queue.events if said.message == message)

    def live(self) -> str:
        texts = [said.payload for said in self.queue.events if said.message == LOG]
        return "".join(each["text"] for each in texts if each)

    async def until_live(self, text: str) -> None:
        with anyio.fail_after(WAIT_SECONDS):
            while text not in self.live():
                await anyio.sleep(0.02)

    def everything_said(self) -> str:
        queue = self.queue
        said = [*queue.events, *queue.errors.values(), *queue.results.values(), *queue.stored]
        return "\n".join([*map(str, said), *map(repr, queue.stored.values())])


def make_place(engine: Engine, folder: Path, **config: Any) -> Place:
    queue, workdir = Queue(), folder / "jobs"
    worker = CodexWorker(config=CodexWorkerConfig(workdir=workdir, **config), queue=queue)
    install(worker, engine=engine.choice)
    return Place(worker, engine, workdir, queue)


@pytest.fixture
def place(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("MOONMIND_HELPER_IMAGE", engine.image("busybox"))
    return make_place(engine, tmp_path)


@dataclass
class Sessions:
    """How many sessions with an engine were opened, and are open."""

    opened: int = 0
    open: int = 0


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Sessions:
    counted = Sessions()

    @asynccontextmanager
    async def count(*args: Any, **kwargs: Any) -> Any:
        async with open_session(*args, **kwargs) as session:
            counted.opened += 1
            counted.open += 1
            try:
                yield session
            finally:
                counted.open -= 1

    monkeypatch.setattr(keeping, "open_session", count)
    return counted


async def test_a_success_hands_over_every_file_once_with_its_content_type(place: Place) -> None:
    script = 'echo hello; mkdir "$ARTIFACT_DIR/sub"; echo "<p>" >"$ARTIFACT_DIR/sub/a.html"'
    job_id = await place.do(*sh(f'{script}; : >"$ARTIFACT_DIR/empty"'))
    assert place.queue.results == {job_id: "container task execution completed"}
    assert sorted((each.name, each.content_type) for each in place.queue.uploads) == [
        ("container/logs/runner.log", "text/plain"),
        ("container/metadata/payload.json", "application/json"),
        ("container/metadata/run.json", "application/json"),
        ("container/sub/a.html", "text/html"),
        ("logs/execute.log", None),
    ]
    run = json.loads(place.queue.stored["container/metadata/run.json"])
    assert (run["jobId"], run["exitCode"]) == (str(job_id), 0)
    assert run["workdir"] == str(place.workdir / str(job_id) / "repo")
    assert place.queue.stored["container/logs/runner.log"] == b"hello\n"


async def test_events_are_moonminds_and_come_before_its_own_last_one(place: Place) -> None:
    job_id = await place.do(*sh("echo hello"), image="base")
    assert place.messages() == [STARTED, LOG, FINISHED, "moonmind.task.execute"]
    assert {said.job_id for said in place.queue.events} == {job_id}
    assert place.payload_of(STARTED)["timeoutSeconds"] == 600
    assert place.payload_of(FINISHED)["containerName"] == f"mm-task-{job_id}"


async def test_changes_are_there_for_moonmind_to_publish(place: Place) -> None:
    script = (
        "echo new >new.txt; rm old.txt; echo more >>README.md; git config a.b c; echo x >.git/x"
    )
    job_id = await place.do(*sh(script), publish="branch")
    assert place.queue.published == {job_id: ["M\tREADME.md", "A\tnew.txt", "D\told.txt"]}
    assert not (place.workdir / str(job_id) / "repo" / ".git" / "x").exists()


async def test_nothing_changes_in_the_checkout_of_a_job_that_publishes_nothing(
    place: Place,
) -> None:
    job_id = await place.do(*sh("echo new >new.txt"), publish="none")
    assert job_id in place.queue.results
    assert not (place.workdir / str(job_id) / "repo" / "new.txt").exists()


async def test_every_word_of_the_command_arrives_as_it_is(place: Place) -> None:
    await place.do("sh", "-c", 'printf "<%s>" "$@"', "sh", "", " a ", "b")
    assert place.queue.stored["container/logs/runner.log"] == b"<>< a ><b>"


async def test_a_failed_command_fails_the_job_with_its_last_line_and_its_files(
    place: Place,
) -> None:
    script = 'echo kept >"$ARTIFACT_DIR/kept.txt"; echo the reason >&2; exit 7'
    job_id = await place.do(*sh(script), publish="branch")
    assert place.queue.errors == {job_id: "container command failed (7): the reason"}
    assert place.queue.stored["container/kept.txt"] == b"kept\n"
    assert place.queue.published == {}
    assert place.payload_of(FINISHED)["exitCode"] == 7


async def test_a_timeout_keeps_output_and_files(place: Place) -> None:
    script = 'echo begun; echo kept >"$ARTIFACT_DIR/kept.txt"; sleep 60'
    job_id = await place.do(*sh(script), timeoutSeconds=1, gracePeriodSeconds=1)
    assert place.queue.errors == {job_id: "container execution timed out after 1s"}
    assert place.queue.stored["container/kept.txt"] == b"kept\n"
    assert place.queue.stored["container/logs/runner.log"] == b"begun\n"
    assert place.payload_of(FINISHED)["exitCode"] == 124


async def test_an_image_that_does_not_exist_fails_the_job_and_says_so(place: Place) -> None:
    job_id = await place.do("true", image="missing")
    assert place.engine.image("missing") in place.queue.errors[job_id]
    run = json.loads(place.queue.stored["container/metadata/run.json"])
    assert run["outcome"] == "image-unavailable"


async def test_a_large_artifact_is_handed_over_in_parts(place: Place) -> None:
    script = (
        'cd "$ARTIFACT_DIR"; head -c 11000000 /dev/zero | tr "\\0" x >big.bin; echo y >>big.bin'
    )
    job_id = await place.do(*sh(script))
    assert job_id in place.queue.results
    names = [name for name in place.queue.stored if "big.bin" in name]
    assert names == ["container/big.bin.part-0001", "container/big.bin.part-0002"]
    joined = b"".join(place.queue.stored[name] for name in names)
    assert joined == b"x" * 11_000_000 + b"y\n"
    said = place.payload_of("moonmind.task.artifacts")
    assert said == {"parts": {"container/big.bin": 2}, "missing": {}}
    # What was made for the upload is gone with it.
    job = place.workdir / str(job_id)
    assert sorted(path.name for path in job.iterdir()) == ["artifacts", "repo"]
    assert (job / "artifacts" / "container" / "big.bin").stat().st_size == 11_000_002


async def test_what_the_server_would_refuse_is_left_out_and_said(place: Place) -> None:
    name = "/".join(["n" * 200] * 3)
    script = f'mkdir -p "$ARTIFACT_DIR/{name}"; echo x >"$ARTIFACT_DIR/{name}/file"'
    latin = "echo x >\"$ARTIFACT_DIR/$(printf 'caf\\351')\""
    job_id = await place.do(*sh(f"{script}; {latin}"))
    assert job_id in place.queue.results
    missing = {f"container/{name}/file": "its name is too long for the server"}
    assert place.payload_of("moonmind.task.artifacts") == {"parts": {}, "missing": missing}
    assert place.queue.stored["container/caf?"] == b"x\n"


async def test_output_is_seen_while_the_command_runs_in_few_events(place: Place) -> None:
    script = "n=0; while [ $n -lt 60 ]; do echo line $n; n=$((n+1)); sleep 0.05; done"
    place.submit(*sh(script))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(place.worker.run_once)
        await place.until_live("line 0\n")
        assert FINISHED not in place.messages()
    assert place.live() == "".join(f"line {n}\n" for n in range(60))
    assert place.messages().count(LOG) <= 8


async def test_a_zero_byte_in_the_output_neither_loses_the_event_nor_the_end(place: Place) -> None:
    job_id = await place.do(*sh("printf 'a\\000b\\n'; exit 3"))
    assert place.live() == "ab\n"
    assert place.queue.errors == {job_id: "container command failed (3): ab"}


class Vault(QuietHandler):
    """Answers for one secret, whoever asks with the right token."""

    def do_GET(self) -> None:
        if self.path != "/v1/kv/data/ci" or self.headers["X-Vault-Token"] != "vault-token-1":
            self.answer(403)
            return
        self.answer(200, json.dumps({"data": {"data": {"token": TOKEN}}}).encode())


@pytest.fixture
def vault() -> Iterator[str]:
    with http_server(Vault) as port:
        yield f"http://127.0.0.1:{port}/"


async def test_a_secret_of_the_vault_reaches_the_command_and_nothing_else(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vault: str
) -> None:
    monkeypatch.setenv("MOONMIND_HELPER_IMAGE", engine.image("busybox"))
    place = make_place(engine, tmp_path, vault_address=vault, vault_token="vault-token-1")
    script = (
        'echo "$TOKEN"; echo ${#TOKEN}; echo "$PASSWORD"; echo x >"$ARTIFACT_DIR/$TOKEN.txt"; '
        'echo "last $TOKEN" >&2; exit 1'
    )
    job_id = await place.do(
        *sh(script),
        secretEnv={"TOKEN": "vault://kv/ci#token"},
        env={"PASSWORD": "hunter2-hunter2"},
    )
    log = place.queue.stored["container/logs/runner.log"].splitlines()
    assert log == [b"***", b"21", b"***", b"last ***"]
    assert place.queue.errors == {job_id: "container command failed (1): last ***"}
    assert place.queue.stored["container/***.txt"] == b"x\n"
    assert not any(TOKEN in str(each.path) for each in place.queue.uploads)
    for hidden in (TOKEN, "hunter2", "vault-token-1"):
        assert hidden not in place.everything_said()


async def test_what_this_worker_does_not_allow_is_refused_before_anything_runs(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONMIND_WORKER_ALLOWED_IMAGES", "ghcr.io/acme/*")
    place = make_place(engine, tmp_path)
    job_id = await place.do("true", secretEnv={"HOME_": "env://HOME"})
    image, secret = place.queue.errors[job_id].splitlines()
    assert "is not allowed on this worker; allowed are ghcr.io/acme/*" in image
    assert "task.container.secretEnv.HOME_: env://HOME is not allowed" in secret
    assert place.messages() == ["moonmind.task.execute"]


async def test_a_secret_that_cannot_be_had_fails_the_job_with_its_reference(place: Place) -> None:
    job_id = await place.do("true", secretEnv={"TOKEN": "vault://kv/ci#token"})
    assert place.queue.errors[job_id].startswith("vault://kv/ci#token: this worker has no Vault")


async def test_the_allow_list_may_name_variables_of_the_worker(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONMIND_HELPER_IMAGE", engine.image("busybox"))
    monkeypatch.setenv("MOONMIND_WORKER_ALLOWED_SECRETS", "env://CI_*,env://GITHUB_TOKEN")
    monkeypatch.setenv("CI_KEY", TOKEN)
    monkeypatch.setenv("GITHUB_TOKEN", "github-token-1")
    place = make_place(engine, tmp_path)
    await place.do(*sh("echo ${#KEY}"), secretEnv={"KEY": "env://CI_KEY"})
    assert place.queue.stored["container/logs/runner.log"] == b"21\n"
    # The worker's own credentials are nobody else's, whatever the list says.
    job_id = await place.do("true", secretEnv={"KEY": "env://GITHUB_TOKEN"})
    assert "the variable GITHUB_TOKEN is not set" in place.queue.errors[job_id]


async def test_a_payload_that_is_wrong_is_refused_with_all_its_fields(place: Place) -> None:
    job_id = await place.do("true", env={"JOB_ID": "1"}, pull="never")
    error = place.queue.errors[job_id]
    assert error.startswith("invalid job payload: task.container.env")
    assert "task.container.pull" in error


async def test_one_session_serves_all_jobs_of_run_forever(place: Place, sessions: Sessions) -> None:
    stop = asyncio.Event()
    jobs = [place.submit(*sh(f"echo {n}")) for n in range(3)]
    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            await place.worker.run_forever(stop_event=stop)

        tasks.start_soon(run)
        with anyio.fail_after(WAIT_SECONDS):
            while len(place.queue.results) < 3:
                await anyio.sleep(0.02)
        assert (sessions.opened, sessions.open) == (1, 1)
        stop.set()
    assert list(place.queue.results) == jobs
    assert sessions.open == 0


async def test_run_once_alone_opens_a_session_and_closes_it(
    place: Place, sessions: Sessions
) -> None:
    await place.do("true")
    assert (sessions.opened, sessions.open) == (1, 0)
    await place.do("true")
    assert (sessions.opened, sessions.open) == (2, 0)
    assert len(place.queue.results) == 2


async def test_two_calls_at_once_have_a_session_each(place: Place, sessions: Sessions) -> None:
    place.submit("true")
    place.submit("sleep", "2")
    with anyio.fail_after(WAIT_SECONDS):
        await asyncio.gather(place.worker.run_once(), place.worker.run_once())
    assert len(place.queue.results) == 2
    assert (sessions.opened, sessions.open) == (2, 0)


async def test_a_cancelled_run_kills_the_command_and_closes_the_session(
    place: Place, sessions: Sessions, unique: str
) -> None:
    count = f"/witness/{unique}"
    place.submit(
        *sh(f"while :; do echo tick >>{count}; echo up; sleep 0.1; done"), cacheVolumes=WITNESS
    )
    running = asyncio.create_task(place.worker.run_forever())
    await place.until_live("up")
    running.cancel()
    with anyio.fail_after(10), pytest.raises(asyncio.CancelledError):
        await running
    assert sessions.open == 0
    assert place.queue.results == place.queue.errors == {}
    script = f"wc -l <{count}; sleep 1; wc -l <{count}"
    await place.do(*sh(script), cacheVolumes=WITNESS)
    before, after = place.queue.stored["container/logs/runner.log"].split()
    assert before == after


async def test_a_job_that_is_no_container_task_is_moonminds_alone(place: Place) -> None:
    job_id = place.queue.submit({"repository": "acme/widgets", "task": {"instructions": "Do it."}})
    await place.worker.run_once()
    assert place.queue.results == {job_id: "the agent has done it"}


async def test_a_class_derived_from_moonminds_is_fine(engine: Engine, tmp_path: Path) -> None:
    class Worker(CodexWorker):
        def __init__(self, **parts: Any) -> None:
            super().__init__(**parts)
            install(self, engine=engine.choice)

    # As in a script, whose module knows nothing of MoonMind's results.
    Worker.__module__ = "json"
    queue = Queue()
    worker = Worker(config=CodexWorkerConfig(workdir=tmp_path / "jobs"), queue=queue)
    job_id = queue.submit(payload(engine.image("base"), "true"))
    await worker.run_once()
    assert job_id in queue.results


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    monkeypatch.delenv("DAGGER_SESSION_PORT", raising=False)
    monkeypatch.setenv("_EXPERIMENTAL_DAGGER_RUNNER_HOST", f"unix://{tmp_path}/none.sock")
    monkeypatch.setenv("_EXPERIMENTAL_DAGGER_CLI_BIN", "/bin/false")
    monkeypatch.setattr(keeping, "WAIT_SECONDS", 2.0)
    return Engine(EngineChoice.AUTO, {"base": "busybox:1.36"})


async def test_without_an_engine_the_job_fails_and_says_what_was_tried(
    no_engine: Engine, tmp_path: Path
) -> None:
    place = make_place(no_engine, tmp_path)
    with anyio.fail_after(10):
        job_id = await place.do("true")
    assert place.queue.errors[job_id].startswith("no engine within 2s: ")
    assert "none.sock" in place.queue.errors[job_id]
    assert place.queue.uploads == []


async def test_without_an_engine_an_empty_queue_is_empty_and_other_jobs_are_done(
    no_engine: Engine, tmp_path: Path
) -> None:
    place = make_place(no_engine, tmp_path)
    with anyio.fail_after(5):
        assert not await place.worker.run_once()
        job_id = place.queue.submit(
            {"repository": "acme/widgets", "task": {"instructions": "Do it."}}
        )
        assert await place.worker.run_once()
    assert job_id in place.queue.results


async def test_what_the_worker_raises_is_raised_as_it_is(no_engine: Engine, tmp_path: Path) -> None:
    class LostError(Exception):
        pass

    class Waiting(deque[ClaimedJob]):
        def __bool__(self) -> bool:
            raise LostError

    place = make_place(no_engine, tmp_path)
    place.queue.waiting = Waiting()
    with pytest.raises(LostError):
        await place.worker.run_once()


def test_it_is_installed_once(no_engine: Engine, tmp_path: Path) -> None:
    place = make_place(no_engine, tmp_path)
    with pytest.raises(WorkerMismatchError, match="replaced already"):
        install(place.worker)


def test_a_worker_of_another_version_is_refused_at_start_up(tmp_path: Path) -> None:
    class Other:
        async def run_once(self) -> bool:
            return False

    with pytest.raises(WorkerMismatchError, match="Other has no run_forever, _emit_event, _config"):
        install(Other())

    class Newer(CodexWorker):
        async def _run_container_execute_stage(  # type: ignore[override]
            self, *, job_id: UUID, cancel: asyncio.Event
        ) -> moonmind.WorkerExecutionResult:
            raise NotImplementedError

    newer = Newer(config=CodexWorkerConfig(workdir=tmp_path), queue=Queue())
    with pytest.raises(WorkerMismatchError, match="takes job_id, cancel; at feature 020 it takes"):
        install(newer)


@pytest.mark.parametrize(
    ("name", "value"),
    [("MOONMIND_WORKER_ENGINE", "docker"), ("MOONMIND_ENGINE_OPEN_SECONDS", "soon")],
)
def test_a_broken_setting_is_named_at_start_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    worker = CodexWorker(config=CodexWorkerConfig(workdir=tmp_path), queue=Queue())
    with pytest.raises(SettingsError, match=name):
        install(worker)
