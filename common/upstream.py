"""The slow path: a program of ours carries a request's bytes, and those of the answer, itself.

The gateway does where no nginx stands before it; `services/worker/front.py` does for an engine without our middleware.
One aiohttp session per process for its whole life; a client that leaves cancels the upstream request, streamed or not,
before or after the first byte.
"""

import asyncio
import contextlib
from collections.abc import Callable

import aiohttp

from common.asgi import Receive, Scope, Send
from common.errors import GatewayTimeout, StreamLost, UpstreamFailed
from common.metering.context import CONTEXT, TRACEPARENT

TIMEOUT = 504
FAILURES = (500, 502, 503, TIMEOUT)
"""A worker's answers after which another one is asked; nginx' `error_page` says the same. 503: it took nothing on."""
_PASSED = {b"content-type", b"x-request-id", CONTEXT, TRACEPARENT}
OURS_RETURNED = frozenset(("content-type", "server-timing", "x-request-id", "x-owngpt-worker", "x-owngpt-cache"))
"""Headers of a worker's answer that its client gets."""
THEIRS_RETURNED = frozenset(("content-type", "retry-after"))
"""The same of a server that is none of ours: its other names mean nothing here, or something else."""
MAX_ERROR_BYTES = 64 * 1024
Judge = Callable[[int, bytes], int]
"""(status, body) of an error -> the status that it is taken for: a server's 500 may be a client's mistake."""
MAX_UPSTREAM_CONNECTIONS = 4096


def open_session(connect_timeout_s: float, read_timeout_s: float, *, reuse: bool = True) -> aiohttp.ClientSession:
    """The process's client session; close it at the end of the lifespan. `read_timeout_s`: the longest silence.

    `reuse`: whether connections are used again. Who answers must keep them longer than we do: a request on one that is
    being closed looks like a worker that died.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=MAX_UPSTREAM_CONNECTIONS, **({"keepalive_timeout": 4} if reuse else {"force_close": True})
        ),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s, sock_read=read_timeout_s),
        auto_decompress=False,
        headers={"Accept-Encoding": "identity"},  # the bytes are read on their way
        cookie_jar=aiohttp.DummyCookieJar(),  # one client's are not another's
    )


class Upstream:
    """An ASGI app that is the server at a URL: it forwards the request and sends back what comes.

    Raises UpstreamFailed when the worker fails before anything was sent; afterwards StreamLost in a stream, ClientError
    in anything else. GatewayTimeout: silence beyond the read timeout.
    """

    def __init__(
        self, session: aiohttp.ClientSession, url: str, token: str, *, returned: frozenset[str] = OURS_RETURNED,
        judge: Judge | None = None,
    ) -> None:
        self._session, self._url, self._returned, self._judge = session, url, returned, judge
        self._authorization = f"Bearer {token}" if token else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive()).get("body", b"")
        forward = asyncio.create_task(self._forward(scope, body, send))
        leave = asyncio.create_task(_until_disconnect(receive))
        try:
            await asyncio.wait({forward, leave}, return_when=asyncio.FIRST_COMPLETED)
            if forward.done():
                await forward
        finally:
            for task in (forward, leave):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _forward(self, scope: Scope, body: bytes, send: Send) -> None:
        headers = {n.decode("latin-1"): v.decode("latin-1") for n, v in scope["headers"] if n in _PASSED}
        if self._authorization:
            headers["Authorization"] = self._authorization
        sent = stream = False
        try:
            async with self._session.post(
                self._url + scope["path"], data=body, headers=headers, allow_redirects=False
            ) as response:
                status, error = response.status, b""
                if self._judge is not None and status >= 300:
                    error = await read(response, MAX_ERROR_BYTES)
                    status = self._judge(status, error)
                if status == TIMEOUT:
                    raise GatewayTimeout("The worker did not answer in time.")
                if status in FAILURES:
                    raise UpstreamFailed(f"status {response.status}", ran=status != 503, answered=True)
                stream = response.content_type == "text/event-stream"
                start = {
                    "type": "http.response.start",
                    "status": status,
                    "headers": [
                        (n.lower().encode(), v.encode("latin-1"))
                        for n, v in response.headers.items()
                        if n.lower() in self._returned or (n.lower() == "content-length" and not stream)
                    ],
                }
                if error:
                    sent = True
                    await send(start)
                    await send({"type": "http.response.body", "body": error, "more_body": True})
                async for chunk in response.content.iter_any():
                    if not sent:
                        sent = True
                        await send(start)
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                if not sent:
                    await send(start)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (aiohttp.ClientError, TimeoutError) as error:
            if sent and stream:
                raise StreamLost(type(error).__name__) from error
            if sent:
                raise  # half a document: the server cuts the connection
            if isinstance(error, aiohttp.SocketTimeoutError):
                raise GatewayTimeout("The worker did not answer in time.") from error
            refused = isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError))
            raise UpstreamFailed(type(error).__name__, ran=not refused) from error


async def read(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    """A body, or its beginning: at least so many bytes of it. Raises ClientError."""
    parts: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        parts.append(chunk)
        size += len(chunk)
        if size >= limit_bytes:
            break
    return b"".join(parts)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
