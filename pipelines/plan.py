"""What will be run: the payload with every default filled in. Pure; no Dagger import."""

import hashlib
import json
import posixpath
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipelines.masking import too_short
from pipelines.payload import (
    DEFAULT_TIMEOUT_SECONDS,
    ArtifactRules,
    CacheMode,
    CacheVolume,
    ContainerSpec,
    PullMode,
    Resources,
    TaskPayload,
    WorkspaceFilter,
    WriteBack,
    is_shell_name,
    looks_secret,
    parse_secret_reference,
)

DEFAULT_WORKDIR = "/work/agent_jobs"
"""MoonMind's own default of `MOONMIND_WORKDIR`, absolute."""

DEFAULT_HELPER_IMAGE = "docker.io/library/busybox:1.37.0-musl"
"""Lends its static busybox to images that have no shell or no `find`."""

JOB_ID = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"
"""What may name a run: it becomes part of paths, so it must not lead anywhere else."""

SUMMARY_LENGTH = 320
"""Characters of a command's summary, as MoonMind cuts it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a payload may leave open and its runner decides.

    Attributes
    ----------
    workdir
        Absolute directory that holds the jobs' directories, `MOONMIND_WORKDIR`.
    timeout_seconds
        Time limit of a command whose payload names none.
    write_back
        Whether the command's changes come back when the payload does not say.
    module
        Where the Dagger module that reproduces the run is: its git address with a
        version, or a checkout.
    """

    workdir: str = DEFAULT_WORKDIR
    timeout_seconds: int = DEFAULT_TIMEOUT_SECONDS
    write_back: WriteBack = WriteBack.NONE
    module: str = "."


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run of one container task, with nothing left to decide.

    Attributes
    ----------
    job_id, repository
        As given; the names of the run.
    image, pull
        The reference to run and when to look for a newer one.
    command
        Tokens, run as they are, after the image's entrypoint.
    repo_dir, artifact_dir, workdir
        Absolute paths inside the container: the workspace's mount point, the
        directory that comes back, and where the command starts.
    artifacts_subdir
        Where the artifacts go, below the output directory.
    env
        Names and values that the command sees in the open.
    secret_values
        Names and values of `env` that look secret: given as secrets of the engine.
    secret_env
        Names and references of the payload's `secretEnv`.
    timeout_seconds, grace_seconds
        Limit of the command, and from SIGTERM to SIGKILL.
    module
        Where the Dagger module that reproduces the run is.
    stop_name
        Name of the file that asks this run to end early.
    """

    job_id: str
    repository: str
    image: str
    pull: PullMode
    command: tuple[str, ...]
    repo_dir: str
    artifact_dir: str
    artifacts_subdir: str
    workdir: str
    env: dict[str, str]
    secret_values: dict[str, str]
    secret_env: dict[str, str]
    cache_volumes: tuple[CacheVolume, ...]
    resources: Resources | None
    timeout_seconds: int
    grace_seconds: int
    write_back: bool
    workspace: WorkspaceFilter
    cache: CacheMode
    artifacts: ArtifactRules
    retryable: bool
    module: str
    stop_name: str

    @property
    def container_name(self) -> str:
        """The name that MoonMind gives the job's container."""
        return f"mm-task-{self.job_id}"

    @property
    def command_summary(self) -> str:
        """The command in one line, as it is shown in events."""
        return summarize(self.command)


def plan_task(payload: TaskPayload, *, job_id: str, defaults: Defaults | None = None) -> Plan:
    """Fill in what the payload leaves open.

    Parameters
    ----------
    payload
        A payload whose container is enabled.
    job_id
        Names the run; part of the paths inside the container.
    defaults
        What the runner decides.

    Raises
    ------
    ValueError
        When the payload has no enabled container, or the job id cannot be part
        of a path.
    """
    defaults = defaults or Defaults()
    spec = payload.task.container
    if spec is None or not spec.enabled or spec.image is None:
        raise ValueError("there is nothing to run: set task.container.enabled to true")
    if not re.fullmatch(JOB_ID, job_id):
        raise ValueError(
            f"job id {job_id!r}: must be letters, digits, '_', '.' or '-', "
            "begin with a letter or digit and have 128 characters at most"
        )

    # Only a success is reused, and only where nothing in the container differs. So
    # what names the job names the repository instead: also in what a reused
    # artifact says of itself, which would otherwise be another job's id.
    shared = spec.cache is CacheMode.REUSE
    identity = _repository_name(payload.repository) if shared else job_id
    job_dir = posixpath.join(defaults.workdir, identity)
    repo_dir = posixpath.join(job_dir, "repo")
    artifact_dir = posixpath.join(job_dir, "artifacts", spec.artifacts_subdir)

    env = dict(spec.env)
    # A short one would be masked all over the output, and is no secret anyway.
    secret_values = {
        name: env.pop(name)
        for name, value in spec.env.items()
        if looks_secret(name) and not too_short(value)
    }
    env |= {"ARTIFACT_DIR": artifact_dir, "JOB_ID": identity, "REPOSITORY": payload.repository}
    if spec.resources is not None:
        if spec.resources.cpus is not None:
            env["MOONMIND_CPUS"] = f"{spec.resources.cpus:g}"
        if spec.resources.memory is not None:
            env["MOONMIND_MEMORY"] = spec.resources.memory

    if split_env(env)[1] and "=" in spec.command[0]:
        raise ValueError(
            "task.container.command[0] may not hold '=' beside names in task.container.env that "
            "shells do not know: they are set by `env`, which would take it for one more"
        )

    for volume in spec.cache_volumes:
        if posixpath.normpath(volume.target) in {repo_dir, artifact_dir}:
            raise ValueError(
                f"task.container.cacheVolumes: {volume.target} is where the run itself mounts "
                "the workspace or the artifacts"
            )

    return Plan(
        job_id=job_id,
        repository=payload.repository,
        image=spec.image,
        pull=spec.pull,
        command=tuple(spec.command),
        repo_dir=repo_dir,
        artifact_dir=artifact_dir,
        artifacts_subdir=spec.artifacts_subdir,
        workdir=posixpath.normpath(posixpath.join(repo_dir, spec.workdir or "")),
        env=env,
        secret_values=secret_values,
        secret_env=dict(spec.secret_env),
        cache_volumes=tuple(spec.cache_volumes),
        resources=spec.resources,
        timeout_seconds=spec.timeout_seconds or defaults.timeout_seconds,
        grace_seconds=spec.grace_period_seconds,
        write_back=(spec.write_back or defaults.write_back) is WriteBack.CHANGES,
        workspace=spec.workspace,
        cache=spec.cache,
        artifacts=spec.artifacts,
        retryable=spec.retryable,
        module=defaults.module,
        stop_name=_digest_of(spec, payload.repository) if shared else job_id,
    )


def reproduce_line(plan: Plan, *, image: str) -> str:
    """Give the `dagger call` that runs the plan again.

    Its paths are for the workspace as the current directory, with the run's output
    beside it; `moonmind-ext reproduce` puts in where they really are.

    Parameters
    ----------
    image
        The reference that ran, with its digest where it is known.
    """
    words = ["dagger", "-m", plan.module, "call", "run"]
    words += [
        f"--payload={plan.artifacts_subdir}/metadata/payload.json",
        "--workspace=.",
        f"--job-id={plan.job_id}",
        f"--image={image}",
    ]
    workdir = str(PurePosixPath(plan.repo_dir).parents[1])
    if workdir != DEFAULT_WORKDIR:
        words.append(f"--jobs-dir={workdir}")
    if plan.timeout_seconds != DEFAULT_TIMEOUT_SECONDS:
        words.append(f"--timeout-seconds={plan.timeout_seconds}")
    words += [f"--secrets={secret_address(reference)}" for reference in plan.secret_env.values()]
    # In the published payload these are references too, behind the others.
    words += [f"--secrets=env://{name}" for name in plan.secret_values]
    return shlex.join([*words, "check"])


def secret_address(reference: str) -> str:
    """Translate a payload's reference to a secret into Dagger's address of it.

    They differ for Vault only: Dagger takes the mount from VAULT_PATH_PREFIX, or
    `secret`, and has a dot before the field.
    """
    found = parse_secret_reference(reference)
    if found.scheme != "vault":
        return str(found)
    path, _, field = found.location.partition("#")
    return f"vault://{path.partition('/')[2]}.{field}"


def summarize(command: tuple[str, ...]) -> str:
    """Join a command by blanks and cut it, as MoonMind does.

    Returns
    -------
    str
        At most `SUMMARY_LENGTH` characters, `...` at the end of a cut one.
    """
    joined = " ".join(command)
    if len(joined) <= SUMMARY_LENGTH:
        return joined
    return joined[: SUMMARY_LENGTH - 3] + "..."


def split_env(env: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Part the names that every shell passes on from those that most drop.

    `my.setting` is a fine name for an environment variable, but dash and busybox
    leave it out of what they hand to a command.

    Returns
    -------
    tuple
        What can be set on the container, and what `env NAME=VALUE` must set
        directly before the command.
    """
    # mm_ is the supervisor's own.
    plain = {
        name: value
        for name, value in env.items()
        if is_shell_name(name) and not name.startswith("mm_")
    }
    return plain, {name: value for name, value in env.items() if name not in plain}


def _repository_name(repository: str) -> str:
    """Give a name for paths that all jobs of a repository share."""
    stem = PurePosixPath(repository.rstrip("/")).name.removesuffix(".git")
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "repository"
    return f"{readable}-{hashlib.sha256(repository.encode()).hexdigest()[:12]}"


def _digest_of(spec: ContainerSpec, repository: str) -> str:
    """Name what two identical tasks have in common."""
    text = json.dumps([repository, spec.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
