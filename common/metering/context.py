"""What the gateway tells whoever meters a request: one header, one JSON object.

The gateway makes it with its decision. nginx hands it to the worker, and back to the gateway when that worker fails, so
a request keeps its `uid` over every attempt. A client cannot send it: nginx passes none of a client's on.
"""

import msgspec

CONTEXT = b"x-owngpt-context"
TRACEPARENT = b"traceparent"
"""W3C Trace Context: `00-{trace id}-{span id}-{flags}`."""


class Keep(msgspec.Struct, frozen=True, omit_defaults=True):
    """Store the answer, if it is a good one, under `name` for `ttl_s`.

    Only the worker with the id `worker` may: another one at its address may serve another model by now.
    """

    name: str
    ttl_s: int
    worker: str
    max_bytes: int


class Turn(msgspec.Struct, frozen=True, omit_defaults=True):
    """The request is a turn of a conversation: what `common/responses` keeps, and for whom."""

    owner: str
    """Whose conversations: an API key's id."""
    id: str
    """What the response is called."""
    previous: str
    """The response that it continues; empty: none."""
    store: bool
    ttl_s: int
    max_bytes: int
    """For all responses of this owner together."""


class Context(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request as the gateway decided it."""

    uid: str
    """Ours, unique, the same over all attempts."""
    request_id: str
    """The client's label; it may come twice."""
    key: str
    """Who pays: an API key's id."""
    attempt: int = 1
    salt: str = ""
    """Divides the engine's KV blocks by cache scope."""
    model: str = ""
    """What the body's model, an alias, stands for; empty: itself."""
    batch: bool = False
    """Work that can wait."""
    decision_s: float = 0.0
    reason: str = ""
    """Why this worker, for Server-Timing."""
    traceparent: str = ""
    """Empty: nobody traces."""
    keep: Keep | None = None
    turn: Turn | None = None


encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Context).decode


def decode(raw: bytes) -> Context | None:
    """The context in a header; None when it is none of ours."""
    try:
        return _decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
