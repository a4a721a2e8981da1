"""Responses in the state redis, each with the input of its turn and the response it continues.

Bounded for each key's owner: `max_bytes` together, the least recently used go first; what nobody has used for `ttl_s`
goes by itself. A conversation is a chain of responses; continuing it uses all of them. What is kept can be continued.
"""

import asyncio
from typing import NamedTuple

from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from common.breaker import Breaker
from common.errors import InvalidRequest
from common.metering.context import Turn
from common.redis.names import response_key, response_sizes_key, responses_key
from common.redis.scripts import CHAIN, DROP_RESPONSE, SAVE_RESPONSE

MAX_TURNS = 1_000
MAX_CHAIN_BYTES = 2 * 1024 * 1024
"""Of a conversation: one script reads it all, and an engine gets it all. What no model reads is not worth a stall."""
PATIENCE_S = 1.0
"""A client waits no longer for a redis that is away."""
_OVERHEAD_BYTES = 900
"""What redis takes for a response beside its texts, its places in the indexes among it."""


class Link(NamedTuple):
    """One turn: the input items that it added, and the response. Both JSON."""

    items: bytes
    response: bytes


class ResponseStore:
    """The responses of one deployment."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._breaker = Breaker()

    async def save(self, turn: Turn, items: bytes, response: bytes) -> bool:
        """Keep a response. False when it cannot be kept: too large, its past is gone, redis away or full."""
        size = len(items) + len(response) + _OVERHEAD_BYTES
        if size > min(turn.max_bytes, MAX_CHAIN_BYTES) or self._breaker.open:
            return False
        keys = response_key(turn.owner, turn.id), responses_key(turn.owner), response_sizes_key(turn.owner)
        values = turn.id, turn.previous, items, response, size, turn.ttl_s, turn.max_bytes, response_key(turn.owner, "")
        try:
            async with asyncio.timeout(PATIENCE_S):
                kept = bool(await self._redis.eval(SAVE_RESPONSE, len(keys), *keys, *values))
        except ResponseError as error:  # full: it says so at once
            logger.warning("a response was not kept", response=turn.id, error=str(error))
            return False
        except (RedisError, OSError) as error:
            if self._breaker.failed():
                logger.warning("redis is away; responses are not kept", error=str(error) or type(error).__name__)
            return False
        if self._breaker.worked():
            logger.info("redis is back; responses are kept")
        return kept

    async def past(self, turn: Turn) -> list[Link]:
        """What a turn continues, oldest first; from now on it is kept for `ttl_s` again.

        Raises InvalidRequest when a response is not there or it is too much, RedisError, OSError.
        """
        links, rest = await self._chain(turn.owner, turn.previous, turn.ttl_s, MAX_TURNS - 1)
        if rest:
            raise InvalidRequest(
                f"previous_response_id: the response {rest!r} of this conversation is not there (any more): "
                "deleted, not stored, or too long ago.",
                param="previous_response_id", code="previous_response_not_found",
            )
        if rest is not None:
            raise InvalidRequest(
                f"previous_response_id: this conversation has {MAX_TURNS} turns, or {MAX_CHAIN_BYTES} bytes; begin "
                "a new one.", param="previous_response_id", code="conversation_too_long",
            )
        return links

    async def listed(self, owner: str, response_id: str) -> list[Link]:
        """A response and all that it continues and that is still there, oldest first. Raises RedisError, OSError."""
        return (await self._chain(owner, response_id, 0, MAX_TURNS))[0]

    async def read(self, owner: str, response_id: str) -> bytes | None:
        """A response's JSON. Raises RedisError."""
        said = await self._redis.hget(response_key(owner, response_id), "response")
        return str(said).encode() if said is not None else None

    async def drop(self, owner: str, response_id: str) -> bool:
        """Delete a response; whether it was there. What continues it has lost its past. Raises RedisError."""
        keys = response_key(owner, response_id), responses_key(owner), response_sizes_key(owner)
        return bool(await self._redis.eval(DROP_RESPONSE, len(keys), *keys, response_id))

    async def _chain(self, owner: str, response_id: str, keep_s: int, most: int) -> tuple[list[Link], str | None]:
        """(links, oldest first; what is not among them: None nothing, an id that is gone, '' more than may be)."""
        keys = responses_key(owner), response_sizes_key(owner)
        values = response_id, keep_s, most, MAX_CHAIN_BYTES, response_key(owner, "")
        async with asyncio.timeout(PATIENCE_S):
            found: list[str] = await self._redis.eval(CHAIN, len(keys), *keys, *values)
        rest = found.pop() if len(found) % 2 else None
        links = [Link(items.encode(), said.encode()) for items, said in zip(found[::2], found[1::2], strict=True)]
        return links[::-1], rest
