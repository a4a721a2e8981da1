"""A request as an edge hands it to the path, and what the path finds out about it."""

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from common.routes import ROUTES

if TYPE_CHECKING:
    from gateway.tracing import Traced

Read = Callable[[int], Awaitable[bytes]]
"""Reads a body up to a limit in bytes. Raises BodyTooLarge, ClientGone."""


class ClientGone(Exception):
    """The client has left: nobody waits for a decision any more."""


class Arrival:
    """A request as it came, before anybody looked at it; and what the steps find out about it, one after the other."""

    __slots__ = (
        "answer", "attempt", "batch", "body", "from_nginx", "headers", "method", "path", "payer", "read", "request_id",
        "route", "started", "traced", "uid",
    )

    def __init__(
        self, method: str, path: str, headers: Mapping[bytes, bytes], body: bytes | None, read: Read | None = None,
        *, from_nginx: bool = False,
    ) -> None:
        self.started = time.perf_counter()
        self.from_nginx = from_nginx
        """Whether it came over nginx' own socket: nginx then carries the bytes, and tells of earlier attempts."""
        self.method, self.path, self.headers, self.body, self.read = method, path, headers, body, read
        self.route = ROUTES[path][0]
        self.uid = self.request_id = ""
        self.attempt, self.batch = 1, False
        self.payer = ""
        """Who pays, if it is not the key that asks."""
        self.answer: str | None = None
        """The question that an earlier attempt of this request leads."""
        self.traced: Traced | None = None
