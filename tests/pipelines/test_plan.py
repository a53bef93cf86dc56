import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.payload import TaskPayload, WriteBack, parse_any
from pipelines.plan import Defaults, plan_task, reproduce_line, split_env, summarize


def payload(**fields: object) -> TaskPayload:
    container = {"image": "busybox:1.36", "command": ["true"], **fields}
    return parse_any(container, repository="acme/widgets")


def test_what_a_payload_leaves_open_is_filled_in() -> None:
    plan = plan_task(payload(), job_id="job-1")

    assert plan.repo_dir == plan.workdir == "/work/agent_jobs/job-1/repo"
    assert plan.artifact_dir == "/work/agent_jobs/job-1/artifacts/container"
    assert plan.timeout_seconds == 3600
    assert plan.grace_seconds == 10
    assert not plan.write_back
    assert plan.container_name == "mm-task-job-1"
    assert plan.env == {
        "ARTIFACT_DIR": plan.artifact_dir,
        "JOB_ID": "job-1",
        "REPOSITORY": "acme/widgets",
    }


def test_a_runner_may_decide_otherwise() -> None:
    defaults = Defaults(workdir="/srv/jobs", timeout_seconds=60, write_back=WriteBack.CHANGES)
    plan = plan_task(payload(), job_id="job-1", defaults=defaults)

    assert plan.repo_dir == "/srv/jobs/job-1/repo"
    assert plan.timeout_seconds == 60
    assert plan.write_back


def test_the_payload_wins_over_its_runner() -> None:
    defaults = Defaults(timeout_seconds=60, write_back=WriteBack.CHANGES)
    plan = plan_task(payload(timeoutSeconds=5, writeBack="none"), job_id="job-1", defaults=defaults)

    assert plan.timeout_seconds == 5
    assert not plan.write_back


@pytest.mark.parametrize(
    ("workdir", "expected"),
    [("a/b", "/work/agent_jobs/j/repo/a/b"), ("/opt", "/opt"), (".", "/work/agent_jobs/j/repo")],
)
def test_a_relative_workdir_is_below_the_repository(workdir: str, expected: str) -> None:
    assert plan_task(payload(workdir=workdir), job_id="j").workdir == expected


@pytest.mark.parametrize("job_id", ["", "../up", "a/b", "-x", ".hidden", "x" * 129, "a b"])
def test_a_job_id_that_is_no_name_is_refused(job_id: str) -> None:
    with pytest.raises(ValueError, match="job id"):
        plan_task(payload(), job_id=job_id)


def test_a_payload_without_an_enabled_container_has_no_plan() -> None:
    disabled = parse_any({"repository": "a/b", "task": {"instructions": "x"}})
    with pytest.raises(ValueError, match=r"set task\.container\.enabled"):
        plan_task(disabled, job_id="j")


def test_for_reuse_nothing_in_the_container_names_the_job() -> None:
    one, two = (plan_task(payload(cache="reuse"), job_id=job) for job in ("one", "two"))

    assert one.env == two.env
    assert one.repo_dir == two.repo_dir
    assert one.artifact_dir == two.artifact_dir
    assert one.stop_name == two.stop_name
    assert (one.job_id, two.job_id) == ("one", "two")


def test_for_reuse_two_repositories_of_one_name_are_kept_apart() -> None:
    container = {"image": "busybox", "command": ["true"], "cache": "reuse"}
    plans = [
        plan_task(parse_any(container, repository=name), job_id="j")
        for name in ("acme/widgets", "other/widgets")
    ]
    assert plans[0].repo_dir != plans[1].repo_dir


def test_env_values_that_look_secret_are_kept_apart() -> None:
    plan = plan_task(payload(env={"API_TOKEN": "abcdef", "CACHE_KEY": "k", "A": "1"}), job_id="j")

    assert plan.secret_values == {"API_TOKEN": "abcdef"}
    assert plan.env["CACHE_KEY"] == "k"
    assert "API_TOKEN" not in plan.env


def test_resources_are_told_to_the_command() -> None:
    plan = plan_task(payload(resources={"cpus": 2, "memory": "1g"}), job_id="j")

    assert plan.env["MOONMIND_CPUS"] == "2"
    assert plan.env["MOONMIND_MEMORY"] == "1g"


def test_a_command_with_an_equals_sign_and_a_name_for_env_do_not_go_together() -> None:
    container = {"image": "busybox", "command": ["a=b"], "env": {"x.y": "1"}}
    with pytest.raises(ValueError, match=r"command\[0\]"):
        plan_task(parse_any(container), job_id="j")


@given(st.dictionaries(st.text(min_size=1), st.text()))
def test_every_env_name_goes_one_way_or_the_other(env: dict[str, str]) -> None:
    plain, odd = split_env(env)

    assert {**plain, **odd} == env
    assert not plain.keys() & odd.keys()
    assert all(name.isidentifier() and name.isascii() for name in plain)


@given(st.lists(st.text()))
def test_a_summary_is_one_cut_line(tokens: list[str]) -> None:
    summary = summarize(tuple(tokens))

    assert len(summary) <= 320
    joined = " ".join(tokens)
    assert summary == joined or (summary.endswith("...") and joined.startswith(summary[:317]))


def test_the_line_that_reproduces_a_run_is_one_shell_line() -> None:
    plan = plan_task(payload(secretEnv={"DEPLOY": "env://DEPLOY"}), job_id="job-1")
    line = reproduce_line(plan, image="busybox@sha256:" + "0" * 64)

    assert line.startswith("dagger -m . call run ")
    assert "--job-id=job-1" in line
    assert "--secrets=env://DEPLOY" in line
    assert "--image=busybox@sha256:" in line
    assert "\n" not in line
