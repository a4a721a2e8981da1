"""A batch: what is asked for, what is stored, what is shown."""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field

State = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
OVER: tuple[State, ...] = ("failed", "completed", "expired", "cancelled")
UNFINISHED: tuple[State, ...] = ("validating", "in_progress", "finalizing", "cancelling")


class CreateBatch(BaseModel):
    """The body of POST /v1/batches."""

    model_config = ConfigDict(extra="forbid")
    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )


class Batch(msgspec.Struct, kw_only=True):
    """A batch. `results` and `failures` are the ids its files have from the start and show at the end."""

    id: str
    owner: str
    status: State
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    results: str
    failures: str
    ends: Literal["", "completed", "expired", "cancelled", "failed"] = ""
    """How it will have ended, once that is sure."""
    metadata: dict[str, str] | None = None
    model: str | None = None
    errors: list[dict[str, Any]] = []
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: dict[str, int] = {}

    def public(self) -> dict[str, object]:
        """In OpenAI's shape (openai.types.Batch)."""
        shown: dict[str, object] = msgspec.to_builtins(self)
        for private in ("owner", "ends", "results", "failures", "total", "completed", "failed"):
            shown.pop(private)
        used = self.usage or {"input_tokens": 0, "output_tokens": 0, "cached_tokens": 0}
        return shown | {
            "object": "batch",
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": {
                "input_tokens": used["input_tokens"],
                "input_tokens_details": {"cached_tokens": used["cached_tokens"]},
                "output_tokens": used["output_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["input_tokens"] + used["output_tokens"],
            },
        }
