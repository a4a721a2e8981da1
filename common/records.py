"""The record of a request: what it cost and how it ended."""

from typing import Literal

import msgspec

Outcome = Literal[
    "ok",
    "client_error",  # the worker answered 4xx
    "cancelled",  # the client left
    "refused",  # the worker answered 503 and ran nothing
    "upstream_error",  # the worker failed before the first byte
    "stream_error",  # 200 was sent, then the stream broke
]


ANSWER_CACHE = "answer-cache"
"""The worker's name in the record of an answer from memory."""


class Record(msgspec.Struct):
    """One request on one worker. Times are seconds; `started_at` is Unix time; tokens are counts."""

    id: str
    """Ours, the same over all attempts of a request; `request_id` may be a client's and come twice."""
    request_id: str
    key: str
    model: str
    route: str
    worker: str
    started_at: float
    adapter: str = ""
    stream: bool = False
    attempt: int = 1
    batch: bool = False
    """Work that can wait; nobody sits before it."""
    outcome: Outcome = "upstream_error"
    status: int = 0
    finish_reason: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    tokens_estimated: bool = False
    trace_id: str = ""
    """Empty: nobody traces."""
    decision_s: float | None = None
    """What the gateway took to choose."""
    ttft_s: float | None = None
    queue_s: float | None = None
    """In the engine's queue; with `prefill_s` and `decode_s` what the engine itself says of a finished request."""
    prefill_s: float | None = None
    decode_s: float | None = None
    duration_s: float = 0.0
