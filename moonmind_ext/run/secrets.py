"""The values behind a payload's secret references."""

from collections.abc import Mapping
from pathlib import Path

from pipelines.payload import parse_secret_reference


class SecretError(Exception):
    """References that have no value here; one line for each, naming its field."""


def resolve_secrets(
    references: Mapping[str, str], *, environment: Mapping[str, str], given: Mapping[str, str]
) -> dict[str, str]:
    """Find the value of every reference.

    Parameters
    ----------
    references
        By variable name, as in `secretEnv`.
    environment
        Where `env://` looks.
    given
        Values by name, from an env file; they win. A `vault://` reference, which
        only the worker resolves, is looked up in here by the variable's own name.

    Raises
    ------
    SecretError
        When some have no value.
    """
    values: dict[str, str] = {}
    problems: list[str] = []
    for name, text in references.items():
        field = f"task.container.secretEnv.{name}"
        reference = parse_secret_reference(text)
        if reference.scheme == "env":
            value = given.get(reference.location, environment.get(reference.location))
            missing = f"the variable {reference.location} is not set"
            if value is not None and not _is_utf8(value):
                value, missing = None, f"the variable {reference.location} is not UTF-8"
        elif reference.scheme == "file":
            value, missing = _read(Path(reference.location))
        else:
            value = given.get(name)
            missing = f"only the worker resolves {text}; give {name} in an env file"
        if value is None:
            problems.append(f"{field}: {missing}")
        else:
            values[name] = value
    if problems:
        raise SecretError("\n".join(problems))
    return values


def read_env_file(path: Path) -> dict[str, str]:
    """Read `NAME=VALUE` lines: values verbatim, `#` comments, as for `docker run --env-file`.

    Docker's lines of a bare `NAME`, for a variable of the environment, are refused:
    `env://` finds it there anyway, and the line may be half of a broken value.

    Raises
    ------
    SecretError
        When it cannot be read or a line is no pair; the line's text is not repeated.
    """
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise SecretError(f"env file {path}: {_why(error)}") from error
    values: dict[str, str] = {}
    # Not splitlines, which also splits at what may be part of a value.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, equals, value = line.removesuffix("\r").partition("=")
        if not equals or not name.strip():
            raise SecretError(
                f"env file {path}, line {number}: must be NAME=VALUE; "
                "what is in the environment need not be named here"
            )
        values[name.strip()] = value
    return values


def _read(path: Path) -> tuple[str | None, str]:
    try:
        # Not read_text, which would change the line ends within. Files of secrets
        # mostly end with one that is not part of it.
        return path.read_bytes().decode().removesuffix("\n").removesuffix("\r"), ""
    except (OSError, UnicodeDecodeError) as error:
        return None, f"the file {path} cannot be read: {_why(error)}"


def _is_utf8(value: str) -> bool:
    """Whether a variable was UTF-8: if not, Python has put surrogates in it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _why(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "is not UTF-8"
