"""`/v1/responses` with state, as the gateway sees it: what a response is called, and what its worker is told.

An id ends in the tag of the worker that made the response: that one's prefix cache holds the conversation so far, so
every gateway sends the next turn there, as long as it is not busy. Any other one can serve it (`common/responses`).
"""

import re

from common.errors import InvalidRequest
from common.keys import ApiKey
from common.metering.context import Turn
from gateway.arrival import Arrival
from gateway.decode import Ask
from gateway.routing import TAG_CHARS, tag
from gateway.settings import Settings

_ID = re.compile(r"resp_[0-9a-f]{20,64}")


def is_response_id(said: str) -> bool:
    """Whether a response here could be called so."""
    return _ID.fullmatch(said) is not None


def last_tag(ask: Ask) -> str:
    """The tag of the worker that had the last turn; empty for a first one."""
    return (ask.previous_response_id or "")[-TAG_CHARS:]


def turn_of(arrival: Arrival, ask: Ask, key: ApiKey, worker_id: str, settings: Settings) -> Turn | None:
    """What the worker is told about keeping the response, and about the one that it continues; None: neither.

    Raises InvalidRequest for an id that is none, and for ways of keeping state that there are none of here.
    """
    if arrival.route != "responses":
        return None
    if ask.background:
        raise InvalidRequest(
            "background: responses are answered while their client waits; work that can wait is a batch (/v1/batches).",
            param="background",
        )
    if bytes(ask.conversation) != b"null":
        raise InvalidRequest("conversation: continue a response with previous_response_id.", param="conversation")
    previous = ask.previous_response_id or ""
    if previous and not is_response_id(previous):
        raise InvalidRequest(
            f"previous_response_id: {previous[:80]!r} is no id of a response; they begin with resp_.",
            param="previous_response_id", code="previous_response_not_found",
        )
    store = ask.store is not False and not arrival.batch  # a batch keeps its results itself
    if not store and not previous:
        return None
    name = f"resp_{arrival.uid}{tag(worker_id)}"
    return Turn(key.id, name, previous, store, settings.response_ttl_s, settings.responses_max_bytes)
