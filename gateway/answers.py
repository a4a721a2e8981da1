"""Answers that were given before: exact matches, kept in redis-cache.

A request may be answered from memory when its answer is determined (temperature 0, or a seed), or when its client says
`X-OwnGPT-Cache: use`; never with `Cache-Control: no-store`. Two requests are the same question when the whole body is
equal but for `IGNORED`, the model and adapter are the same files, and the cache scope is the same. An answer that does
not verify is no answer; redis-cache away means a miss.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from hashlib import blake2b
from hmac import compare_digest

import msgspec
from loguru import logger
from prometheus_client import Counter
from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.answers import transcript
from common.answers.store import HEADER, HIT, MISS
from common.answers.transcript import Document
from common.asgi import Message, Send
from common.breaker import Breaker
from common.metering.usage import only_usage
from gateway.question import Question

DIGEST_BYTES = 32


class Answers:
    """The answers of one deployment. `secret` keys their checksums."""

    def __init__(self, redis: Redis, secret: str, ttl_s: int, max_bytes: int, counter: Counter) -> None:
        self._redis = redis
        self._secret = blake2b(secret.encode(), digest_size=32, person=b"owngpt answer v1").digest()
        self._ttl_s = ttl_s
        self.max_bytes = max_bytes
        self.count = counter
        self._breaker = Breaker()
        self._flights: dict[str, asyncio.Future[Document | None]] = {}
        self._writing: set[asyncio.Task[None]] = set()

    async def find(self, question: Question) -> Document | None:
        """The answer given before in this scope, or to a request that is being answered right now.

        None: the caller is to answer, inside `flight`, entered without awaiting anything before.
        """
        result, document = "hit", None
        if question.name not in self._flights:
            document = await self._read(question.name)
        flight = self._flights.get(question.name)  # it may have begun meanwhile
        if document is None and flight is not None:
            result, document = "joined", await asyncio.shield(flight)
        self.count.labels(result if document else "miss").inc()
        return document

    @contextlib.contextmanager
    def flight(self, question: Question, collected: "Collecting") -> Iterator[None]:
        """While the one answer to a question is made, whoever asks the same waits for it."""
        future: asyncio.Future[Document | None] | None = None
        if question.name not in self._flights:
            future = self._flights[question.name] = asyncio.get_running_loop().create_future()
        document: Document | None = None
        try:
            yield
            document = collected.document() if question.fresh() else None
        finally:
            if future is not None:
                future.set_result(document)
            writing = self._keep(question.name, document) if document is not None else None
            if future is not None and writing is not None:
                # Until redis has it, whoever asks the same gets it from here.
                writing.add_done_callback(lambda _: self._flights.pop(question.name, None))
            elif future is not None:
                del self._flights[question.name]

    def _keep(self, name: str, document: Document) -> "asyncio.Task[None] | None":
        body = msgspec.json.encode(document)
        if len(body) > self.max_bytes:
            self.count.labels("too_large").inc()
            return None
        task = asyncio.create_task(self._write(name, body))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return task

    async def _read(self, name: str) -> Document | None:
        if self._breaker.open:
            return None
        try:
            value = await self._redis.getex(name, ex=self._ttl_s)
        except (RedisError, OSError) as error:
            self._away(error)
            return None
        if self._breaker.worked():
            logger.info("redis-cache is back")
        if not isinstance(value, bytes):
            return None
        digest, body = value[:DIGEST_BYTES], value[DIGEST_BYTES:]
        if not compare_digest(digest, self._digest(name, body)):
            self.count.labels("damaged").inc()
            return None
        document: Document = msgspec.json.decode(body)
        return document

    async def _write(self, name: str, body: bytes) -> None:
        if self._breaker.open:
            return
        try:
            await self._redis.set(name, self._digest(name, body) + body, ex=self._ttl_s)
            self.count.labels("stored").inc()
        except (RedisError, OSError) as error:
            self._away(error)

    def _away(self, error: Exception) -> None:
        if self._breaker.failed():
            logger.warning("redis-cache is away; answers are computed", error=str(error) or type(error).__name__)

    def _digest(self, name: str, body: bytes) -> bytes:
        return blake2b(name.encode() + b"\0" + body, digest_size=DIGEST_BYTES, key=self._secret).digest()

    async def close(self) -> None:
        """Finish what is being written."""
        await asyncio.gather(*self._writing, return_exceptions=True)
        await self._redis.aclose()


class Collecting:
    """A `send` that keeps a copy of a good answer while it passes, and hides usage that only we asked for."""

    def __init__(self, question: Question, send: Send, max_bytes: int) -> None:
        self._question = question
        self._send = send
        self._left = 4 * max_bytes  # events are wordier than the document they amount to
        self._parts: list[bytes] = []
        self._good = self._stream = self._ended = False
        self._tail = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._stream = kind.startswith(b"text/event-stream")
            self._good = message["status"] == 200 and self._stream == self._question.stream
            message["headers"] = [*message["headers"], (HEADER, MISS)]
            await self._send(message)
            return
        chunk, more = message.get("body", b""), message.get("more_body", False)
        if self._good:
            self._parts.append(chunk)
            self._left -= len(chunk)
            self._good = self._left >= 0
        self._ended = not more
        if self._stream and not self._question.usage:
            chunk = self._without_usage(chunk, more)
            if more and not chunk:
                return
        await self._send({"type": "http.response.body", "body": chunk, "more_body": more})

    def _without_usage(self, chunk: bytes, more: bool) -> bytes:
        chunk, self._tail = self._tail + chunk, b""
        if more and not chunk.endswith(b"\n\n"):
            cut = chunk.rfind(b"\n\n") + 2
            chunk, self._tail = (chunk[:cut], chunk[cut:]) if cut > 1 else (b"", chunk)
        if b'"choices":[]' not in chunk:
            return chunk
        return b"\n\n".join(event for event in chunk.split(b"\n\n") if not only_usage(event))

    def document(self) -> Document | None:
        """The whole answer; None when it is not one to keep."""
        if not (self._good and self._ended):
            return None
        body = b"".join(self._parts)
        if self._stream:
            return transcript.from_events(self._question.route, body)
        with contextlib.suppress(msgspec.MsgspecError):
            document: Document = msgspec.json.decode(body, type=dict)
            if transcript.complete(document):
                return document
        return None


def render(question: Question, document: Document, request_id: bytes) -> bytes | None:
    """The answer's bytes in the shape asked for, under the request's own id; None when that cannot be said."""
    kind = "chatcmpl" if question.route == "chat" else "cmpl"
    document = {**document, "id": f"{kind}-{request_id.decode()}"}
    if question.stream:
        return transcript.to_events(question.route, document, usage=question.usage)
    return msgspec.json.encode(document)


async def replay(question: Question, body: bytes, headers: list[tuple[bytes, bytes]], send: Send) -> None:
    """Send an answer from memory."""
    kind = b"text/event-stream; charset=utf-8" if question.stream else b"application/json"
    await send({"type": "http.response.start", "status": 200, "headers": [
        (b"content-type", kind), (b"content-length", str(len(body)).encode()), (HEADER, HIT), *headers,
    ]})
    await send({"type": "http.response.body", "body": body})
