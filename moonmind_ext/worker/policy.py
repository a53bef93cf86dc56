"""What a worker refuses before it begins. Pure."""

from fnmatch import fnmatchcase
from typing import Any

from moonmind_ext.worker.settings import TASK

_OUR_FILES = {"logs", "task_context.json", "publish_result.json"}

_OFF = {"", "0", "false", "no", "off", "none"}


def foreign_reason(job_type: str, payload: Any) -> str | None:
    """Say why a job is not one for this worker; None for a container task, valid or not."""
    if job_type != TASK:
        return f"this worker runs container tasks only, and the job's type is {job_type!r}"
    task = payload.get("task") if isinstance(payload, dict) else None
    container = task.get("container") if isinstance(task, dict) else None
    enabled = container.get("enabled") if isinstance(container, dict) else None
    if str(enabled).strip().lower() in _OFF:
        return "this worker runs container tasks only, and task.container is not enabled"
    return None


def image_refusal(image: str, allowed: tuple[str, ...]) -> str | None:
    """Say why an image may not be run here; None where it may.

    Parameters
    ----------
    image
        As in a payload. A pattern may be for it as it stands, or spelled out with
        registry and tag: both name the same image.
    """
    forms = {image, _with_tag(image), _with_registry(image), _with_tag(_with_registry(image))}
    if _with_registry(image) == image:
        # A pattern without one means an image of Docker's hub: `python:*` is not for
        # `python:5000/tool`, where a registry just looks like that.
        allowed_here = [each for each in allowed if "/" in each or each.startswith("*")]
    else:
        allowed_here = list(allowed)
    if any(fnmatchcase(form, pattern) for form in forms for pattern in allowed_here):
        return None
    return (
        f"task.container.image: {image} is not allowed on this worker; allowed are "
        f"{', '.join(allowed)}"
    )


def subdir_refusal(subdir: str) -> str | None:
    """Say why artifacts may not go to a directory; None where they may."""
    first = subdir.partition("/")[0]
    if first not in _OUR_FILES:
        return None
    return f"task.container.artifactsSubdir: {first} is where the worker keeps files of its own"


def secret_refusal(name: str, reference: str, allowed: tuple[str, ...]) -> str | None:
    """Say why a payload's secret is not resolved here; None where it may be."""
    # Whatever is allowed: the worker's own environment is in there.
    is_kernels = reference.startswith(("file:///proc/", "file:///sys/"))
    if not is_kernels and any(fnmatchcase(reference, pattern) for pattern in allowed):
        return None
    return (
        f"task.container.secretEnv.{name}: {reference} is not allowed on this worker; "
        f"MOONMIND_WORKER_ALLOWED_SECRETS allows {', '.join(allowed) or 'none'}"
    )


def _with_registry(image: str) -> str:
    """Spell out what Docker leaves unsaid of an image on its own hub."""
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return image
    return f"docker.io/{image if slash else f'library/{image}'}"


def _with_tag(image: str) -> str:
    return image if "@" in image or ":" in image.rpartition("/")[2] else f"{image}:latest"
