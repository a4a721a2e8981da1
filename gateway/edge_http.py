"""The edge towards nginx: uvicorn's own HTTP/1.1 protocol, which answers decisions as soon as the last byte is in.

A request to a hot route whose decision needs nothing awaited is answered from the parser's callback: no task, no ASGI
scope, no turn of the event loop. Everything else, the relay and whatever waits among it, goes on as an ASGI request on
the same connection.
"""

import asyncio
import socket
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from common.routes import ROUTES
from gateway.arrival import Arrival
from gateway.decision import Relay, Response
from gateway.edge_asgi import BEGUN, FROM_NGINX
from gateway.steps import Waiting, start

if TYPE_CHECKING:
    from gateway.app import Gateway

_HOT = {path.encode(): path for path in ROUTES}


class DecisionProtocol(HttpToolsProtocol):
    """One connection. What comes over a unix socket comes from nginx, which limits, times and buffers its clients."""

    app: "Gateway"
    _parts: list[bytes] | None = None
    """The body of a request that may be answered here; None for all others."""
    _last = False
    """Told to stop in the middle of a request: the connection ends after it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._from_nginx = transport.get_extra_info("socket").family == socket.AF_UNIX

    def on_message_begin(self) -> None:
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
        if begun is None or isinstance(begun, Waiting | Relay):
            self._go_on_as_asgi(body, begun)
            super().on_message_complete()
            return
        self._parts = None
        self.server_state.total_requests += 1
        self.transport.write(encode(begun.response()))  # no timer for the idle: nginx closes its own connections
        if self._last:
            self.transport.close()

    def shutdown(self) -> None:
        if self._parts is None:
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
