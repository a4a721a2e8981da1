"""Who is asking: a bearer key checked against redis once, then from memory.

Answers are remembered by the key's digest for CACHE_S, refusals too, and forgotten at once when the key is
revoked (`keys` channel). While redis is away, a key that was good stays good for at most GRACE_S.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from gateway.errors import Unauthorized, Unavailable
from gateway.keys import ApiKey, key_id_of, matches
from gateway.store import api_key_key

CACHE_S = 30.0
GRACE_S = 3600.0
MAX_CACHED = 20_000


class Authenticator:
    """Turns an Authorization header into an `ApiKey`, or raises."""

    def __init__(self, redis: Redis, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._clock = clock
        self._cache: OrderedDict[bytes, tuple[float, ApiKey | None]] = OrderedDict()

    def cached(self, header: bytes) -> ApiKey | None:
        """The key behind a header when it is known to be good, without awaiting anything."""
        found = self._cache.get(sha256(header).digest())
        return found[1] if found is not None and found[0] > self._clock() else None

    async def check(self, header: bytes) -> ApiKey:
        """The key behind a header. Raises Unauthorized, or Unavailable when nobody can tell."""
        digest = sha256(header).digest()
        known = self._cache.get(digest)
        now = self._clock()
        if known is not None and known[0] > now:
            if known[1] is None:
                raise Unauthorized
            return known[1]
        scheme, _, token = header.decode("latin-1").partition(" ")
        key_id = key_id_of(token.strip()) if scheme.lower() == "bearer" else None
        if key_id is None:
            raise Unauthorized
        try:
            raw = await self._redis.get(api_key_key(key_id))
        except (RedisError, OSError) as error:
            if known is not None and known[1] is not None and known[0] + GRACE_S > now:
                return known[1]
            raise Unavailable(
                "Keys cannot be checked right now.", code="key_store_unavailable", retry_after_s=2
            ) from error
        record = msgspec.json.decode(raw, type=ApiKey) if raw is not None else None
        if record is not None and not matches(token.strip(), record):
            record = None
        self._cache[digest] = (now + CACHE_S, record)
        self._cache.move_to_end(digest)
        while len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        if record is None:
            raise Unauthorized
        return record

    def forget(self, key_id: str) -> None:
        """Drop what is remembered of a key: it was revoked."""
        for digest in [d for d, (_, record) in self._cache.items() if record is not None and record.id == key_id]:
            del self._cache[digest]


def bearer(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The credentials in ASGI headers: `Authorization`, or Anthropic's `x-api-key`. Raises Unauthorized."""
    found = b""
    for name, value in headers:
        if name == b"authorization":
            return value
        if name == b"x-api-key":
            found = b"Bearer " + value
    if not found:
        raise Unauthorized
    return found
