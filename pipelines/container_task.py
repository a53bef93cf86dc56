"""A plan and a workspace become a Dagger pipeline, and what it leaves a result.

The client is always an argument: in a module it is `dagger.dag`, in the worker
and on the command line an isolated client.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from importlib import resources
from typing import Any
from uuid import uuid4

import anyio
import dagger
import httpx
from gql.transport.exceptions import TransportError

from pipelines.artifacts import SETUID_CLEARED, SPECIAL_REMOVED
from pipelines.concurrency import together
from pipelines.payload import CacheMode
from pipelines.plan import DEFAULT_HELPER_IMAGE, Plan, split_env
from pipelines.report import (
    Ending,
    EngineFailedError,
    ImageUnavailableError,
    Outcome,
    outcome_of,
)

BACKSTOP_MARGIN_SECONDS = 120
"""Above time limit and grace. The supervisor keeps the limit; a query that takes
longer than this means that the engine is stuck, busy with 100 other tasks or not."""

MAX_CACHED_FAILURES = 16
"""How many failures of the same task are skipped in search of a success to reuse.
Each costs one cached query, 20 ms; after them the task simply runs."""

_LAST_PLAIN_EXIT_CODE = 128
"""Above it, a signal ended the process."""

_HOME = "/.moonmind"
_OUT = f"{_HOME}/out"
_LOG = f"{_OUT}/log"
_PLACE = f"{_HOME}/place"
_CONTROL = f"{_HOME}/control"
_SUPERVISOR = f"{_HOME}/supervisor.sh"
_CLOCK = "/.moonmind-clock"
_BUSYBOX = f"{_HOME}/busybox"
_OWN_SHELL = ("/bin/sh",)
_LENT_SHELL = (_BUSYBOX, "sh")
_RESULT_KEYS = {"exit", "ended", "epoch", "boot", "began", "finished", "hostile", "files"}

# What registries and the engine say of an image that is not there, or not for us.
# Everything else on the way to an image (DNS, time-outs, 5xx) may pass.
_UNAVAILABLE = (
    "not found",
    "manifest unknown",
    "name unknown",
    "pull access denied",
    "insufficient_scope",
    "unauthorized",
    "403 forbidden",
    "invalid reference",
    "no match for platform",
)


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is present in the engine.

    Attributes
    ----------
    container
        A container of it in which nothing has run.
    reference
        With its digest where the engine gives one.
    user
        Who its commands run as; empty for root.
    entrypoint
        What is put before a command.
    shell
        How a POSIX shell is started in `container`.
    """

    container: dagger.Container
    reference: str
    user: str
    entrypoint: tuple[str, ...]
    shell: tuple[str, ...]

    @property
    def busybox(self) -> str:
        """Where a lent busybox is, to be put before a tool; empty where the image has tools."""
        return _BUSYBOX if self.shell == _LENT_SHELL else ""


@dataclass(frozen=True, slots=True)
class Execution:
    """What the engine has of a command that ran.

    Attributes
    ----------
    container
        After the command; None when the supervisor was killed too, and with it
        the file system was lost.
    log, log_bytes
        Its output, stdout and stderr merged, and how long it is.
    lost_output
        The end of the output where `log` was lost.
    names
        Lists of what was in the workspace before the command and after it, where that
        goes back. The command may have put anything in the place of the first.
    files
        How many regular files are in the artifact directory. A hint: the command may have
        replaced what counts them.
    specials, setuid
        Absolute paths that the supervisor removed, and whose bits it cleared.
    """

    ending: Ending
    container: dagger.Container | None = None
    log: dagger.File | None = None
    log_bytes: int = 0
    lost_output: str = ""
    names: dagger.Directory | None = None
    files: int = 0
    specials: tuple[str, ...] = ()
    setuid: tuple[str, ...] = ()

    def removed_below(self, root: str) -> Iterator[tuple[str, str]]:
        """Give what the supervisor changed below a directory: relative path, and reason."""
        for paths, reason in ((self.specials, SPECIAL_REMOVED), (self.setuid, SETUID_CLEARED)):
            for path in paths:
                if path.startswith(f"{root}/"):
                    yield path.removeprefix(f"{root}/"), reason


async def resolve_image(
    client: dagger.Client, reference: str, *, helper_image: str = DEFAULT_HELPER_IMAGE
) -> Image:
    """Bring an image into the engine and learn what a run needs to know of it.

    Raises
    ------
    ImageUnavailableError
        When the registry has no such image, or not for us.
    EngineFailedError
        When the registry cannot be reached or the engine fails.
    """
    container = client.container().from_(reference)
    with engine_failures(f"image {reference}", image=True):
        # `exists` also brings the layers, so that pulling is not on the task's time.
        address, user, entrypoint, shell, find, find_in_bin = await together(
            container.image_ref(),
            container.user(),
            container.entrypoint(),
            container.exists("/bin/sh"),
            container.exists("/usr/bin/find"),
            container.exists("/bin/find"),
        )
    image = Image(
        container=container,
        reference=address,
        user="" if user in {"root", "0", "0:0", "root:root"} else user,
        entrypoint=tuple(entrypoint),
        shell=_OWN_SHELL,
    )
    if shell and (find or find_in_bin):
        return image
    return await lend_busybox(client, image, helper_image)


async def lend_busybox(client: dagger.Client, image: Image, helper_image: str) -> Image:
    """Give an image the shell and the tools of another.

    Raises
    ------
    EngineFailedError
        When there is no such helper image, or the engine fails.
    """
    # Ours to provide, so not the task's failure.
    with engine_failures(f"helper image {helper_image}"):
        busybox = await client.container().from_(helper_image).file("/bin/busybox").sync()
    container = image.container.with_mounted_file(_BUSYBOX, busybox)
    return replace(image, container=container, shell=_LENT_SHELL)


def prepare(
    client: dagger.Client,
    plan: Plan,
    image: Image,
    workspace: dagger.Directory,
    secrets: Mapping[str, dagger.Secret],
) -> dagger.Container:
    """Put everything but the command into the container.

    Returns
    -------
    dagger.Container
        In which nothing has run yet; lazy.
    """
    owner = image.user
    supervisor = resources.files("pipelines").joinpath("supervisor.sh").read_text("utf-8")
    container = (
        image.container.with_mounted_directory(plan.repo_dir, workspace, owner=owner)
        .with_mounted_directory(plan.artifact_dir, client.directory(), owner=owner)
        .with_mounted_directory(_OUT, client.directory(), owner=owner)
        .with_mounted_file(
            _SUPERVISOR,
            client.directory().with_new_file("supervisor.sh", supervisor).file("supervisor.sh"),
        )
        .with_mounted_cache(_CONTROL, _control(client, plan))
    )
    for volume in plan.cache_volumes:
        cache = client.cache_volume(volume.name)
        container = container.with_mounted_cache(volume.target, cache, owner=owner)
    for name, value in split_env(plan.env)[0].items():
        container = container.with_env_variable(name, value)
    for name, value in plan.secret_values.items():
        container = container.with_secret_variable(name, secret_of(client, plan, name, value))
    for name, secret in secrets.items():
        container = container.with_secret_variable(name, secret)
    return container.with_workdir(plan.workdir)


async def run_command(
    client: dagger.Client,
    plan: Plan,
    image: Image,
    workspace: dagger.Directory,
    secrets: Mapping[str, dagger.Secret],
    *,
    stopping: Callable[[], bool] = lambda: False,
) -> Execution:
    """Run the plan's command on a workspace.

    Within one call the command is started once at most, except where `cache:
    reuse` meets failures that other runs have left, which are not reused.

    Parameters
    ----------
    workspace
        Already sent; it is mounted writable, as a copy.
    secrets
        One for each name of the plan's `secret_env`.
    stopping
        Whether this run was asked to stop: for `cache: reuse`, where another run's stop
        may have ended the command that both wait for.

    Raises
    ------
    EngineFailedError
        When the engine fails or is gone; the command may have run.
    """
    prepared = prepare(client, plan, image, workspace, secrets)
    if plan.cache is CacheMode.NEVER:
        return await _execute(client, prepared, plan, image, run=uuid4().hex)

    now = await _engine_clock(image)
    for attempt in range(MAX_CACHED_FAILURES):
        execution = await _execute(client, prepared, plan, image, run=str(attempt), now=now)
        ending = execution.ending
        if outcome_of(ending, None) is Outcome.SUCCEEDED:
            return execution
        anothers = ending.cached or (ending.ended_by == "cancelled" and not stopping())
        if not anothers:
            return execution
    return await _execute(client, prepared, plan, image, run=uuid4().hex)


async def request_stop(client: dagger.Client, plan: Plan, image: Image) -> None:
    """Ask a running command to end: SIGTERM, its grace period, SIGKILL.

    The query of `run_command` then returns as for a command that ended by itself,
    with all files. A cancelled query would lose them.

    Raises
    ------
    EngineFailedError
        When the engine cannot pass it on.
    """
    # A cache volume is the one place that two running containers share.
    container = image.container.with_mounted_cache(_CONTROL, _control(client, plan))
    with engine_failures("stopping the command"):
        await _write_clock(container, image, f"{_CONTROL}/{plan.stop_name}").sync()


async def log_excerpt(
    client: dagger.Client, image: Image, log: dagger.File, *, head: int, tail: int
) -> dagger.Directory:
    """Cut the first `head` and last `tail` bytes out of a log, inside the engine.

    Returns
    -------
    dagger.Directory
        With the files `head` and `tail`.
    """
    script = 'f=$1 h=$2 t=$3; cd "$0" && $4 head -c "$h" "$f" >head && $4 tail -c "$t" "$f" >tail'
    arguments = [_OUT, f"{_HOME}/log", str(head), str(tail), image.busybox]
    with engine_failures("cutting the log"):
        return await (
            _fresh(client, image)
            .with_mounted_file(f"{_HOME}/log", log)
            .with_exec([*image.shell, "-c", script, *arguments])
            .directory(_OUT)
            .sync()
        )


async def list_names(
    client: dagger.Client, image: Image, directory: dagger.Directory
) -> dagger.Directory:
    """List a directory as the supervisor lists the workspace, out of the command's reach.

    Returns
    -------
    dagger.Directory
        With the file `names`.
    """
    # As root, so there is no directory that cannot be looked into.
    script = (
        '{ cd "$1" && $2 find . -name .git -print0 -prune -o -type d -print0 -print0 -o -print0; '
        'printf \'//%s\\0\' "$?"; } >"$0"'
    )
    arguments = [f"{_OUT}/names", _PLACE, image.busybox]
    with engine_failures("listing the workspace"):
        return await (
            _fresh(client, image)
            .with_mounted_directory(_PLACE, directory)
            .with_exec([*image.shell, "-c", script, *arguments])
            .directory(_OUT)
            .sync()
        )


async def pack(
    client: dagger.Client, image: Image, directory: dagger.Directory
) -> dagger.File | None:
    """Make a tar archive of a directory, out of the command's reach.

    Returns
    -------
    dagger.File
        None when the image's `tar` cannot.
    """
    # A tar that has something to say may have left something out.
    script = 'cd "$1" && TAR_OPTIONS= $2 tar -cf - . >"$0/tar" 2>"$0/said" && ! [ -s "$0/said" ]'
    arguments = [_OUT, _PLACE, image.busybox]
    with engine_failures("packing what the command left"):
        try:
            return await (
                _fresh(client, image)
                .with_mounted_directory(_PLACE, directory)
                .with_exec([*image.shell, "-c", script, *arguments])
                .file(f"{_OUT}/tar")
                .sync()
            )
        except dagger.ExecError:
            return None


def _fresh(client: dagger.Client, image: Image) -> dagger.Container:
    """Give a container in which no command has been, with a place for what it finds."""
    return image.container.with_user("root").with_mounted_directory(_OUT, client.directory())


def secret_of(client: dagger.Client, plan: Plan, name: str, value: str) -> dagger.Secret:
    """Hand a value to the engine as a secret of this run.

    The engine knows secrets by name, and a session serves many runs.
    """
    return client.set_secret(f"{plan.stop_name}/{name}", value)


@contextmanager
def engine_failures(doing: str, *, image: bool = False) -> Iterator[None]:
    """Turn what goes wrong on the way to the engine into one of two errors.

    Parameters
    ----------
    doing
        What is tried, for the message.
    image
        Whether it is about an image, which may be unavailable.
    """
    try:
        yield
    except dagger.QueryError as error:
        message = str(error)
        if image and any(said in message.lower() for said in _UNAVAILABLE):
            raise ImageUnavailableError(f"{doing} is not available: {message}") from error
        raise EngineFailedError(f"{doing}: {message}") from error
    except (dagger.DaggerError, TransportError, httpx.HTTPError) as error:
        raise EngineFailedError(f"{doing}: the engine is gone: {error or type(error)}") from error


def _control(client: dagger.Client, plan: Plan) -> dagger.CacheVolume:
    """Give the volume that a run can be stopped through; no other run's command sees it."""
    return client.cache_volume(f"moonmind-control-{sha256(plan.stop_name.encode()).hexdigest()}")


async def _execute(
    client: dagger.Client,
    prepared: dagger.Container,
    plan: Plan,
    image: Image,
    *,
    run: str,
    now: "_Moment | None" = None,
) -> Execution:
    odd = [f"{name}={value}" for name, value in split_env(plan.env)[1].items()]
    arguments = [
        run,
        str(plan.timeout_seconds),
        str(plan.grace_seconds),
        _OUT,
        f"{_CONTROL}/{plan.stop_name}",
        plan.artifact_dir,
        plan.repo_dir if plan.write_back else "",
        *(["env", "--", *odd] if odd else []),
        *image.entrypoint,
        *plan.command,
    ]
    before = datetime.now(UTC)
    backstop = plan.timeout_seconds + plan.grace_seconds + BACKSTOP_MARGIN_SECONDS
    try:
        with anyio.fail_after(backstop), engine_failures("running the command"):
            try:
                container = await prepared.with_exec(
                    [*image.shell, _SUPERVISOR, *arguments], redirect_stdout=_LOG
                ).sync()
            except dagger.ExecError as error:
                if error.exit_code <= _LAST_PLAIN_EXIT_CODE:
                    message = f"the supervisor could not run: {error.stderr.strip()[-500:]}"
                    raise EngineFailedError(f"{message} ({error})") from error
                # An engine that goes down kills its containers: then this fails too.
                await client.version()
                # The supervisor is killed only together with everything else in the
                # container: by the command itself, or for want of memory.
                seconds = (datetime.now(UTC) - before).total_seconds()
                ending = Ending(error.exit_code, None, before, seconds)
                return Execution(ending, lost_output=error.stdout)
    except TimeoutError:
        raise EngineFailedError(f"the engine gave no answer for {backstop}s") from None
    with engine_failures("reading the result"):
        out = container.directory(_OUT)
        text, log_bytes = await together(out.file("result").contents(), out.file("log").size())
        result = _parse_result(text)
        hostile = ("", "")
        if result["hostile"]:
            hostile = await together(out.file("specials").contents(), out.file("setuid").contents())
    began = _Moment(result["boot"], int(result["began"]))
    ending = Ending(
        exit_code=int(result["exit"]),
        ended_by=result["ended"] or None,
        started_at=datetime.fromtimestamp(int(result["epoch"]), UTC),
        seconds=(int(result["finished"]) - began.uptime) / 100,
        cached=now is not None and began.is_before(now),
    )
    return Execution(
        ending,
        container=container,
        log=out.file("log"),
        log_bytes=log_bytes,
        names=out.filter(include=["before", "after"]) if plan.write_back else None,
        files=int(result["files"]) if result["files"].isdecimal() else 0,
        specials=_names(hostile[0]),
        setuid=_names(hostile[1]),
    )


@dataclass(frozen=True, slots=True)
class _Moment:
    """A point in time by the engine's own clock: its boot, and centiseconds since."""

    boot: str
    uptime: int

    def is_before(self, other: "_Moment") -> bool:
        return self.boot != other.boot or self.uptime < other.uptime


async def _engine_clock(image: Image) -> _Moment:
    """Ask the engine's clock: a result that began earlier is a reused one."""
    with engine_failures("asking the engine's clock"):
        answer = await _write_clock(image.container, image, _CLOCK).file(_CLOCK).contents()
    boot, uptime = answer.split()
    return _Moment(boot, int(uptime))


def _write_clock(container: dagger.Container, image: Image, path: str) -> dagger.Container:
    """Write the engine's time to a file: printed, it would be live output of the task."""
    script = (
        "read -r boot </proc/sys/kernel/random/boot_id; read -r up idle </proc/uptime; "
        'echo "$boot ${up%.*}${up#*.}" >"$0"'
    )
    return container.with_user("root").with_exec([*image.shell, "-c", script, path, uuid4().hex])


def _parse_result(text: str) -> dict[str, Any]:
    """Read what the supervisor wrote."""
    result = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if not result.keys() >= _RESULT_KEYS:
        raise EngineFailedError("the supervisor left no result; is the engine's disk full?")
    return result


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split("\0") if name)
