"""MoonMind's queue payload and its `task.container`: what comes in.

`parse_payload` turns JSON into a `TaskPayload`, or raises one `TaskContractError`
that names every wrong field. What is said of MoonMind is read from its feature
020, February 2026. Imports pydantic only, so that `validate` answers at once.

A rule raises `ValueError` with the second half of a sentence. The first half is
the path of the field, which only the parser knows.
"""

import json
import math
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, Final, Literal, NoReturn, Self, TypeAlias

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

DEFAULT_TIMEOUT_SECONDS = 3600
"""Time limit of a command whose payload names none; a worker's setting may say otherwise."""

MAX_SECONDS = 31_536_000
"""A year. The supervisor counts centiseconds in the shell's 64 bit."""

DEFAULT_ARTIFACTS_SUBDIR = "container"
"""Where, below the job's artifacts, a command writes to when the payload names nothing."""

RESERVED_ENV = frozenset(
    {"ARTIFACT_DIR", "JOB_ID", "REPOSITORY", "MOONMIND_CPUS", "MOONMIND_MEMORY"}
)
"""Names that the run sets itself; a payload may not, in any case of letters."""

# TOKENS is missing on purpose: with language models it is a number, MAX_TOKENS.
_SECRET_WORDS = {"TOKEN", "PASSWORD", "PASSWORDS", "SECRET", "SECRETS", "CREDENTIAL", "CREDENTIALS"}
_KEY_WORDS = {"KEY", "KEYS"}
_PLAIN_KEYS = {"CACHE", "FOREIGN", "PARTITION", "PRIMARY", "PUBLIC", "SORT"}
"""What makes the KEY behind it an ordinary one."""

_OUR_DIRECTORY = "/.moonmind"
"""Inside the container: the supervisor and what it leaves."""

_OUR_VOLUMES = "moonmind-control"
"""Cache volumes of the engine that begin like this are the run's own."""

_DEFAULT_RUNTIME: Final = "codex"

_MAX_CPUS = 1_000_000
"""Far from any machine, and near enough for a float."""

_MAX_DEPTH = 100
"""Levels of nesting in a payload. pydantic's serializer gives up at 255."""

# `re` compiles the patterns at their first use, so that the import stays cheap.
#
# Images: the grammar of github.com/distribution/reference. One difference: `Name/x`
# is a registry `Name` to Docker; in a payload it is a name that should be lower case.
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_HOST = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_IMAGE = (
    rf"((?:(?=[^/]*[.:]|localhost/){_HOST}/)?{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127})?(?:@sha256:[a-f0-9]{64})?"
)
_MAX_IMAGE_NAME = 255
# dash and busybox drop variables of any other name before a command sees them.
_SHELL_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
# Docker's: 512m, 16g, 16gb, 16GiB, 1.5 g; but not 16Gi, which is Kubernetes'.
_MEMORY = r"(?i)([0-9]{1,18}(?:\.[0-9]{1,18})?) ?(?:([kmgt])(?:i?b)?|b)?"
# Vault references: MoonMind's characters, and 512 of them with the `vault://`.
_REFERENCES = {
    "env": (r"[^=\s](?:[^=]*[^=\s])?", "env://NAME"),
    "file": (r"(?!.*/\.\.(?:/|$))/.+", 'file:///absolute/path, without ".."'),
    "vault": (
        r"(?=.{,504}$)(?!(?:.*/)?\.\.?[/#])[A-Za-z0-9._-]+/[A-Za-z0-9._/-]+#[A-Za-z0-9._-]+",
        'vault://mount/path#field, without ".." and with 512 characters at most',
    ),
}

_Location: TypeAlias = tuple[str | int, ...]
_Wrong: TypeAlias = tuple[_Location, str]


@dataclass(frozen=True, slots=True)
class Problem:
    """One wrong field.

    Attributes
    ----------
    path
        Dotted, e.g. `task.container.cacheVolumes[0].name`; empty for the whole.
    message
        A sentence that names the path and says what to do. It never holds a value
        of `env` or `secretEnv`.
    """

    path: str
    message: str


class TaskContractError(ValueError):
    """Everything that is wrong with a payload, at once.

    Attributes
    ----------
    problems
        One for each wrong field, in the order of the payload.
    """

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(problem.message for problem in self.problems)


class PullMode(StrEnum):
    """When to ask the registry for an image."""

    IF_MISSING = "if-missing"
    ALWAYS = "always"


class CacheMode(StrEnum):
    """Whether an identical run may be answered from the engine's cache."""

    NEVER = "never"
    REUSE = "reuse"


class WriteBack(StrEnum):
    """What of the command's changes to the repository comes back."""

    NONE = "none"
    CHANGES = "changes"


class PublishMode(StrEnum):
    """What becomes of the changes after the task."""

    NONE = "none"
    BRANCH = "branch"
    PR = "pr"


@dataclass(frozen=True, slots=True)
class SecretReference:
    """Where a secret is; never the secret itself.

    Attributes
    ----------
    scheme, location
        `env` and the name of a variable, `file` and an absolute path, or `vault`
        and `mount/path#field`.
    """

    scheme: str
    location: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.location}"


def parse_secret_reference(text: str) -> SecretReference:
    """Read a reference to a secret.

    Raises
    ------
    ValueError
        When it is none. The message does not repeat `text`: people paste the
        secret where its reference belongs.
    """
    scheme, _, location = text.strip().partition("://")
    scheme = scheme.lower()
    if scheme not in _REFERENCES:
        raise ValueError(
            "must be a reference: env://NAME, file:///path or vault://mount/path#field"
        )
    pattern, form = _REFERENCES[scheme]
    if not re.fullmatch(pattern, location) or not location.isprintable():
        raise ValueError(f"must be {form}")
    return SecretReference(scheme, location)


def looks_secret(name: str) -> bool:
    """Say whether a variable of this name likely holds a secret.

    It does where TOKEN, PASSWORD, SECRET, CREDENTIAL or KEY is a word of its own:
    in `API_KEY` and `githubToken`, not in `CACHE_KEY` or `TOKENIZERS_PARALLELISM`.
    """
    words = [w.upper() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)]
    return any(
        word in _SECRET_WORDS or (word in _KEY_WORDS and before not in _PLAIN_KEYS)
        for before, word in zip(["", *words], words, strict=False)
    )


def _must(message: str, right: Callable[[Any], object]) -> AfterValidator:
    """Make a rule out of a test of the right type of value."""
    return AfterValidator(_rule(message, right))


def _must_be(message: str, right: Callable[[Any], object]) -> BeforeValidator:
    """Make a rule out of a test that sees any value."""
    return BeforeValidator(_rule(f"must be {message}", right))


def _rule(message: str, right: Callable[[Any], object]) -> Callable[[object], object]:
    def rule(value: object) -> object:
        if not right(value):
            raise ValueError(message)
        return value

    return rule


def _integer(least: int) -> BeforeValidator:
    # By exact type: a bool is an int to Python, but not to a reader of JSON.
    return _must_be(f"an integer of at least {least}", lambda n: type(n) is int and n >= least)


def _stripped(value: object) -> object:
    """To MoonMind, blank text was not given."""
    return (value.strip() or None) if isinstance(value, str) else value


def _lowered(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _required(value: str) -> str:
    if not value.strip():
        raise ValueError("is required")
    return value.strip()


def _switch(value: object) -> bool:
    match _lowered(value):
        case True | "1" | "true" | "yes" | "on":
            return True
        case False | "0" | "false" | "no" | "off":
            return False
    raise ValueError("must be true or false")


def _runtime(value: object) -> object:
    word = _lowered(_stripped(value))
    return _DEFAULT_RUNTIME if word == "universal" else word


def _capabilities(values: Iterable[str]) -> list[str]:
    words = (value.strip().lower() for value in values)
    return list(dict.fromkeys(word for word in words if word))


def _is_image(text: str) -> bool:
    match = re.fullmatch(_IMAGE, text)
    return match is not None and len(match[1]) <= _MAX_IMAGE_NAME


def _env_name(name: str) -> str:
    if not name.strip():
        raise ValueError("has a blank name")
    if "=" in name:
        raise ValueError('may not have "=" in its name')
    if name.strip().upper() in RESERVED_ENV:
        raise ValueError("is set by the run itself and may not be set by the payload")
    if name != name.strip() or not name.isprintable():
        raise ValueError("may have neither blanks around its name nor control characters in it")
    return name


def is_shell_name(name: str) -> bool:
    """Whether every shell passes an environment variable of this name on."""
    return re.fullmatch(_SHELL_NAME, name) is not None


def _place(path: str) -> str:
    """Normalise a path in the container; one that climbs is taken to climb to the root.

    How far the root is only the runner knows, and `//x`, which normpath leaves alone,
    is `/x` to Linux.
    """
    return re.sub(r"^(?:/+|(?:\.\./)+)", "/", posixpath.normpath(path))


def _is_ours(path: str) -> bool:
    return f"{_place(path)}/".startswith(f"{_OUR_DIRECTORY}/")


def _subdir(value: str) -> str:
    parts = [part for part in value.strip().split("/") if part not in {"", "."}]
    if not parts or value.strip().startswith("/") or ".." in parts:
        raise ValueError('must be a relative path, not empty and without ".."')
    # Case-folded: to macOS and Windows `Logs` is the same directory.
    if parts[0].casefold() == "logs":
        raise ValueError('may not be "logs" or below it: the logs of the stage are there')
    return "/".join(parts)


def _bytes(text: str) -> int:
    """Count the bytes that a `memory` means; 0 for what is no size."""
    match = re.fullmatch(_MEMORY, text)
    if match is None:
        return 0
    power = "kmgt".index(match[2].lower()) + 1 if match[2] else 0
    return int(float(match[1]) * 1024**power)


_Text = Annotated[str | None, BeforeValidator(_stripped)]
_RequiredText = Annotated[str, AfterValidator(_required)]
_Repository = Annotated[
    _RequiredText,
    _must(
        "may not carry credentials, which everyone could read: use auth.repoAuthRef",
        partial(re.fullmatch, r"(?is)(?!https?://[^/?#]*@).*"),
    ),
]
_Runtime = Annotated[Literal["codex", "gemini", "claude"] | None, BeforeValidator(_runtime)]
_Capabilities = Annotated[list[str], AfterValidator(_capabilities)]
_Image = Annotated[
    str,
    _must(
        "must be an image reference, its name in lower case: registry/name:tag or name@sha256:...",
        lambda text: not text or _is_image(text),
    ),
]
_Command = Annotated[
    list[str],
    _must_be('a list of strings, as in ["sh", "-c", "make"]', lambda v: isinstance(v, list)),
    _must("must have a token that is not blank", lambda v: not v or any(t.strip() for t in v)),
]
_Workdir = Annotated[
    _Text,
    _must(
        f'may not be "{_OUR_DIRECTORY}" or below it: the run keeps its own files there',
        lambda path: path is None or not _is_ours(path),
    ),
]
_AnyName = Annotated[str, AfterValidator(_env_name)]
_EnvName = Annotated[
    _AnyName,
    _must(
        "looks like a secret, whose name must be letters, digits and '_', the first no digit: "
        "shells drop any other",
        lambda name: is_shell_name(name) or not looks_secret(name),
    ),
]
_SecretName = Annotated[
    _AnyName,
    _must(
        "must be a name of letters, digits and '_', the first no digit: shells drop any other",
        is_shell_name,
    ),
]
_Secret = Annotated[str, AfterValidator(lambda text: str(parse_secret_reference(text)))]
_VaultSecret = Annotated[
    _Secret, _must("must be vault://mount/path#field", partial(re.match, "vault:"))
]
_Count = Annotated[int, _integer(0)]
_not_over_a_year = _must(
    f"must be {MAX_SECONDS} at most, a year", lambda seconds: seconds <= MAX_SECONDS
)
_Cpus = Annotated[
    float, _must_be("a number above 0", lambda n: type(n) in {int, float} and 0 < n < _MAX_CPUS)
]
_Memory = Annotated[str, _must('must be a size as Docker writes it: "512m" or "16g"', _bytes)]
_VolumeName = Annotated[
    str,
    _must(
        "must be letters, digits, '_', '.' and '-', the first a letter or digit",
        partial(re.fullmatch, r"[A-Za-z0-9][A-Za-z0-9_.-]*"),
    ),
    _must(
        f'may not begin with "{_OUR_VOLUMES}": the engine keeps requests to stop a run there',
        lambda name: not name.startswith(_OUR_VOLUMES),
    ),
]
_MountTarget = Annotated[
    str,
    _must('must be an absolute path without ","', partial(re.fullmatch, r"(?s)/[^,]*")),
    _must('may not be "/": the volume would hide the image', lambda path: _place(path) != "/"),
    _must(
        f'may not be "{_OUR_DIRECTORY}" or below it: the run keeps its own files there',
        lambda path: not _is_ours(path),
    ),
]


class _Spec(BaseModel):
    """An object of the payload: camelCase, unknown keys kept, null the same as absent."""

    # Also by the names in here, as MoonMind does: timeout_seconds for timeoutSeconds.
    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="allow", hide_input_in_errors=True
    )

    @classmethod
    def known(cls) -> list[str]:
        """Give the names of the fields as the payload writes them."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: object) -> object:
        # MoonMind's canonical form has null for whatever was not said.
        if not isinstance(data, dict):
            return data
        known = {*cls.known(), *cls.model_fields}
        return {key: value for key, value in data.items() if value is not None or key not in known}


class CacheVolume(_Spec):
    """A named directory that outlives the container, and where it is mounted."""

    model_config = ConfigDict(extra="forbid")

    name: _VolumeName
    target: _MountTarget


class Resources(_Spec):
    """What the task asks for; `memory` in Docker's notation."""

    cpus: _Cpus | None = None
    memory: _Memory | None = None

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes; a `k` is 1024, as it is to Docker."""
        return None if self.memory is None else _bytes(self.memory)


class WorkspaceFilter(_Spec):
    """What of the repository directory goes into the container, by patterns."""

    include: list[str] = Field(default_factory=list)
    exclude: list[str] = Field(default_factory=list)
    gitignore: StrictBool = False


class ArtifactRules(_Spec):
    """Which artifacts come back, by patterns and limits."""

    include: list[str] = Field(default_factory=list)
    exclude: list[str] = Field(default_factory=list)
    max_bytes: _Count | None = None
    max_files: _Count | None = None


class ContainerSpec(_Spec):
    """`task.container`: the command, its image and what surrounds it.

    Attributes
    ----------
    command
        Tokens, verbatim. MoonMind strips them and drops blank ones.
    workdir
        None is the repository directory.
    artifacts_subdir
        Relative, without `.` and `..`.
    timeout_seconds, grace_period_seconds
        Until SIGTERM, and from there to SIGKILL. None: the runner's default.
    env, secret_env
        Values, and references to them, by name; no name is in both.
    write_back
        None: not said, so the runner decides.
    retryable
        Whether a failure that is not the task's may put the job back in the queue.
    """

    # First, because image and command ask for it.
    enabled: Annotated[bool, BeforeValidator(_switch)] = False
    image: _Image | None = Field(None, validate_default=True)
    command: _Command = Field(default_factory=list, validate_default=True)
    workdir: _Workdir = None
    env: dict[_EnvName, str] = Field(default_factory=dict)
    artifacts_subdir: Annotated[str, AfterValidator(_subdir)] = DEFAULT_ARTIFACTS_SUBDIR
    timeout_seconds: Annotated[int, _integer(1), _not_over_a_year] | None = None
    resources: Resources | None = None
    pull: Annotated[PullMode, BeforeValidator(_lowered)] = PullMode.IF_MISSING
    cache_volumes: list[CacheVolume] = Field(default_factory=list)
    # From here on ours, not MoonMind's.
    secret_env: dict[_SecretName, _Secret] = Field(default_factory=dict)
    grace_period_seconds: Annotated[_Count, _not_over_a_year] = 10
    write_back: Annotated[WriteBack, BeforeValidator(_lowered)] | None = None
    workspace: WorkspaceFilter = Field(default_factory=WorkspaceFilter)
    cache: Annotated[CacheMode, BeforeValidator(_lowered)] = CacheMode.NEVER
    retryable: StrictBool = True
    artifacts: ArtifactRules = Field(default_factory=ArtifactRules)

    @field_validator("image", "command")
    @classmethod
    def _required_when_enabled(cls, value: object, info: ValidationInfo) -> object:
        if not value and info.data.get("enabled"):
            raise ValueError("is required when task.container.enabled=true")
        return value

    def canonical(self) -> dict[str, Any]:
        """Give what was said; MoonMind's own fields are null where nothing was."""
        said = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        names = self.known()
        moonmind = names[: names.index("secretEnv")]
        return {**dict.fromkeys(moonmind), "enabled": self.enabled, **said}


class Skill(_Spec):
    """`task.skill`: which skill the agent uses."""

    id: str = "auto"
    args: dict[str, Any] = Field(default_factory=dict)
    required_capabilities: _Capabilities | None = None


class Runtime(_Spec):
    """`task.runtime`: which agent, and how."""

    mode: _Runtime = None
    model: _Text = None
    effort: _Text = None


class Git(_Spec):
    """`task.git`: the branches that the task starts from and works on."""

    starting_branch: _Text = None
    new_branch: _Text = None


class Publish(_Spec):
    """`task.publish`: what becomes of the changes, and in which words."""

    mode: Annotated[PublishMode, BeforeValidator(_lowered)] = PublishMode.BRANCH
    pr_base_branch: _Text = None
    commit_message: _Text = None
    pr_title: _Text = None
    pr_body: _Text = None


class Auth(_Spec):
    """`auth`: references to the credentials for cloning and for publishing."""

    repo_auth_ref: Annotated[_VaultSecret | None, BeforeValidator(_stripped)] = None
    publish_auth_ref: Annotated[_VaultSecret | None, BeforeValidator(_stripped)] = None


class Task(_Spec):
    """`task`: what is to be done."""

    instructions: _RequiredText = Field(
        validation_alias=AliasChoices("instructions", "instruction")
    )
    skill: Skill = Field(default_factory=Skill)
    runtime: Runtime = Field(default_factory=Runtime)
    git: Git = Field(default_factory=Git)
    publish: Publish = Field(default_factory=Publish)
    container: ContainerSpec | None = None

    @field_validator("runtime", mode="before")
    @classmethod
    def _runtime_by_name(cls, value: object) -> object:
        return {"mode": value} if isinstance(value, str) else value


class TaskPayload(_Spec):
    """The payload of a queue job of type `task`.

    Attributes
    ----------
    target_runtime
        The agent; `task.runtime.mode` says the same.
    required_capabilities
        As given; `canonical` has all of them.
    """

    repository: _Repository = Field(validation_alias=AliasChoices("repository", "repo"))
    target_runtime: _Runtime = None
    required_capabilities: _Capabilities = Field(default_factory=list)
    auth: Auth | None = None
    task: Task

    @model_validator(mode="after")
    def _one_runtime(self) -> Self:
        runtime = self.target_runtime or self.task.runtime.mode or _DEFAULT_RUNTIME
        self.target_runtime = self.task.runtime.mode = runtime
        return self

    def canonical(self) -> dict[str, Any]:
        """Give the payload as MoonMind's queue stores it: JSON, camelCase, unknown keys kept.

        Of our own fields only those that were given, so that the canonical form of
        a MoonMind payload is MoonMind's.
        """
        task, container = self.task, self.task.container
        data = self.model_dump(mode="json", by_alias=True, exclude={"task": {"container"}})
        data["task"]["container"] = None if container is None else container.canonical()
        data["requiredCapabilities"] = _capabilities(
            [
                *self.required_capabilities,
                self.target_runtime or _DEFAULT_RUNTIME,
                "git",
                *(["gh"] if task.publish.mode is PublishMode.PR else []),
                *(task.skill.required_capabilities or []),
                *(["docker"] if container is not None and container.enabled else []),
            ]
        )
        return data


def loads(text: str | bytes) -> object:
    """Read JSON and nothing but JSON: no NaN, no key twice in an object.

    Raises
    ------
    TaskContractError
        With line and column where it is broken.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_twins, parse_constant=_no_constant)
    except TaskContractError:
        raise
    except json.JSONDecodeError as error:
        fault = f"is broken at line {error.lineno}, column {error.colno}: {error.msg}"
    except UnicodeDecodeError:
        fault = "is not text in UTF-8"
    except RecursionError:
        fault = "is nested too deeply"
    except ValueError:
        # Python's limit of 4300 digits, the only other ValueError of the parser.
        fault = "has a number with too many digits"
    raise TaskContractError(Problem("", f"the JSON {fault}"))


def parse_payload(data: object) -> TaskPayload:
    """Read a queue payload, or the queue job `{"type": "task", "payload": {...}}` around it.

    Raises
    ------
    TaskContractError
        Every wrong field at once, in the order of the payload.
    """
    if isinstance(data, dict) and "payload" in data and "task" not in data:
        if data.get("type") != "task":
            raise TaskContractError(
                Problem("type", 'type must be "task": no other has a container')
            )
        data = data["payload"]
    if not isinstance(data, dict):
        raise TaskContractError(Problem("", "the payload must be an object"))

    payload = None
    wrong = [*_not_json(data), *_contradictions(data)]
    try:
        payload = TaskPayload.model_validate(data)
    except ValidationError as error:
        wrong += [_from_pydantic(each) for each in error.errors(include_url=False)]
    if payload is not None and not wrong:
        return payload
    # Raised out here, so that pydantic's error, which holds the input, is not its context.
    problems: dict[str, Problem] = {}
    ranks: dict[int, dict[Any, int]] = {}
    for at, fault in sorted(wrong, key=lambda each: _position(data, each[0], ranks)):
        path = _dotted(at)
        problems.setdefault(path, Problem(path, f"{path} {fault}"))
    raise TaskContractError(*problems.values())


def parse_any(data: object, *, repository: str | None = None) -> TaskPayload:
    """Read what people write by hand: a queue payload, a `task`, or only its `container`.

    Told apart by their keys. The short forms are completed: nothing is published,
    and a container that stands alone is enabled.

    Parameters
    ----------
    repository
        Name of the repository in the short forms; default `local/workspace`.

    Raises
    ------
    TaskContractError
        Every wrong field at once, or that it has none of the three shapes.
    """
    if isinstance(data, dict):
        if "task" in data or "payload" in data:
            return parse_payload(data)
        if "container" in data:
            return _parse_task(data, repository)
        if "image" in data or "command" in data:
            return _parse_task({"container": _completed(data, enabled=True)}, repository)
    message = (
        'the payload must be an object of one of three shapes: a queue payload with "task", '
        'a task with "container", or a container with "image" and "command"'
    )
    raise TaskContractError(Problem("", message))


def warnings_of(payload: TaskPayload) -> list[str]:
    """Say what in a valid payload is likely a mistake: unknown keys, secrets in the open."""
    container = payload.task.container
    if container is None:
        return []
    place: _Location = ("task", "container")
    parts: dict[_Location, _Spec | None] = {
        place: container,
        (*place, "resources"): container.resources,
        (*place, "workspace"): container.workspace,
        (*place, "artifacts"): container.artifacts,
    }
    unknown = [
        f"{_dotted((*where, key))} is not known{_suggestion(key, part.known())}"
        for where, part in parts.items()
        if part is not None
        for key in part.model_extra or {}
    ]
    in_the_open = [
        f"{_dotted((*place, 'env', name))} looks like a secret: whoever can see the job can read "
        f'its value; use secretEnv, as in "secretEnv": {json.dumps({name: f"env://{name}"})}'
        for name in container.env
        if looks_secret(name)
    ]
    return unknown + in_the_open


def publishable(payload: TaskPayload) -> dict[str, Any]:
    """Give the canonical payload without secrets, fit to be run again.

    The value of an `env` name that looks secret is left out. Who runs the payload
    again has it in a variable of that name: `secretEnv` says `env://NAME`.
    """
    data = payload.canonical()
    container = payload.task.container
    if container is not None and (secret := {name for name in container.env if looks_secret(name)}):
        data["task"]["container"] |= {
            "env": {name: value for name, value in container.env.items() if name not in secret},
            "secretEnv": container.secret_env
            | {name: f"env://{name}" for name in container.env if name in secret},
        }
    return data


def _parse_task(task: dict[str, Any], repository: str | None) -> TaskPayload:
    if task.get("instruction") is None:
        task = _completed(task, instructions="Run the container task")
    task = _completed(task, publish={"mode": PublishMode.NONE.value})
    return parse_payload({"repository": repository or "local/workspace", "task": task})


def _completed(given: dict[str, Any], **defaults: object) -> dict[str, Any]:
    """Add what is absent or null."""
    return given | {name: value for name, value in defaults.items() if given.get(name) is None}


def _suggestion(key: str, known: Iterable[str]) -> str:
    names = {name.lower(): name for name in known}
    near = get_close_matches(key.lower(), names, n=1)
    return f"; did you mean {names[near[0]]}?" if near else ""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            message = f"the JSON has the key {json.dumps(key)} twice in one object"
            raise TaskContractError(Problem("", message))
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise TaskContractError(Problem("", f"the JSON has {name}, which is no number in JSON"))


def _not_json(value: object, at: _Location = ()) -> Iterator[_Wrong]:
    """Find what JSON cannot hold, and text that neither the queue nor a process can."""
    if len(at) > _MAX_DEPTH:
        yield at[:2], f"is nested deeper than {_MAX_DEPTH} levels"
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                yield at, "may only have names that are strings"
            elif fault := _unfit(key):
                yield (*at, key), fault
            else:
                yield from _not_json(item, (*at, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_json(item, (*at, index))
    elif fault := _unfit(value):
        yield at, fault


def _unfit(value: object) -> str | None:
    if isinstance(value, str):
        # PostgreSQL, MoonMind's database, refuses both; so do a process's arguments.
        if "\0" in value:
            return "may not have a NUL character"
        return "may not have half a surrogate pair" if re.search("[\ud800-\udfff]", value) else None
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    return None if isinstance(value, int | float | None) else "must be JSON"


def _contradictions(payload: dict[str, Any]) -> Iterator[_Wrong]:
    """Find fields that are right alone and wrong together.

    In the raw payload: a check in the models would only run once all else is right.
    """
    task = payload.get("task")
    container = task.get("container") if isinstance(task, dict) else None
    if not isinstance(task, dict) or not isinstance(container, dict):
        return
    place: _Location = ("task", "container")
    env = container.get("env")
    secret_env = container.get("secretEnv", container.get("secret_env"))
    if isinstance(env, dict) and isinstance(secret_env, dict):
        for name in secret_env:
            if name in env:
                yield (
                    (*place, "secretEnv", name),
                    "is in task.container.env too: remove one of them",
                )

    volumes = container.get("cacheVolumes", container.get("cache_volumes"))
    targets: set[str] = set()
    for index, volume in enumerate(volumes if isinstance(volumes, list) else []):
        target = volume.get("target") if isinstance(volume, dict) else None
        if isinstance(target, str) and target:
            if (path := _place(target)) in targets:
                yield (*place, "cacheVolumes", index, "target"), "is another volume's target too"
            targets.add(path)

    # As newer servers say; older ones run the container and forget the steps.
    with suppress(ValueError):
        if task.get("steps") and _switch(container.get("enabled")):
            yield ("task", "steps"), "is not supported when task.container.enabled=true"


_SENTENCES = {
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "extra_forbidden": "is not known here: remove it",
    "list_type": "must be a list",
    "missing": "is required",
    "model_type": "must be an object",
    "string_type": "must be a string",
}


def _from_pydantic(error: ErrorDetails) -> _Wrong:
    """Say pydantic's error in our words, which hold none of the input."""
    at, kind = error["loc"], error["type"]
    if at[-1] == "[key]":
        # pydantic's mark of an error that is in a name of an object, not in its value.
        at = at[:-1]
    if kind == "value_error":
        return at, str(error["ctx"]["error"])
    if kind in {"enum", "literal_error"}:
        return at, f"must be {error['ctx']['expected']}"
    if kind == "string_type" and isinstance(error["input"], int | float):
        return at, "must be a string: write it in quotes"
    return at, _SENTENCES.get(kind, "is not valid")


def _position(data: object, at: _Location, ranks: dict[int, dict[Any, int]]) -> list[int]:
    """Say where in the payload a field stands; an absent one stands behind its siblings.

    `ranks` keeps the places of names by object: looked up for each of thousands of
    wrong names in one object, they would take their square in time.
    """
    position = []
    for part in at:
        if isinstance(data, dict):
            if id(data) not in ranks:
                ranks[id(data)] = {name: rank for rank, name in enumerate(data)}
            position.append(ranks[id(data)].get(part, len(data)))
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int):
            position.append(part)
            data = data[part]
    return position


def _dotted(at: _Location) -> str:
    path = ""
    for part in at:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z0-9_-]+", part):
            path += f".{part}" if path else part
        else:
            # Behind a "=" there may be a value, as in `"env": {"KEY=value": ""}`.
            name, equals, _ = part.partition("=")
            path += f"[{json.dumps(name + '=...' if equals else name)}]"
    return path
