"""Answers in redis-cache: `answer:{digest}`, a checksum and a JSON document.

An answer that does not verify is no answer; redis-cache away means that there is none. Whoever finds out that an answer
cannot be kept leaves a note for NOT_KEPT_S, so that nobody waits for it.
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from hmac import compare_digest

import msgspec
from loguru import logger
from redis.exceptions import RedisError

from common.answers.transcript import Document
from common.breaker import Breaker
from common.redis.pipelined import PipelinedRedis

HEADER = b"x-owngpt-cache"
HIT, MISS, BYPASS = b"hit", b"miss", b"bypass"
PREFIX = "answer:"
DIGEST_BYTES = 32
NOT_KEPT = b"null"
NOT_KEPT_S = 10
"""Answers that cannot be kept: too large, an error, of a shape that is not known. Whoever asks the same goes alone."""


class Stored:
    """What stands under a name: a document, or the note that its answer is not kept."""

    __slots__ = ("document",)

    def __init__(self, document: Document | None) -> None:
        self.document = document


class Store:
    """The answers of one deployment. `secret` keys their checksums; `count` hears: stored, not_kept, damaged."""

    def __init__(self, redis: PipelinedRedis, secret: str, count: Callable[[str], None]) -> None:
        self._redis = redis
        self._secret = blake2b(secret.encode(), digest_size=32, person=b"owngpt answer v1").digest()
        self._count = count
        self._breaker = Breaker()

    @property
    def away(self) -> bool:
        """Whether redis-cache has just failed: nothing is looked up or stored for a while."""
        return self._breaker.open

    async def read(self, names: Sequence[str]) -> list[Stored | None]:
        """What stands under each name, in one round trip; None for nothing."""
        if self._breaker.open:
            return [None] * len(names)
        try:
            values = await self._redis.ask("MGET", *names)
        except (RedisError, OSError) as error:
            self._failed(error)
            return [None] * len(names)
        self._worked()
        return [self._open(name, value) for name, value in zip(names, values, strict=True)]

    async def write(self, name: str, document: Document | None, ttl_s: int, max_bytes: int) -> None:
        """Keep an answer for `ttl_s`; without a document, or over `max_bytes`, the note that it is not kept."""
        body = NOT_KEPT if document is None else msgspec.json.encode(document)
        if len(body) > max_bytes:
            body = NOT_KEPT
        if body is NOT_KEPT:
            ttl_s = NOT_KEPT_S
        if self._breaker.open:
            return
        try:
            await self._redis.ask("SET", name, self._digest(name, body) + body, "EX", ttl_s)
        except (RedisError, OSError) as error:
            self._failed(error)
            return
        self._worked()
        self._count("not_kept" if body is NOT_KEPT else "stored")

    async def close(self) -> None:
        """Give the connection back."""
        await self._redis.aclose()

    def _open(self, name: str, value: object) -> Stored | None:
        if not isinstance(value, bytes):
            return None
        digest, body = value[:DIGEST_BYTES], value[DIGEST_BYTES:]
        if not compare_digest(digest, self._digest(name, body)):
            self._count("damaged")
            return None
        return Stored(msgspec.json.decode(body))

    def _digest(self, name: str, body: bytes) -> bytes:
        return blake2b(name.encode() + b"\0" + body, digest_size=DIGEST_BYTES, key=self._secret).digest()

    def _failed(self, error: Exception) -> None:
        if self._breaker.failed():
            logger.warning("redis-cache is away; answers are computed", error=str(error) or type(error).__name__)

    def _worked(self) -> None:
        if self._breaker.worked():
            logger.info("redis-cache is back")
