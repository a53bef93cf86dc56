"""`moonmind-ext queue`, as people use it: processes, a server and its file."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.payload import parse_payload
from tests.engine.support import QuietHandler, http_server
from tests.queue.support import (
    ABLE,
    OTHER_PAYLOAD,
    TASK_PAYLOAD,
    environment,
    queue_cli,
    queue_command,
    server_process,
)

CONTAINER = TASK_PAYLOAD["task"]["container"]
LOG = "moonmind.task.container.log"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server_process(tmp_path_factory.mktemp("queue") / "queue.db") as (url, _):
        yield url


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with client_of(url) as client:
        yield client


def client_of(url: str) -> httpx.Client:
    return httpx.Client(base_url=f"{url}/api/queue/", timeout=30, trust_env=False)


def submit(url: str, payload: Any = TASK_PAYLOAD, *options: str) -> str:
    result = queue_cli("submit", "-", "--url", url, *options, text=json.dumps(payload))
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def run_job(http: httpx.Client, job_id: str, *texts: str, end: str = "complete") -> None:
    """Do as a worker does; no other job may wait."""
    claim(http)
    for text in texts:
        event = {"workerId": "w", "message": LOG, "payload": {"stream": "stdout", "text": text}}
        http.post(f"jobs/{job_id}/events", json=event)
    http.post(f"jobs/{job_id}/{end}", json={"workerId": "w", "errorMessage": "exit code 3"})


def claim(http: httpx.Client) -> Any:
    body = {"workerId": "w", "leaseSeconds": 60, "workerCapabilities": ABLE}
    return http.post("jobs/claim", json=body).json()["job"]


@pytest.mark.parametrize(
    "given", [TASK_PAYLOAD, {"type": "task", "payload": TASK_PAYLOAD}], ids=["payload", "job"]
)
def test_a_submitted_payload_is_what_the_queue_has(
    url: str, http: httpx.Client, given: dict[str, Any]
) -> None:
    job_id = submit(url, given, "--priority", "7", "--max-attempts", "2")
    job = http.get(f"jobs/{job_id}").json()
    http.post(f"jobs/{job_id}/cancel", json={})

    assert job["payload"] == parse_payload(TASK_PAYLOAD).canonical()
    assert (job["type"], job["priority"], job["maxAttempts"]) == ("task", 7, 2)


@pytest.mark.parametrize("given", [{"container": CONTAINER}, CONTAINER], ids=["task", "container"])
def test_a_short_form_is_submitted_for_the_repository_that_is_named(
    url: str, http: httpx.Client, given: dict[str, Any]
) -> None:
    job_id = submit(url, given, "--repository", "acme/gadgets")
    job = http.get(f"jobs/{job_id}").json()
    http.post(f"jobs/{job_id}/cancel", json={})

    assert job["payload"]["repository"] == "acme/gadgets"
    assert job["payload"]["task"]["container"]["image"] == CONTAINER["image"]


def test_a_payload_of_another_type_is_sent_as_it_is(
    tmp_path: Path, url: str, http: httpx.Client
) -> None:
    file = tmp_path / "payload.json"
    file.write_text(json.dumps(OTHER_PAYLOAD))
    result = queue_cli("submit", str(file), "--type", "other", MOONMIND_URL=url)
    job = http.get(f"jobs/{result.stdout.strip()}").json()
    http.post(f"jobs/{job['id']}/cancel", json={})

    assert (job["type"], job["payload"]) == ("other", OTHER_PAYLOAD)
    assert "other" in queue_cli("show", job["id"], "--url", url).stdout


@pytest.mark.parametrize(
    ("text", "options"),
    [("{", []), ("[]", []), ("{}", []), ("[]", ["--type", "other"]), ('{"image": "X"}', [])],
)
def test_a_payload_with_mistakes_is_told_before_it_is_sent(text: str, options: list[str]) -> None:
    # Nothing listens there.
    result = queue_cli("submit", "-", "--url", "http://127.0.0.1:9", *options, text=text)

    assert result.returncode == 2
    assert "the payload is not valid:\n  - " in result.stderr
    assert "Traceback" not in result.stderr


def test_a_mistake_that_is_none_to_the_queue_is_warned_of(url: str, http: httpx.Client) -> None:
    given = {"image": "busybox", "command": ["true"], "timeoutSecond": 5}
    result = queue_cli("submit", "-", "--url", url, text=json.dumps(given))
    http.post(f"jobs/{result.stdout.strip()}/cancel", json={})

    assert result.returncode == 0
    assert "did you mean timeoutSeconds?" in result.stderr


def test_what_the_server_refuses_is_told_in_its_words(url: str) -> None:
    payload = TASK_PAYLOAD | {"repository": "file:///srv/git/widgets"}
    result = queue_cli("submit", "-", "--url", url, text=json.dumps(payload))

    assert result.returncode == 2
    assert "repository must be owner/name" in result.stderr


def test_show_tells_where_a_job_stands(url: str, http: httpx.Client) -> None:
    job_id = submit(url)
    waiting = queue_cli("show", job_id, "--url", url).stdout
    claim(http)
    http.post(
        f"jobs/{job_id}/artifacts/upload",
        data={"name": "logs/runner.log", "workerId": "w"},
        files={"file": b"1" * 2048},
    )
    running = queue_cli("show", job_id, "--url", url).stdout
    http.post(f"jobs/{job_id}/fail", json={"workerId": "w", "errorMessage": "exit code 3"})
    failed = queue_cli("show", job_id, "--url", url)

    for part in ("queued", "1 of 3", "acme/widgets", "busybox:1.36", "codex, git, docker"):
        assert part in waiting
    for part in ("running", "w, lease until", "logs/runner.log (2,048 bytes)"):
        assert part in running
    assert "exit code 3" in failed.stdout
    assert failed.returncode == 0
    as_json = queue_cli("show", job_id, "--url", url, "--json").stdout
    assert json.loads(as_json) == http.get(f"jobs/{job_id}").json()


def test_logs_are_the_commands_output_and_what_else_happened(url: str, http: httpx.Client) -> None:
    job_id = submit(url)
    claim(http)
    http.post(f"jobs/{job_id}/heartbeat", json={"workerId": "w", "leaseSeconds": 60})
    http.post(
        f"jobs/{job_id}/events",
        json={"workerId": "w", "message": "[bold]a stage[/]", "payload": {"status": "started"}},
    )
    for text in ("one\ntw", "o\nça \x1b[31mrouge\n"):
        event = {"workerId": "w", "message": LOG, "payload": {"stream": "stdout", "text": text}}
        http.post(f"jobs/{job_id}/events", json=event)
    result = queue_cli("logs", job_id, "--url", url)
    http.post(f"jobs/{job_id}/complete", json={"workerId": "w"})

    assert result.returncode == 0
    assert result.stdout == "one\ntwo\nça \x1b[31mrouge\n"
    lines = result.stderr.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        'Job queued {"type": "task"}',
        'Job claimed {"workerId": "w"}',
        '[bold]a stage[/] {"status": "started"}',
    ]


def test_what_a_terminal_cannot_show_is_escaped(url: str, http: httpx.Client) -> None:
    job_id = submit(url)
    run_job(http, job_id, "ça va\n")
    result = queue_cli("logs", job_id, "--url", url, PYTHONIOENCODING="ascii")

    assert result.stdout == "\\xe7a va\n"


@pytest.mark.parametrize(("end", "exit_code"), [("complete", 0), ("fail", 1), ("cancel", 1)])
def test_followed_logs_come_while_the_job_runs_and_end_as_it_does(
    url: str, http: httpx.Client, end: str, exit_code: int
) -> None:
    job_id = submit(url)
    command = queue_command("logs", job_id, "--url", url, "--follow")
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        if end == "cancel":
            http.post(f"jobs/{job_id}/cancel", json={})
            assert process.stdout.read() == ""
        else:
            claim(http)
            event = {"workerId": "w", "message": LOG, "payload": {"text": "now\n"}}
            http.post(f"jobs/{job_id}/events", json=event)
            assert process.stdout.readline() == "now\n"
            assert process.poll() is None
            event["payload"] = {"text": "the last word"}
            http.post(f"jobs/{job_id}/events", json=event)
            http.post(f"jobs/{job_id}/{end}", json={"workerId": "w", "errorMessage": "no"})
            assert process.stdout.read() == "the last word"
        assert process.wait(timeout=30) == exit_code


def test_a_long_log_is_read_to_its_end(url: str, http: httpx.Client) -> None:
    job_id = submit(url)
    run_job(http, job_id, *(f"{number}\n" for number in range(501)))
    result = queue_cli("logs", job_id, "--url", url, "--follow")

    assert result.returncode == 0
    assert result.stdout.splitlines() == [str(number) for number in range(501)]


def test_followed_logs_go_on_when_the_server_was_started_again(tmp_path: Path) -> None:
    db = tmp_path / "queue.db"
    with server_process(db) as (url, server):
        port = httpx.URL(url).port or 0
        job_id = submit(url)
        with subprocess.Popen(
            queue_command("logs", job_id, "--url", url, "--follow"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        ) as process:
            assert process.stderr is not None
            assert "Job queued" in process.stderr.readline()
            server.kill()
            server.wait()
            assert "does not answer" in process.stderr.readline()
            with server_process(db, port=port), client_of(url) as http:
                run_job(http, job_id, "after all\n")
                output, rest = process.communicate(timeout=30)
            assert process.returncode == 0
            assert output == "after all\n"
            assert "Job queued" not in rest


def test_a_waiting_job_is_cancelled_and_a_running_one_asked(url: str, http: httpx.Client) -> None:
    waiting = submit(url)
    result = queue_cli("cancel", waiting, "--url", url, "--reason", "not needed")
    assert (result.returncode, result.stdout) == (0, "cancelled\n")
    assert "not needed" in queue_cli("show", waiting, "--url", url).stdout

    running = submit(url)
    claim(http)
    result = queue_cli("cancel", running, "--url", url)
    assert (result.returncode, result.stdout) == (0, "asked its worker to stop\n")
    http.post(f"jobs/{running}/complete", json={"workerId": "w"})
    result = queue_cli("cancel", running, "--url", url)
    assert result.returncode == 2
    assert "too late" in result.stderr


def test_a_server_without_cancellation_is_told_from_a_job_that_is_not_there(url: str) -> None:
    class Older(QuietHandler):
        def do_POST(self) -> None:
            self.answer(404, b'{"detail": "Not Found"}')

    with http_server(Older) as port:
        result = queue_cli("cancel", "some-job", "--url", f"http://127.0.0.1:{port}")
    assert result.returncode == 2
    assert "has no cancellation" in result.stderr
    result = queue_cli("cancel", "some-job", "--url", url)
    assert result.returncode == 2
    assert "there is no job some-job" in result.stderr


@pytest.mark.parametrize("command", ["show", "logs", "cancel"])
@pytest.mark.parametrize("job_id", ["no-such-job", "../jobs", "a/b?c#d", ".."])
def test_a_job_that_is_not_there_is_told(url: str, command: str, job_id: str) -> None:
    result = queue_cli(command, job_id, "--url", url)
    assert result.returncode == 2
    assert result.stderr.startswith("moonmind-ext: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:9", "http://[", "nonsense"])
@pytest.mark.parametrize("command", ["show", "logs", "cancel"])
def test_a_server_that_does_not_answer_is_named(command: str, address: str) -> None:
    result = queue_cli(command, "some-job", MOONMIND_URL=address)

    assert result.returncode == 75
    assert address in result.stderr
    assert "moonmind-ext queue serve" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}"])
def test_a_server_that_is_no_queue_is_told(body: bytes) -> None:
    class Website(QuietHandler):
        def do_GET(self) -> None:
            self.answer(200, body)

    with http_server(Website) as port:
        result = queue_cli("logs", "x", "--url", f"http://127.0.0.1:{port}")
    assert result.returncode == 75
    assert "Traceback" not in result.stderr


def test_a_port_that_is_taken_and_a_file_that_is_no_queue_are_told(
    tmp_path: Path, url: str
) -> None:
    taken = str(httpx.URL(url).port)
    result = queue_cli("serve", "--port", taken, "--db", str(tmp_path / "queue.db"))
    assert result.returncode == 2
    assert f"127.0.0.1:{taken}" in result.stderr

    (tmp_path / "notes.txt").write_text("no database at all " * 100)
    result = queue_cli("serve", "--port", "0", "--db", str(tmp_path / "notes.txt"))
    assert result.returncode == 2
    assert "notes.txt" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_server_with_a_token_keeps_others_workers_out(tmp_path: Path) -> None:
    with (
        server_process(tmp_path / "queue.db", MOONMIND_WORKER_TOKEN="sesame") as (url, _),
        client_of(url) as http,
    ):
        job_id = submit(url)
        body = {"workerId": "w", "leaseSeconds": 60, "workerCapabilities": ABLE}
        assert http.post("jobs/claim", json=body).status_code == 500
        http.headers["X-MoonMind-Worker-Token"] = "sesame"
        assert claim(http)["id"] == job_id


def test_help_imports_nothing_that_takes_long() -> None:
    script = (
        "import sys, moonmind_ext.cli as cli\n"
        "sys.argv = ['moonmind-ext', 'queue', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )

    loaded = result.stderr.splitlines()[-1]
    assert "'moonmind_ext'" in loaded
    for heavy in ("starlette", "uvicorn", "httpx", "rich", "sqlite3"):
        assert f"'{heavy}'" not in loaded
