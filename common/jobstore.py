"""Fine-tuning jobs as the jobs service (async) and the trainer (sync) both see them: types, and how they are stored."""

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import msgspec

from common.files import new_id
from common.redis.names import job_key
from common.redis.scripts import MOVE

LEASE_MS = 15_000
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


def pack(fields: dict[str, Any]) -> dict[Any, Any]:
    """A job's fields as redis stores them: JSON, but `status` and `wish` plain, for the scripts to compare."""
    return {name: value if name in ("status", "wish") else json.dumps(value) for name, value in fields.items()}


Kind = TypeVar("Kind", bound=msgspec.Struct)


def unpack(raw: Mapping[Any, Any], kind: type[Kind]) -> Kind:
    """A job or batch from its hash. Raises KeyError for an empty one."""
    if not raw:
        raise KeyError("there is no such thing in redis")
    return msgspec.convert({n: v if n in ("status", "wish") else json.loads(v) for n, v in raw.items()}, kind)


def move_key(key: str, allowed: Iterable[str], **fields: Any) -> tuple[Any, ...]:
    """Arguments of EVAL that set fields if what lives at `key` is in an allowed state.

    EVAL then says 'ok', else the state it is in ('' for nothing there).
    """
    flat = [word for pair in pack(fields).items() for word in pair]
    return MOVE, 1, key, f"|{'|'.join(allowed)}|", *flat


def move(job_id: str, allowed: tuple[Status, ...], **fields: Any) -> tuple[Any, ...]:
    """`move_key` for a fine-tuning job."""
    return move_key(job_key(job_id), allowed, **fields)


def event(message: str, level: str = "info", data: dict[str, Any] | None = None) -> str:
    """One event as it is stored; with `data` a metrics event."""
    return json.dumps(
        {
            "id": new_id("ftevent"),
            "object": "fine_tuning.job.event",
            "created_at": int(time.time()),
            "level": level,
            "message": message,
            "type": "metrics" if data is not None else "message",
            "data": data,
        }
    )


def problem_events(problems: list[dict[str, Any]]) -> list[str]:
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
