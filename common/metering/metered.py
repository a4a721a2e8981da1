"""One ASGI middleware that sees what a request cost and how it ended.

Mounted twice, in a worker both times: around vLLM's app, and in the front before engines that cannot carry it
(`services/worker/front.py`). Everything that needs an answer's bytes happens here, once per request:

    in     the gateway's context; one rewriting of the body: an alias becomes its model, usage is asked for, the salt
    out    the response start is held until the first byte exists, so that a worker that dies in prefill can still be
           replaced; usage that only we asked for is hidden; an engine's error texts become ours; an answer worth
           keeping is stored
    inside `/v1/responses` gets its state (`common/responses/turns.py`)
    end    one `Record`

Per streamed chunk it looks for a few byte patterns and reads no clock; the budget is 2 microseconds.
"""

import secrets
import time
from collections.abc import Collection

from loguru import logger

from common.answers.keeping import Keeping
from common.answers.store import BYPASS, HEADER, MISS, Store
from common.asgi import App, Message, Receive, Scope, Send
from common.errors import ApiError, StreamLost, UpstreamFailed
from common.metering import context, engine_errors, sse, usage
from common.metering.context import CONTEXT, TRACEPARENT, Context
from common.metering.meter import Meter
from common.metering.rewrite import read_wants, rewrite
from common.records import Record
from common.responses.store import ResponseStore
from common.responses.turns import TURN, Turns
from common.routes import ENGINE_PATHS, ROUTES

MAX_ERROR_BYTES = 64 * 1024
BATCH_PRIORITY = b"100"
"""vLLM: a larger number waits longer."""
_USAGE_ROUTES = ("chat", "completions")
_FROM_THE_GATEWAY = (CONTEXT, TRACEPARENT, b"x-request-id", b"x-vllm-priority", b"content-length")
"""Headers that are made anew for the engine."""


class Metering:
    """The middleware. `worker` names whose requests these are; other paths pass through untouched.

    `salted`: the routes on which the engine takes a `cache_salt`. `priority`: whether it lets batches wait.
    `store`: where answers worth keeping go; `responses`: where `/v1/responses` has its state.
    """

    def __init__(
        self, app: App, meter: Meter, worker: str, *, salted: Collection[str] = (), priority: bool = False,
        store: Store | None = None, responses: ResponseStore | None = None,
    ) -> None:
        self.app, self.meter, self.worker, self.store = app, meter, worker, store
        self.salted, self.priority = salted, priority
        self.engine = app if responses is None else Turns(app, responses)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in ROUTES or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        await _Metered(self, scope, receive, send).run()


class _Metered:
    """One request on its way."""

    def __init__(self, mount: Metering, scope: Scope, receive: Receive, send: Send) -> None:
        self.mount, self.scope, self.path = mount, scope, scope["path"]
        self._receive, self._send = receive, send
        self.started = time.monotonic()
        headers = dict(scope["headers"])
        told = context.decode(headers[CONTEXT]) if CONTEXT in headers else None
        own = secrets.token_hex(8)
        self.told = told or Context(own, headers.get(b"x-request-id", own.encode()).decode("latin-1"), "-")
        self.record = Record(
            id=self.told.uid, request_id=self.told.request_id, key=self.told.key, model="",
            route=ROUTES[self.path][0], worker=mount.worker, started_at=time.time(), attempt=self.told.attempt,
            batch=self.told.batch, trace_id=self.told.traceparent[3:35], decision_s=self.told.decision_s or None,
        )
        self.keeping: Keeping | None = None
        keep = self.told.keep
        if keep is not None and mount.store is not None and keep.worker == mount.worker:
            self.keeping = Keeping(mount.store, keep, self.record.route, send)
            self._send = self.keeping.send
        self.body: bytes | None = None
        self.hide_usage = False
        self.start: Message | None = None
        self.start_sent = self.gone = self.finished = False
        self.events = 0
        self.kept: list[bytes] = []
        self.whole = sse.Whole()

    async def run(self) -> None:
        body = await self._read_body()
        if body is None:
            return
        self._prepare(body)
        self.mount.meter.begin(self.record)
        try:
            await self.mount.engine(self.scope, self._receive_body, self._on_message)
        except UpstreamFailed as error:
            self.record.status = 502 if error.ran else 503
            raise
        except StreamLost as error:
            if not self.start_sent:  # not one event: somebody else may answer
                self.record.status = 502
                raise UpstreamFailed(str(error), ran=True) from error
            self.record.outcome = "stream_error"  # its half event is nobody's
            last = engine_errors.in_stream(self.record.route) + b"\n\n"
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
        except ApiError as error:
            self.record.status = error.status
            raise
        except Exception as error:  # the engine's own handlers answer; this is what slipped through them
            logger.error("engine raised", request_id=self.record.request_id, error=type(error).__name__)
            if self.start_sent:
                raise  # the server cuts the connection
            await self._answer_error(500)
        finally:
            await self._end()

    async def _read_body(self) -> bytes | None:
        parts: list[bytes] = []
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def _prepare(self, body: bytes) -> None:
        """Learn what was asked, and make the request that the engine gets."""
        told, record, wants = self.told, self.record, read_wants(body)
        record.model = told.model or wants.model
        asked = wants.stream_options is not None and wants.stream_options.include_usage
        self.hide_usage = bool(wants.stream and not asked and record.route in _USAGE_ROUTES)
        salt = told.salt if record.route in self.mount.salted else ""
        if salt or self.hide_usage or told.model:
            body = rewrite(body, usage=self.hide_usage, salt=salt, model=told.model)
        headers = [(n, v) for n, v in self.scope["headers"] if n not in _FROM_THE_GATEWAY]
        headers += [(b"content-length", b"%d" % len(body)), (b"x-request-id", told.request_id.encode("latin-1"))]
        if told.traceparent:
            headers.append((TRACEPARENT, told.traceparent.encode()))
        if told.batch and self.mount.priority:
            headers.append((b"x-vllm-priority", BATCH_PRIORITY))
        path = ENGINE_PATHS.get(self.path, self.path)
        self.scope = {**self.scope, "headers": headers, "path": path, TURN: told.turn}
        self.body = body

    async def _receive_body(self) -> Message:
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.finished:
            self.gone = True
        return message

    async def _on_message(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            self.record.status = message["status"]
            # What the response is decides, not what was asked: a JSON route ignores "stream".
            self.record.stream = sse.is_stream(message["headers"])
            if self.keeping is not None:
                self.keeping.start(stream=self.record.stream)
            return
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        if self.record.status >= 400:
            if sum(map(len, self.kept)) < MAX_ERROR_BYTES:
                self.kept.append(chunk)
            if not more:
                await self._answer_error(self.record.status, b"".join(self.kept))
            return
        if self.keeping is not None:
            self.keeping.add(chunk)
        if self.record.stream:
            chunk = self._scan(chunk, more)
        else:
            self.kept.append(chunk)
        if not more:
            self.finished = True
        elif not chunk:
            return
        if self.start is not None:
            await self._send_start()
        if chunk is message.get("body"):
            await self._send(message)
        else:
            await self._send({"type": "http.response.body", "body": chunk, "more_body": more})

    async def _send_start(self) -> None:
        start, self.start = self.start, None
        assert start is not None  # noqa: S101 - asked before
        self.start_sent = True
        self.record.ttft_s = time.monotonic() - self.started
        start["headers"] = [*start["headers"], *self._explained()]
        if self.hide_usage:  # the length may change
            start["headers"] = [(n, v) for n, v in start["headers"] if n != b"content-length"]
        await self._send(start)

    def _explained(self) -> list[tuple[bytes, bytes]]:
        """The headers that say which request this was, who answered and why, and how long the first byte took."""
        told = self.told
        timing = b"worker;dur=%.1f" % ((time.monotonic() - self.started) * 1e3)
        if told.reason:
            timing = b'gateway;dur=%.2f;desc="%s", ' % (told.decision_s * 1e3, told.reason.encode()) + timing
        return [
            (b"x-request-id", told.request_id.encode("latin-1")),
            (b"x-owngpt-worker", self.record.worker.encode()),
            (b"server-timing", timing),
            (HEADER, BYPASS if told.keep is None else MISS),
        ]

    def _scan(self, chunk: bytes, more: bool) -> bytes:
        """Look at SSE bytes, whole events at a time; return what the client may see."""
        chunk = self.whole.take(chunk, more=more)
        self.events += chunk.count(b"data:")
        if (
            b'"usage"' not in chunk
            and b'"finish_reason":"' not in chunk
            and b'"error"' not in chunk
            and b'"finish_reason": "' not in chunk
            and b'"response.failed"' not in chunk
            and self.record.outcome != "stream_error"
        ):
            return chunk
        parts: list[bytes] = []
        for event, end in sse.split(chunk):
            if (seen := self._event(event)) is not None:
                parts += (seen, end)
        return b"".join(parts)

    def _event(self, event: bytes) -> bytes | None:
        """What the client may see of an event that may matter; None: nothing."""
        data = sse.data(event)
        if not data.startswith(b"{"):
            return None if data == b"[DONE]" and self.record.outcome == "stream_error" else event
        said = usage.read(data)
        if said is None:
            return event
        if said.broken:
            self.record.outcome = "stream_error"
            return engine_errors.in_stream(self.record.route)
        usage.note(self.record, said)
        return None if self.hide_usage and said.only_usage else event

    async def _end(self) -> None:
        """Settle it: the answer stored, the record written, and only then whatever the reader has left to read."""
        try:
            self._settle()
            if self.keeping is not None:
                await self.keeping.store(whole=self.finished and self.record.outcome in ("ok", "client_error"))
        finally:
            self.mount.meter.end(self.record)
        if self.keeping is not None:
            with self.mount.meter.unread():
                await self.keeping.drain()

    def _settle(self) -> None:
        """Decide how it ended and fill in what is missing."""
        record = self.record
        record.duration_s = round(time.monotonic() - self.started, 6)
        if record.ttft_s is not None:
            record.ttft_s = round(record.ttft_s, 6)
        if 400 <= record.status < 500:
            record.outcome = "client_error"
        elif record.status == 503:
            record.outcome = "refused"
        elif record.status >= 500:
            record.outcome = "upstream_error"
        elif self.gone:
            record.outcome = "cancelled"
        elif self.finished and record.outcome != "stream_error":
            record.outcome = "ok"
        elif self.start_sent:
            record.outcome = "stream_error"
        good = self.finished and not record.stream and record.status < 400
        if good and (said := usage.read(b"".join(self.kept))) is not None:
            usage.note(record, said)
        if record.completion_tokens is None and record.stream and self.events:
            record.completion_tokens = max(self.events - 1, 0)  # one event a token, the first carries the role
            record.tokens_estimated = True

    async def _answer_error(self, status: int, body: bytes = b"") -> None:
        """Send an engine's error in our words; its 4xx keep their message, which speaks of the request."""
        theirs = dict(self.start["headers"]) if self.start is not None else {}
        self.start = None
        self.start_sent = True
        self.finished = True
        self.record.status = status
        status, headers, out = engine_errors.in_our_words(
            status, body, self.record.model, self.path, theirs.get(b"retry-after", b"")
        )
        headers = [*headers, *self._explained()]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": out, "more_body": False})
