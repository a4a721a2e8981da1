"""Who is asking: a bearer key checked against redis once, then from memory.

Answers are remembered by the key's digest for CACHE_S, refusals too, and forgotten at once when the key is
revoked (`keys` channel). A key in use is looked up again beside its requests, never before them, and by one of them for
all. While redis is away, a key that was good stays good for at most GRACE_S.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from hmac import compare_digest
from typing import NamedTuple

import msgspec
from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.errors import ApiError, Unauthorized, Unavailable
from common.keys import ApiKey, key_id_of, matches
from common.redis.names import api_key_key

CACHE_S = 30.0
GRACE_S = 3600.0
RETRY_S = 2.0
"""How long a key lives on without asking again, while redis does not answer."""
STALE_S = 300.0
"""A key that was not seen for so long is looked up before its request."""
MAX_CACHED = 20_000
HOUSE = "owngpt"
"""Whose requests nobody else pays for: no key has this id."""


class _Known(NamedTuple):
    """What redis said of a key: `record` is None for a key that is not ours."""

    fresh_until: float
    verified_at: float
    record: ApiKey | None


class Authenticator:
    """Turns an Authorization header into an `ApiKey`, or raises."""

    def __init__(self, redis: Redis, clock: Callable[[], float] = time.monotonic, service_token: str = "") -> None:
        self._redis = redis
        self._service = f"Bearer {service_token}".encode() if service_token else None
        self._clock = clock
        self._cache: OrderedDict[bytes, _Known] = OrderedDict()
        self._refused: OrderedDict[bytes, float] = OrderedDict()
        """Until when; apart from the good ones, which no flood of made-up keys may push out."""
        self._asking: dict[bytes, asyncio.Task[ApiKey]] = {}
        self._owners: OrderedDict[str, _Known] = OrderedDict()
        self._revocations = 0

    def cached(self, header: bytes) -> ApiKey | None:
        """The key behind a header when it is known to be good, without awaiting anything."""
        digest = sha256(header).digest()
        known = self._cache.get(digest)
        if known is None:
            return None
        if known.fresh_until <= (now := self._clock()):
            looked_at = known.fresh_until - CACHE_S
            if not known.fresh_until or looked_at + STALE_S < now or known.verified_at + GRACE_S < now:
                return None
            self._ask(header, digest)
        return known.record

    async def check(self, header: bytes) -> ApiKey:
        """The key behind a header. Raises Unauthorized, or Unavailable when nobody can tell."""
        if (key := self.cached(header)) is not None:
            return key
        digest = sha256(header).digest()
        if self._refused.get(digest, 0.0) > self._clock():
            raise Unauthorized
        return await asyncio.shield(self._ask(header, digest))  # whoever leaves must not end it for the others

    def is_service(self, header: bytes) -> bool:
        """Whether one of our own services asks, in the name of a key's owner."""
        return self._service is not None and compare_digest(header, self._service)

    async def owner(self, key_id: str) -> ApiKey:
        """The key with an id, for a service that asks in its name.

        Raises Unauthorized for a key that is not there any more, or Unavailable when nobody can tell.
        """
        known = self._owners.get(key_id)
        if known is None or known.fresh_until <= self._clock():
            revocations = self._revocations
            known = await self._look_up(key_id, known)
            if revocations == self._revocations:
                self._owners[key_id] = known
            while len(self._owners) > MAX_CACHED:
                self._owners.popitem(last=False)
        if known.record is None:
            raise Unauthorized
        return known.record

    async def _look_up(self, key_id: str, known: _Known | None) -> _Known:
        """What redis says of a key's id; what it said last, for a while, when it does not answer."""
        now = self._clock()
        try:
            raw = await self._redis.get(api_key_key(key_id))
        except (RedisError, OSError) as error:
            if known is None or known.record is None or known.verified_at + GRACE_S < now:
                raise Unavailable(
                    "Keys cannot be checked right now.", code="key_store_unavailable", retry_after_s=2
                ) from error
            return known._replace(fresh_until=self._clock() + RETRY_S)
        return _Known(now + CACHE_S, now, msgspec.json.decode(raw, type=ApiKey) if raw is not None else None)

    def _ask(self, header: bytes, digest: bytes) -> "asyncio.Task[ApiKey]":
        """Look a key up, once for all who want to know."""
        task = self._asking.get(digest)
        if task is None:
            task = self._asking[digest] = asyncio.create_task(self._verify(header, digest))
            task.add_done_callback(partial(self._asked, digest))
        return task

    def _asked(self, digest: bytes, task: "asyncio.Task[ApiKey]") -> None:
        if self._asking.get(digest) is task:
            del self._asking[digest]
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ApiError):  # nobody may be waiting to hear it
            logger.opt(exception=error).error("a key could not be looked up")

    async def _verify(self, header: bytes, digest: bytes) -> ApiKey:
        scheme, _, token = header.decode("latin-1").partition(" ")
        key_id = key_id_of(token.strip()) if scheme.lower() == "bearer" else None
        if key_id is None:
            raise Unauthorized
        revocations = self._revocations
        found = await self._look_up(key_id, self._cache.get(digest))
        if found.record is None or not matches(token.strip(), found.record):
            if revocations == self._revocations:  # else redis may have been another one then
                self._cache.pop(digest, None)
                self._refused[digest] = found.fresh_until
                if len(self._refused) > MAX_CACHED:
                    self._refused.popitem(last=False)
            raise Unauthorized
        if revocations == self._revocations:  # else it may be this one that was revoked meanwhile
            self._cache[digest] = found
            self._cache.move_to_end(digest)
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return found.record

    def forget(self, key_id: str) -> None:
        """Drop what is remembered of a key: it was revoked."""
        self._revocations += 1
        self._asking.clear()  # who asks from now on takes no answer from before
        self._owners.pop(key_id, None)
        for digest in [d for d, known in self._cache.items() if known.record is not None and known.record.id == key_id]:
            del self._cache[digest]

    def distrust(self) -> None:
        """Ask redis again for every key at its next use: a revocation may have been missed."""
        self._revocations += 1
        self._refused.clear()
        self._asking.clear()
        for digest, known in self._cache.items():
            self._cache[digest] = known._replace(fresh_until=0.0)
        for key_id, known in self._owners.items():
            self._owners[key_id] = known._replace(fresh_until=0.0)


def bearer(headers: Mapping[bytes, bytes]) -> bytes:
    """The credentials in lower-case headers: `Authorization`, or Anthropic's `x-api-key`. Raises Unauthorized."""
    found = headers.get(b"authorization")
    if found is not None:
        return found
    if (key := headers.get(b"x-api-key")) is not None:
        return b"Bearer " + key
    raise Unauthorized
