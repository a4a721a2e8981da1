"""Fine-tuning jobs as the jobs service and the trainer both see them, and what the two say to each other.

The trainer asks (POST, JSON, `Authorization: Bearer` with the trainer's token; nginx lets nobody else in):

    /internal/tuning/lease           Wanted -> Leased, or 204: nothing to do
    /internal/tuning/jobs/{id}       Report -> Wish; 409: the job is somebody else's now
    /internal/tuning/jobs/{id}/end   End    -> Wish: what was wished meanwhile, and the job has not ended; else ended
    /internal/tuning/unfinished      -> the ids of all jobs that are not over
"""

import time
from typing import Any, Literal

import msgspec

from common.files import File, new_id

LEASE_S = 15.0
MAX_EVENTS = 20_000
MAX_ERROR_EVENTS = 1000
Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
FINISHED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")


class Job(msgspec.Struct, kw_only=True):
    """A fine-tuning job. `wish` is what its owner asked for and the trainer has not done yet."""

    id: str
    owner: str
    status: Status
    created_at: int
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int
    hyperparameters: dict[str, Any]
    metadata: dict[str, str] | None = None
    wish: Literal["", "cancel", "pause"] = ""
    fine_tuned_model: str | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    trained_tokens: int | None = None
    result_files: list[str] = []
    error: dict[str, Any] | None = None

    def public(self) -> dict[str, object]:
        """In OpenAI's shape (openai.types.fine_tuning.FineTuningJob), which knows no `paused`: such a job is queued."""
        return {
            "id": self.id,
            "object": "fine_tuning.job",
            "created_at": self.created_at,
            "model": self.model,
            "status": "queued" if self.status == "paused" else self.status,
            "paused": self.status == "paused",
            "training_file": self.training_file,
            "validation_file": self.validation_file,
            "seed": self.seed,
            "hyperparameters": self.hyperparameters,
            "method": {"type": "supervised", "supervised": {"hyperparameters": self.hyperparameters}},
            "metadata": self.metadata,
            "organization_id": "owngpt",
            "integrations": [],
            "fine_tuned_model": self.fine_tuned_model,
            "finished_at": self.finished_at,
            "estimated_finish": self.estimated_finish,
            "trained_tokens": self.trained_tokens,
            "result_files": self.result_files,
            "error": self.error,
            "user_provided_suffix": self.suffix,
        }


class Wanted(msgspec.Struct):
    """A trainer asks for work."""

    model: str
    """The base it trains, by the name that clients use."""


class Leased(msgspec.Struct):
    """A job in work. `token` proves it, until somebody else has it."""

    job: Job
    token: str


class Report(msgspec.Struct):
    """What a run has said since the last report. Renews the lease."""

    token: str
    number: int
    """Of this lease; a report that is sent twice is taken once."""
    events: list[dict[str, Any]] = []
    checkpoints: list[dict[str, Any]] = []
    hyperparameters: dict[str, Any] | None = None
    estimated_finish: int | None = None


class End(msgspec.Struct):
    """The lease ends: with the job, or ("paused", "running") before it. "running": whoever comes next goes on."""

    token: str
    status: Literal["succeeded", "failed", "cancelled", "paused", "running"]
    error: dict[str, Any] | None = None
    fine_tuned_model: str | None = None
    trained_tokens: int | None = None
    file: File | None = None
    """A file of results, whose bytes are in place."""


class Wish(msgspec.Struct):
    """What the job's owner wants of it."""

    wish: Literal["", "cancel", "pause"] = ""


def event(message: str, level: str = "info", data: dict[str, Any] | None = None) -> dict[str, Any]:
    """One event in OpenAI's shape; with `data` a metrics event."""
    return {
        "id": new_id("ftevent"),
        "object": "fine_tuning.job.event",
        "created_at": int(time.time()),
        "level": level,
        "message": message,
        "type": "metrics" if data is not None else "message",
        "data": data,
    }


def problem_events(problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One event a problem, so that every bad line is named."""
    shown = [
        event(
            f"{p['param']}, line {p.get('line', 0)}, {p.get('path') or 'row'}: {p.get('message', '')} ({p['code']})",
            "error",
        )
        for p in problems[:MAX_ERROR_EVENTS]
    ]
    if len(problems) > MAX_ERROR_EVENTS:
        shown.append(event(f"… and {len(problems) - MAX_ERROR_EVENTS} more problems", "error"))
    return shown


def invalid_file(problems: list[dict[str, Any]], summary: str) -> dict[str, str]:
    """The error of a job whose files are at fault."""
    param = problems[0]["param"]
    return {"code": f"invalid_{param}", "param": param, "message": summary}
