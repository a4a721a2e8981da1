"""One ASGI middleware that sees what a request cost and how it ended.

Mounted twice: around vLLM's app (`services/worker`), where the fast path's bytes pass, and around the relay's
upstream calls for engines that cannot carry it. Per request it asks the engine for usage (and hides it from a
client who did not ask), holds the response start until the first byte exists (so a worker that dies in prefill
can still be replaced), replaces an engine's error texts with ours, and leaves one `Record`.

Per streamed chunk it scans for three byte patterns and reads no clock; the budget is 5 microseconds.
"""

import secrets
import time

import msgspec
from loguru import logger

from common.asgi import App, Message, Receive, Scope, Send
from common.errors import ApiError, UpstreamFailed, encode_parts
from common.metering.context import CONTEXT, TRACEPARENT
from common.metering.engine_errors import engine_message
from common.metering.meter import Meter
from common.metering.rewrite import rewrite
from common.metering.usage import StreamOptions, decode_carrier, only_usage
from common.records import Record
from common.routes import ROUTES

MAX_ERROR_BYTES = 64 * 1024
_USAGE_ROUTES = ("chat", "completions")
_SALTED_ROUTES = ("chat", "completions", "responses", "messages", "embeddings")
"""Where vLLM takes a `cache_salt`; the rest reads no KV blocks."""
_ERROR_MARKS = {"messages": b'"type":"error"', "responses": b'"type":"response.failed"'}
"""How a broken stream looks where it is not `data: {"error"`."""
_BROKEN = "The worker failed while it was answering."
_STREAM_ERRORS = {
    "chat": b"data: " + encode_parts(500, _BROKEN, "server_error", code="stream_interrupted")[2],
    "messages": b"event: error\ndata: " + msgspec.json.encode(
        {"type": "error", "error": {"type": "api_error", "message": _BROKEN}}
    ),
    "responses": b"event: error\ndata: " + msgspec.json.encode(
        {"type": "error", "code": "stream_interrupted", "message": _BROKEN, "param": None}
    ),
}


class _Wants(msgspec.Struct):
    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

_decode_wants = msgspec.json.Decoder(_Wants).decode


class Metering:
    """The middleware. `worker` names whose requests these are; other paths pass through untouched.

    `salts`: the engine is vLLM, whose KV blocks are kept apart by `cache_salt`.
    """

    def __init__(self, app: App, meter: Meter, worker: str, *, salts: bool = False) -> None:
        self._app = app
        self._meter = meter
        self._worker = worker
        self._salts = salts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in ROUTES or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        await _Metered(self._app, self._meter, self._worker, self._salts, scope, receive, send).run()


class _Metered:
    """One request on its way."""

    def __init__(
        self, app: App, meter: Meter, worker: str, salts: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.app, self.meter, self.scope, self.salts = app, meter, scope, salts
        self._receive, self._send = receive, send
        self.started = time.monotonic()
        key, attempt, decided_us, request_id, trace_id = "-", "1", "", "", ""
        self.salt = ""
        for name, value in scope["headers"]:
            if name == CONTEXT:
                key, attempt, self.salt, decided_us = [*value.decode("latin-1").split(" "), "", "", ""][:4]
            elif name == b"x-request-id":
                request_id = value.decode("latin-1")
            elif name == TRACEPARENT:
                trace_id = value[3:35].decode("latin-1")
        own = secrets.token_hex(8)
        self.record = Record(
            id=own, request_id=request_id or own, key=key, model="", route=ROUTES[scope["path"]][0],
            worker=worker, started_at=time.time(), attempt=int(attempt) if attempt.isdigit() else 1,
            trace_id=trace_id, decision_s=int(decided_us) / 1e6 if decided_us.isdigit() else None,
        )
        self.body: bytes | None = None
        self.hide_usage = False
        self.start: Message | None = None
        self.start_sent = False
        self.gone = False
        self.finished = False
        self.chunks = 0
        self.kept: list[bytes] = []
        self.tail = b""
        self.error_mark = _ERROR_MARKS.get(self.record.route, b'{"error"')

    async def run(self) -> None:
        body = await self._read_body()
        if body is None:
            return
        self._prepare(body)
        self.meter.begin(self.record)
        try:
            await self.app(self.scope, self._receive_body, self._on_message)
        except UpstreamFailed as error:
            self.record.status = 502 if error.ran else 503
            raise
        except ApiError as error:
            self.record.status = error.status
            raise
        except Exception as error:  # the engine's own handlers answer; this is what slipped through them
            logger.error("engine raised", request_id=self.record.request_id, error=type(error).__name__)
            if self.start_sent:
                raise  # the server cuts the connection
            await self._answer_error(500)
        finally:
            self._settle()
            self.meter.end(self.record)

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
        """Learn what was asked and ask the engine for usage."""
        try:
            wants = _decode_wants(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            wants = _Wants()  # the engine will refuse it
        self.record.model = wants.model
        asked = wants.stream_options is not None and wants.stream_options.include_usage
        self.hide_usage = bool(wants.stream and not asked and self.record.route in _USAGE_ROUTES)
        salt = self.salt if self.salts and self.record.route in _SALTED_ROUTES else ""
        if salt or self.hide_usage:
            body = rewrite(body, usage=self.hide_usage, salt=salt)
            headers = [(n, v) for n, v in self.scope["headers"] if n != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            self.scope = {**self.scope, "headers": headers}
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
            self.record.stream = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
            return
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        if self.record.status >= 400:
            if sum(map(len, self.kept)) < MAX_ERROR_BYTES:
                self.kept.append(chunk)
            if not more:
                await self._answer_error(self.record.status, b"".join(self.kept))
            return
        if self.record.stream:
            chunk = self._scan(chunk, more)
        else:
            self.kept.append(chunk)
        if not more:
            self.finished = True
        elif not chunk:
            return
        if self.start is not None:
            start, self.start = self.start, None
            self.start_sent = True
            self.record.ttft_s = time.monotonic() - self.started
            start["headers"] = [*start["headers"], *self._explained()]
            if self.hide_usage:  # the length may change
                start["headers"] = [(n, v) for n, v in start["headers"] if n != b"content-length"]
            await self._send(start)
        if chunk is message.get("body"):
            await self._send(message)
        else:
            await self._send({"type": "http.response.body", "body": chunk, "more_body": more})

    def _explained(self) -> list[tuple[bytes, bytes]]:
        """The headers that say which request this was, who answered, and how long the first byte took."""
        record = self.record
        timing = b"worker;dur=%.1f" % ((time.monotonic() - self.started) * 1e3)
        return [
            (b"x-request-id", record.request_id.encode()),
            (b"x-owngpt-worker", record.worker.encode()),
            (b"server-timing", timing),
        ]

    def _scan(self, chunk: bytes, more: bool) -> bytes:
        """Look at SSE bytes, whole events at a time; return what the client may see."""
        if self.tail:
            chunk = self.tail + chunk
            self.tail = b""
        if not chunk.endswith(b"\n\n") and more:
            cut = chunk.rfind(b"\n\n") + 2
            chunk, self.tail = (chunk[:cut], chunk[cut:]) if cut > 1 else (b"", chunk)
        self.chunks += 1
        if (
            b'"usage":{' not in chunk
            and b'"finish_reason":"' not in chunk
            and self.error_mark not in chunk
            and self.record.outcome != "stream_error"
        ):
            return chunk
        events = chunk.split(b"\n\n")
        return b"\n\n".join([event for event in map(self._event, events) if event is not None])

    def _event(self, event: bytes) -> bytes | None:
        """One SSE event that may matter; None hides it."""
        at = event.find(b"data: {")
        if at < 0:
            return None if event == b"data: [DONE]" and self.record.outcome == "stream_error" else event
        data = event[at + 6 :]
        if data.startswith(b'{"error"') or (self.record.route in _ERROR_MARKS and self.error_mark in data[:200]):
            self.record.outcome = "stream_error"
            return _STREAM_ERRORS.get(self.record.route, _STREAM_ERRORS["chat"])
        reason = data.find(b'"finish_reason":"')
        if reason >= 0:
            end = data.find(b'"', reason + 17)
            self.record.finish_reason = data[reason + 17 : end].decode("ascii", "replace")[:32]
        if b'"usage":{' in data:
            self._take_usage(data)
            if self.hide_usage and only_usage(event):
                return None
        return event

    def _take_usage(self, data: bytes) -> None:
        try:
            carrier = decode_carrier(data)
        except msgspec.MsgspecError:
            return
        record = self.record
        for holder in (carrier, carrier.response, carrier.message):
            if holder is None or holder.usage is None:
                continue
            usage = holder.usage
            prompt = usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens
            details = usage.prompt_tokens_details or usage.input_tokens_details
            cached = details.cached_tokens if details else usage.cache_read_input_tokens
            done = usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens
            if prompt is not None:
                # Anthropic's input_tokens leaves out what came from the cache.
                record.prompt_tokens = prompt + (usage.cache_read_input_tokens or 0)
            if cached is not None:
                record.cached_tokens = cached
            if done is not None:
                record.completion_tokens = done
        if carrier.count is not None and record.route == "tokenize":
            record.prompt_tokens = carrier.count

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
        if self.finished and not record.stream and record.status < 400:
            self._take_usage(b"".join(self.kept))
        if record.completion_tokens is None and record.stream and self.chunks:
            record.completion_tokens = max(self.chunks - 1, 0)  # one chunk a token, the first carries the role
            record.tokens_estimated = True

    async def _answer_error(self, status: int, body: bytes = b"") -> None:
        """Send an engine's error in our words; its 4xx keep their message, which speaks of the request."""
        self.start = None
        self.start_sent = True
        self.finished = True
        self.record.status = status
        message, param = engine_message(body)
        if status >= 500:
            refused = status == 503
            parts = encode_parts(
                status,
                "The worker takes no more requests right now." if refused else "The worker failed.",
                "server_error", code="worker_refused" if refused else "worker_failed",
                retry_after_s=1 if refused else None,
            )
        elif not message or message in ("Not Found", "Method Not Allowed"):
            parts = encode_parts(
                status, f"The model {self.record.model!r} does not support {self.scope['path']}.",
                "invalid_request_error", code="unsupported_endpoint",
            )
        else:
            code = {404: "model_not_found", 422: "unprocessable"}.get(status, "invalid_value")
            parts = encode_parts(status, message, "invalid_request_error", param, code)
        status, headers, out = parts
        await self._send(
            {"type": "http.response.start", "status": status, "headers": [*headers, *self._explained()]}
        )
        await self._send({"type": "http.response.body", "body": out, "more_body": False})
