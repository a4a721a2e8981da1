"""The edge towards nginx: uvicorn's own HTTP/1.1 protocol, which answers decisions as soon as the last byte is in.

A request to a hot route is answered from the parser's callback when its decision needs nothing awaited, else as soon as
the decision is there: no ASGI scope, one write. Everything else, the relay among it, goes on as an ASGI request on the
same connection.
"""

import asyncio
import socket
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from loguru import logger
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from common.routes import ROUTES
from common.tasks import end_tasks
from gateway.arrival import Arrival
from gateway.decision import Decision, Relay, Response
from gateway.edge_asgi import BEGUN, FROM_NGINX
from gateway.steps import Waiting, start

if TYPE_CHECKING:
    from gateway.app import Gateway

T = TypeVar("T")
_HOT = {path.encode(): path for path in ROUTES}


class DecisionProtocol(HttpToolsProtocol):
    """One connection. What comes over a unix socket comes from nginx, which limits, times and buffers its clients."""

    app: "Gateway"
    _parts: list[bytes] | None = None
    """The body of a request that may be answered here; None for all others."""
    _deciding: "asyncio.Task[Decision] | None" = None
    """The decision about `_body`, which waits for something."""
    _body = b""
    _last = False
    """Told to stop in the middle of a request: the connection ends after it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._from_nginx = transport.get_extra_info("socket").family == socket.AF_UNIX

    def connection_lost(self, exc: Exception | None) -> None:
        if (deciding := self._deciding) is not None:  # nobody waits for it any more
            self._deciding = None
            self._hold(end_tasks([deciding]))
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        if (deciding := self._deciding) is not None:  # pipelined: uvicorn answers one after the other
            self._deciding = None
            self._go_on_as_asgi(self._body, deciding)
            super().on_message_complete()
            self._body = b""
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._parts = None

    def on_headers_complete(self) -> None:
        if (
            self._from_nginx and self.url in _HOT and self.app.path is not None
            and (self.cycle is None or self.cycle.response_complete)  # else it is pipelined: one after the other
            and self.parser.get_method() == b"POST" and self.parser.should_keep_alive()
            and not (self.expect_100_continue or self.parser.should_upgrade() or self.flow.write_paused)
        ):
            self._parts, self._size_bytes = [], 0
        else:
            self._go_on_as_asgi()

    def on_body(self, body: bytes) -> None:
        if self._parts is None:
            super().on_body(body)
            return
        self._parts.append(body)
        self._size_bytes += len(body)
        if self._size_bytes > self.app.settings.max_body_bytes:  # refused there, with all that is still to come
            self._go_on_as_asgi(b"".join(self._parts))

    def on_message_complete(self) -> None:
        if self._parts is None:
            super().on_message_complete()
            return
        parts = self._parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        path, begun = self.app.path, None
        if path is not None:
            begun = start(path.decide(Arrival("POST", _HOT[self.url], dict(self.headers), body, from_nginx=True)))
        if isinstance(begun, Waiting):
            self._parts, self._body = None, body
            self._deciding = self._hold(begun.finish())
            self._deciding.add_done_callback(self._decided)
        else:
            self._answer(begun, body)

    def _decided(self, deciding: "asyncio.Task[Decision]") -> None:
        """What had to wait is there."""
        if self._deciding is not deciding:
            return  # the client has left, or ASGI took it over
        self._deciding = None
        try:
            self._answer(deciding.result(), self._body)
        except (Exception, asyncio.CancelledError):  # nobody else would answer: nginx shall not wait for it
            logger.exception("a decision was not answered")
            self.transport.close()

    def _hold(self, work: "Coroutine[Any, Any, T]") -> "asyncio.Task[T]":
        """Do it beside everything else. At its end the server waits for it, for a while."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)  # type: ignore[arg-type]  # uvicorn's own return nothing
        task.add_done_callback(self.tasks.discard)
        return task

    def _answer(self, decision: Decision | None, body: bytes) -> None:
        self._parts, self._body = None, b""
        if decision is None or isinstance(decision, Relay):
            self._go_on_as_asgi(body, decision)
            super().on_message_complete()
            return
        self.server_state.total_requests += 1
        self.transport.write(encode(decision.response()))  # no timer for the idle: nginx closes its own connections
        if self._last:
            self.transport.close()

    def shutdown(self) -> None:
        if self._parts is None and self._deciding is None:
            super().shutdown()
        else:
            self._last = True

    def _go_on_as_asgi(self, body: bytes = b"", begun: Any = None) -> None:
        """uvicorn's way from here on, with what is here already."""
        self._parts = None
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
        scope: Any = self.scope  # its type knows no extensions
        scope[FROM_NGINX] = self._from_nginx
        if begun is not None:
            scope[BEGUN] = begun
        super().on_headers_complete()
        if self._last:
            self.cycle.keep_alive = False
        if body:
            super().on_body(body)


def encode(response: Response) -> bytes:
    """A whole response as HTTP/1.1 has it."""
    parts = [STATUS_LINE[response.status]]
    for name, value in response.headers:
        parts += (name, b": ", value, b"\r\n")
    parts += (b"\r\n", response.body)
    return b"".join(parts)
