"""What MoonMind's events say of a job's stages. Pure."""

from typing import Any

from moonmind_ext.run.events import Event, Level
from pipelines.payload import PublishMode, TaskPayload

CLAIMED = "Worker claimed job"
PLAN = "moonmind.task.plan"
PREPARE = "moonmind.task.prepare"
EXECUTE = "moonmind.task.execute"
PUBLISH = "moonmind.task.publish"
BRANCHES = "task.git.defaultBranchResolved"
INVALID = "Job payload failed task-contract normalization"
CANCEL_REQUESTED = "Job cancellation requested; stopping"
COMPLETED = "Job completed"
FAILED = "Job failed"
CANCELLED = "Job cancelled"

UPLOADED = "moonmind.task.artifacts"
"""Ours: said only where a file is in parts, or missing."""


def stages_of(payload: TaskPayload) -> list[str]:
    """List the stages that a payload asks for, in their order."""
    stages = [PREPARE, EXECUTE]
    if payload.task.publish.mode is not PublishMode.NONE:
        stages.append(PUBLISH)
    return stages


def describe(job_type: str, payload: TaskPayload) -> dict[str, Any]:
    """Give what MoonMind's events say of every job beside their own subject."""
    skill, runtime = payload.task.skill.id, payload.task.runtime
    path = {"auto": "direct_only", "speckit": "skill"}.get(skill, "direct_fallback")
    return {
        "jobType": job_type,
        "selectedSkill": skill,
        "executionPath": path,
        "usedSkills": skill != "auto",
        "usedFallback": path == "direct_fallback",
        "shadowModeRequested": False,
        "runtimeModel": runtime.model,
        "runtimeEffort": runtime.effort,
    }


def stage_event(stage: str, status: str, payload: dict[str, Any]) -> Event:
    """Make the event of a stage that started, finished or failed."""
    level = Level.ERROR if status == "failed" else Level.INFO
    return Event(stage, {"stage": stage, "status": status, **payload}, level)
