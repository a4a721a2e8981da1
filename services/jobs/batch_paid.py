"""Which lines of a batch were answered and recorded, though we may not have the answer: they are not paid again."""

import asyncio
import time

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.records import Record
from common.redis.names import USAGE
from services.jobs.batch import Batch

PAGE = 5000
RETRY_S = 0.5

_decode = msgspec.json.Decoder(Record).decode


class Paid:
    """Reads the usage stream for one batch, always on from where it was."""

    def __init__(self, redis: Redis, batch: Batch) -> None:
        self._redis, self._owner, self._expires_at = redis, batch.owner, batch.expires_at
        self._after = f"{(batch.in_progress_at or batch.created_at) * 1000}-0"
        self._reading = asyncio.Lock()
        self._ids: set[str] = set()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._ids

    async def look(self) -> None:
        """Read what has come. Raises RedisError."""
        async with self._reading:  # many lines break off at once; one reads for all
            while entries := await self._redis.xrange(USAGE, f"({self._after}", count=PAGE):
                self._after = str(entries[-1][0])
                for _, fields in entries:
                    record = _decode((fields or {})["r"])
                    if record.outcome == "ok" and record.batch and record.key == self._owner:
                        self._ids.add(record.request_id)

    async def look_patiently(self) -> None:
        """The same, as soon as redis is there; at the latest when the batch's time is over."""
        while time.time() < self._expires_at:
            try:
                await self.look()
                return
            except (RedisError, OSError):
                await asyncio.sleep(RETRY_S)
