"""`/v1/responses` with state, as the gateway sees it: what a response is called, and what its worker is told.

An id ends in the tag of the worker that made the response: that one's prefix cache holds the conversation so far, so
every gateway sends the next turn there, as long as it is not busy. Any other one can serve it (`common/responses`).
"""

import re
from typing import NamedTuple

from common.errors import InvalidRequest
from common.keys import ApiKey
from common.metering.context import Turn
from gateway.arrival import Arrival
from gateway.decode import Ask
from gateway.routing import TAG_CHARS, tag
from gateway.settings import Settings

_ID = re.compile(r"resp_[0-9a-f]{20,64}")


class Wish(NamedTuple):
    """What a request says about state."""

    previous: str
    """The response that it continues; empty: none."""
    store: bool

    @property
    def last(self) -> str:
        """The tag of the worker that had the last turn; empty for a first one."""
        return self.previous[-TAG_CHARS:]


NONE = Wish("", store=False)


def is_response_id(said: str) -> bool:
    """Whether a response here could be called so."""
    return _ID.fullmatch(said) is not None


def read(arrival: Arrival, ask: Ask) -> Wish:
    """What a request to `/v1/responses` wishes; others have no state.

    Raises InvalidRequest for an id that is none, and for ways of keeping state that there are none of here.
    """
    if arrival.route != "responses":
        return NONE
    if bytes(ask.background) not in (b"null", b"false"):
        raise InvalidRequest(
            "background: responses are answered while their client waits; work that can wait is a batch (/v1/batches).",
            param="background",
        )
    if bytes(ask.conversation) != b"null":
        raise InvalidRequest("conversation: continue a response with previous_response_id.", param="conversation")
    if bytes(ask.store) not in (b"null", b"true", b"false"):
        raise InvalidRequest("store: Expected `bool | null`.", param="store", code="invalid_value")
    previous = ""
    if (said := bytes(ask.previous_response_id)) not in (b"null", b'""'):
        previous = said.decode(errors="replace").strip('"')
        if said[:1] != b'"' or not is_response_id(previous):
            raise InvalidRequest(
                f"previous_response_id: {previous[:80]!r} is no id of a response; they begin with resp_.",
                param="previous_response_id", code="previous_response_not_found",
            )
    return Wish(previous, store=bytes(ask.store) != b"false" and not arrival.batch)  # a batch keeps its results itself


def turn_of(wish: Wish, arrival: Arrival, key: ApiKey, worker_id: str, settings: Settings) -> Turn | None:
    """What the worker is told about keeping the response, and about the one that it continues; None: neither."""
    if not wish.store and not wish.previous:
        return None
    return Turn(
        key.id, response_id(arrival.uid, worker_id), wish.previous, wish.store, settings.response_ttl_s,
        settings.responses_max_bytes,
    )


def response_id(uid: str, worker_id: str) -> str:
    """What the response to a request is called."""
    return f"resp_{uid}{tag(worker_id)}"
