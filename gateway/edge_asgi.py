"""The edge for ASGI servers: any decision, and all that takes time: waiting, relaying.

Behind nginx `edge_http.py` answers what it can at once and hands on the rest, begun.
"""

import asyncio
from typing import TYPE_CHECKING

import aiohttp
from loguru import logger

from common import errors
from common.asgi import Message, Receive, Scope, Send, replayed
from common.metering import context, engine_errors
from common.metering.context import CONTEXT
from common.routes import ROUTES
from common.tasks import end_tasks
from common.upstream import Upstream
from gateway.arrival import Arrival, ClientGone
from gateway.attempts import Attempts, Reason
from gateway.decision import Decision, Refuse, Relay, Response
from gateway.path import RequestPath
from gateway.steps import Waiting, start

if TYPE_CHECKING:
    from gateway.tracing import Traced

BEGUN = "owngpt.begun"
"""In a scope: what `edge_http.py` has of a request already, its decision or what will be it."""
FROM_NGINX = "owngpt.from_nginx"
"""In a scope: whether it came over nginx' own socket."""


class AsgiEdge:
    """Carries decisions out."""

    def __init__(self, path: RequestPath, session: aiohttp.ClientSession, worker_token: str) -> None:
        self._path, self._session, self._worker_token = path, session, worker_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            decision = await self._decision(scope, receive)
        except ClientGone:
            return
        if isinstance(decision, Relay):
            await self._relay(decision, scope["path"], scope, receive, send)
        else:
            await respond(decision.response(), send)

    async def _decision(self, scope: Scope, receive: Receive) -> Decision:
        begun: Decision | Waiting | asyncio.Task[Decision] | None = scope.get(BEGUN)
        body = Body(scope, receive, read=begun is not None)
        if begun is None:
            arrival = Arrival(
                scope["method"], scope["path"], dict(scope["headers"]), None, body.read,
                from_nginx=scope.get(FROM_NGINX, False),
            )
            begun = start(self._path.decide(arrival))
        if isinstance(begun, Waiting):
            begun = asyncio.create_task(begun.finish())
        return await unless_gone(begun, body) if isinstance(begun, asyncio.Task) else begun

    async def _relay(self, relay: Relay, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Carry the bytes; on an early failure ask the path again."""
        traced: Traced | None = relay.traced
        try:
            tried = Attempts()
            while True:
                failure = await self._carry(relay, path, scope, receive, send)
                if failure is None:
                    return
                if isinstance(failure, errors.UpstreamFailed):
                    reason: Reason = (
                        "refused" if not failure.ran else "failed" if failure.answered else "died"
                    )
                    address = relay.worker.beat.address
                    tried = Attempts((*tried.tried, address), tried.deaths + failure.ran, reason=reason)
                    decision = self._path.again(relay, path, tried)
                else:
                    decision = self._path.give_up(relay, path, failure)
                if not isinstance(decision, Relay):
                    if traced is not None and isinstance(decision, Refuse):
                        traced.failed(decision.error.status, decision.error.code)
                    await respond(decision.response(), send)
                    return
                relay = decision
        finally:
            if traced is not None:
                traced.end()

    async def _carry(
        self, relay: Relay, path: str, scope: Scope, receive: Receive, send: Send
    ) -> errors.UpstreamFailed | errors.ApiError | None:
        """One attempt. What failed before anything was sent is returned; after that it is raised."""
        sending = Sending(send)
        headers = [(n, v) for n, v in scope["headers"] if n == b"content-type"]
        forwarded = {
            "type": "http", "method": "POST", "path": path,
            "headers": [*headers, (CONTEXT, context.encode(relay.context))],
        }
        upstream = Upstream(self._session, f"http://{relay.worker.beat.address}", self._worker_token)
        try:
            await upstream(forwarded, replayed(relay.body, receive), sending)
        except (errors.UpstreamFailed, errors.ApiError) as failure:
            return failure
        except errors.StreamLost as error:
            if not sending.started:
                return errors.UpstreamFailed(str(error), ran=True)
            last = b"\n\n" + engine_errors.in_stream(ROUTES[path][0]) + b"\n\n"  # after half an event, too
            await sending({"type": "http.response.body", "body": last, "more_body": False})
        except Exception as error:
            if sending.started:
                raise  # half a document: the server cuts the connection
            logger.exception("the relay failed", request_id=relay.context.request_id)
            return errors.ApiError(f"The gateway failed ({type(error).__name__}).")
        return None


class Sending:
    """A `send` that knows whether the response has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def __call__(self, message: Message) -> None:
        self.started = True
        await self._send(message)


async def respond(response: Response, send: Send) -> None:
    """Send a whole response."""
    await send({"type": "http.response.start", "status": response.status, "headers": response.headers})
    await send({"type": "http.response.body", "body": response.body})


class Body:
    """A request's body, read once; and then the connection, which only tells that the client has gone."""

    def __init__(self, scope: Scope, receive: Receive, *, read: bool) -> None:
        self._scope, self._receive = scope, receive
        self._read = asyncio.Event()
        if read:
            self._read.set()

    async def read(self, limit_bytes: int) -> bytes:
        """All of it. Raises BodyTooLarge, ClientGone."""
        for name, value in self._scope["headers"]:
            if name == b"content-length" and int(value) > limit_bytes:
                raise errors.BodyTooLarge(limit_bytes)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit_bytes:
                raise errors.BodyTooLarge(limit_bytes)
            if not message.get("more_body"):
                self._read.set()
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def gone(self) -> None:
        """Until the client has left, once the body is read."""
        await self._read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


async def unless_gone(deciding: "asyncio.Task[Decision]", body: Body) -> Decision:
    """The decision. Raises ClientGone: nobody waits for it any more."""
    leaving = asyncio.create_task(body.gone())
    try:
        await asyncio.wait({deciding, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not deciding.done():
            raise ClientGone
        return deciding.result()
    finally:
        await end_tasks([deciding, leaving])
