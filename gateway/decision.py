"""What a request leads to. A decision is a value: the path makes it, an edge carries it out.

    Refuse       an error
    Replay       an answer from memory
    Accelerate   nginx is told which worker gets the original request (X-Accel-Redirect)
    Relay        this gateway carries the bytes: no nginx in front
"""

from typing import TYPE_CHECKING, NamedTuple

from common import errors
from common.answers.store import HEADER, HIT
from common.metering import context
from common.metering.context import CONTEXT, Context
from common.records import ANSWER_CACHE
from common.workers import Worker
from gateway.decode import Ask

if TYPE_CHECKING:
    from gateway.tracing import Traced

Headers = list[tuple[bytes, bytes]]


class Response(NamedTuple):
    """A whole response."""

    status: int
    headers: Headers
    body: bytes


class Refuse(NamedTuple):
    """The request goes nowhere."""

    error: errors.ApiError
    request_id: str
    route: str = ""

    def response(self) -> Response:
        """As the client sees it."""
        status, headers, body = errors.encode(self.error, self.route)
        return Response(status, [*headers, (b"x-request-id", self.request_id.encode("latin-1"))], body)


class Replay(NamedTuple):
    """The same was asked before."""

    request_id: str
    stream: bool
    body: bytes
    took_s: float

    def response(self) -> Response:
        """As the client sees it."""
        kind = b"text/event-stream; charset=utf-8" if self.stream else b"application/json"
        return Response(200, [
            (b"content-type", kind), (b"content-length", b"%d" % len(self.body)), (HEADER, HIT),
            (b"x-request-id", self.request_id.encode("latin-1")), (b"x-owngpt-worker", ANSWER_CACHE.encode()),
            (b"server-timing", b'gateway;dur=%.2f;desc="answer"' % (self.took_s * 1e3)),
        ], self.body)


class Accelerate(NamedTuple):
    """nginx proxies the request to a worker."""

    worker: Worker
    context: Context

    def response(self) -> Response:
        """As nginx sees it."""
        return Response(200, [
            (b"x-accel-redirect", b"@worker"), (b"x-worker", self.worker.beat.address.encode()),
            (CONTEXT, context.encode(self.context)), (b"content-length", b"0"),
        ], b"")


class Relay(NamedTuple):
    """This gateway proxies the request to a worker; on an early failure the path decides again."""

    worker: Worker
    context: Context
    ask: Ask
    body: bytes
    cache_scope: str
    traced: "Traced | None"


Decision = Refuse | Replay | Accelerate | Relay
