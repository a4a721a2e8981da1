"""An ASGI layer around an engine that keeps no responses: it gives the engine the conversation so far, and keeps what
the engine says.

The engine gets every turn whole, so any worker can take any turn. The last event of a stream, and a document, wait
until they are kept: a client that reads `"store": true` can continue from there.
"""

import msgspec
from redis.exceptions import RedisError

from common import errors
from common.asgi import App, Message, Receive, Scope, Send, replayed
from common.metering import sse
from common.metering.context import Turn
from common.metering.rewrite import decode_raw
from common.responses.items import flatten, read_input
from common.responses.store import ResponseStore

TURN = "owngpt.turn"
"""In a scope: the `Turn` that this request is."""
_ENDS = (b'"completed"', b'"incomplete"')
"""With which status a response is kept."""


class Turns:
    """The layer: requests that are a turn get their past, and are kept; everything else passes."""

    def __init__(self, app: App, store: ResponseStore) -> None:
        self._app, self._store = app, store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        turn: Turn | None = scope.get(TURN)
        if turn is None:
            await self._app(scope, receive, send)
            return
        body = (await receive())["body"]
        try:
            items, body = await self._with_past(turn, body)
        except errors.ApiError as error:
            status, headers, said = errors.encode(error)
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": said})
            return
        headers = [(n, v) for n, v in scope["headers"] if n != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", b"%d" % len(body))]}
        await self._app(scope, replayed(body, receive), _Answer(turn, self._store, items, send).on_message)

    async def _with_past(self, turn: Turn, body: bytes) -> tuple[bytes, bytes]:
        """(the items that this turn adds, the body that the engine gets). Raises ApiError."""
        try:
            request = decode_raw(body)
            added = read_input(request["input"])
        except (msgspec.MsgspecError, LookupError, RecursionError):
            return b"[]", body  # the engine refuses it
        past: list[msgspec.Raw] = []
        if turn.previous:
            try:
                past = flatten(await self._store.past(turn))
            except (RedisError, OSError) as error:  # no 503: that would be a worker's failure, and another's turn
                raise errors.Conflict(
                    "The conversation cannot be read now; ask again.", code="state_unavailable", retry_after_s=1
                ) from error
        request.pop("previous_response_id", None)
        request["input"] = msgspec.Raw(msgspec.json.encode([*past, *added]))
        request["request_id"] = msgspec.Raw(b'"%s"' % turn.id.encode())
        return msgspec.json.encode(added), msgspec.json.encode(request)


class _Answer:
    """What the engine says to one turn, on its way to the client."""

    def __init__(self, turn: Turn, store: ResponseStore, items: bytes, send: Send) -> None:
        self._turn, self._store, self._items, self._send = turn, store, items, send
        self._whole = sse.Whole()
        self._start: Message | None = None
        self._document: list[bytes] | None = None
        """The parts of a document; None: a stream, or an error."""
        self._stream = False

    async def on_message(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._stream = sse.is_stream(message["headers"])
            if message["status"] < 400 and not self._stream:
                self._start, self._document = message, []
            else:
                self._stream = self._stream and message["status"] < 400
                await self._send(message)
            return
        chunk, more = message.get("body", b""), message.get("more_body", False)
        if self._document is not None:
            self._document.append(chunk)
            if not more:
                await self._send_document(b"".join(self._document))
            return
        if self._stream:
            chunk = self._whole.take(chunk, more=more)
            if b'"response"' in chunk:
                chunk = b"".join([await self._event(event) + end for event, end in sse.split(chunk)])
            if more and not chunk:
                return
        await self._send({"type": "http.response.body", "body": chunk, "more_body": more})

    async def _send_document(self, body: bytes) -> None:
        start = self._start
        assert start is not None  # noqa: S101 - it comes first
        body = await self._said(msgspec.Raw(body))
        headers = [(n, v) for n, v in start["headers"] if n.lower() != b"content-length"]
        await self._send({**start, "headers": [*headers, (b"content-length", b"%d" % len(body))]})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _event(self, event: bytes) -> bytes:
        """An event with the response in it as ours; any other as it is."""
        try:
            said = decode_raw(sse.data(event))
            kind = msgspec.json.decode(said["type"], type=str)
            said["response"] = msgspec.Raw(await self._said(said["response"]))
        except (msgspec.MsgspecError, LookupError, UnicodeDecodeError, RecursionError):
            return event
        return b"event: %s\ndata: %s" % (kind.encode(), msgspec.json.encode(said))

    async def _said(self, response: msgspec.Raw) -> bytes:
        """A response as ours: its id, what it continues, and whether it is kept, which it is from its end on."""
        turn = self._turn
        try:
            document = decode_raw(response)
        except (msgspec.MsgspecError, RecursionError):
            return bytes(response)
        previous = b'"%s"' % turn.previous.encode() if turn.previous else b"null"
        document |= {"id": msgspec.Raw(b'"%s"' % turn.id.encode()), "previous_response_id": msgspec.Raw(previous),
                     "store": msgspec.Raw(b"true" if turn.store else b"false")}
        said = msgspec.json.encode(document)
        if not turn.store or bytes(document.get("status", b"")) not in _ENDS:
            return said
        if await self._store.save(turn, self._items, said):
            return said
        return msgspec.json.encode({**document, "store": msgspec.Raw(b"false")})
