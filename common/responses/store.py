"""Responses in the state redis, each with the input of its turn and the response it continues.

Bounded for each key's owner: `max_bytes` together, the least recently used go first; what nobody has used for `ttl_s`
goes by itself. A conversation is a chain of responses; continuing it uses all of them.
"""

from typing import NamedTuple

from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.errors import InvalidRequest
from common.metering.context import Turn
from common.redis.names import response_key, response_sizes_key, responses_key
from common.redis.scripts import CHAIN, DROP_RESPONSE, SAVE_RESPONSE

MAX_TURNS = 1_000
"""Of a conversation: one script reads them all."""
_OVERHEAD_BYTES = 400
"""What redis takes for a response beside its texts."""


class Link(NamedTuple):
    """One turn: the input items that it added, and the response. Both JSON."""

    items: bytes
    response: bytes


class ResponseStore:
    """The responses of one deployment."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def save(self, turn: Turn, items: bytes, response: bytes) -> bool:
        """Keep a response. False when it cannot be kept: larger than everything may be, or redis away or full."""
        size = len(items) + len(response) + _OVERHEAD_BYTES
        if size > turn.max_bytes:
            return False
        keys = response_key(turn.owner, turn.id), responses_key(turn.owner), response_sizes_key(turn.owner)
        values = turn.id, turn.previous, items, response, size, turn.ttl_s, turn.max_bytes, response_key(turn.owner, "")
        try:
            await self._redis.eval(SAVE_RESPONSE, len(keys), *keys, *values)
        except (RedisError, OSError) as error:
            logger.warning("a response was not kept", response=turn.id, error=str(error) or type(error).__name__)
            return False
        return True

    async def chain(self, owner: str, response_id: str, *, keep_s: int = 0) -> list[Link]:
        """A response and all that it continues, oldest first; with `keep_s` they are kept for so long from now on.

        Raises InvalidRequest when one of them is not there or they are more than MAX_TURNS, RedisError.
        """
        found: list[str] = await self._redis.eval(
            CHAIN, 2, responses_key(owner), response_sizes_key(owner), response_id, keep_s, MAX_TURNS,
            response_key(owner, ""),
        )
        if len(found) % 2:
            raise InvalidRequest(
                f"previous_response_id: the response {found[-1]!r} of this conversation is not there (any more): "
                "deleted, not stored, or too long ago.",
                param="previous_response_id", code="previous_response_not_found",
            )
        if len(found) > 2 * MAX_TURNS:
            raise InvalidRequest(
                f"previous_response_id: this conversation has over {MAX_TURNS} turns; begin a new one.",
                param="previous_response_id", code="conversation_too_long",
            )
        links = [Link(items.encode(), said.encode()) for items, said in zip(found[::2], found[1::2], strict=True)]
        return links[::-1]

    async def read(self, owner: str, response_id: str) -> bytes | None:
        """A response's JSON. Raises RedisError."""
        said = await self._redis.hget(response_key(owner, response_id), "response")
        return str(said).encode() if said is not None else None

    async def drop(self, owner: str, response_id: str) -> bool:
        """Delete a response; whether it was there. What continues it has lost its past. Raises RedisError."""
        keys = response_key(owner, response_id), responses_key(owner), response_sizes_key(owner)
        return bool(await self._redis.eval(DROP_RESPONSE, len(keys), *keys, response_id))
