"""What `BatchLimit` is told: the workers' reports, and the TTFT of everybody who is no batch, from the usage stream."""

from collections.abc import Callable
from typing import Any

import msgspec
from redis.asyncio import Redis

from common.records import ANSWER_CACHE, Record
from common.redis.names import USAGE
from common.workers import SLEEPING, WorkerTable
from services.jobs.batch_limit import REMEMBERED, BatchLimit

LOOK_EVERY_S = 0.1
OPEN = SLEEPING | {"ready"}
"""States of a worker that takes requests, now or once it is woken."""


class BatchLoad:
    """Keeps a `BatchLimit` informed."""

    def __init__(self, redis: Redis, table: WorkerTable) -> None:
        self._redis: Any = redis  # its types say bytes or text, read or not; ours is text
        self._table = table
        self.limit = BatchLimit()
        self._interactive = 0
        self._last = "$"
        self._beside = False
        """Whether something of ours ran since the last look."""

    def room(self, in_flight: int) -> bool:
        """Whether one more batch request may start now."""
        return self.limit.room(in_flight, self._interactive)

    async def look(self, in_flight: Callable[[], int]) -> None:
        """Every LOOK_EVERY_S; `in_flight` counts our own requests. Raises RedisError: the last pace stays."""
        if self._last == "$":
            self.limit.learn(await self._history())
        ttfts = await self._news()
        beats = [worker.beat for worker in self._table.workers.values() if worker.beat.state == "ready"]
        self._interactive = sum(beat.interactive for beat in beats)
        if not self._beside:
            self.limit.learn(ttfts)
        slots = sum(worker.beat.slots for worker in self._table.workers.values() if worker.beat.state in OPEN)
        self.limit.look(slots=slots, interactive=self._interactive, ttfts_s=ttfts)
        self._beside = in_flight() > 0

    async def _history(self) -> list[float]:
        """TTFTs before we came."""
        entries = await self._redis.xrevrange(USAGE, count=REMEMBERED)
        self._last = entries[0][0] if entries else "0"
        return interactive_ttfts(entries[::-1])

    async def _news(self) -> list[float]:
        """TTFTs since the last look."""
        found = await self._redis.xread({USAGE: self._last}, count=1000)
        if not found:
            return []
        entries = found[0][1]
        self._last = entries[-1][0]
        return interactive_ttfts(entries)


def interactive_ttfts(entries: list[tuple[str, dict[str, str]]]) -> list[float]:
    """TTFT in seconds of each answered request that is no batch's."""
    records = (msgspec.json.decode(fields["r"], type=Record) for _, fields in entries)
    return [
        record.ttft_s for record in records
        if record.ttft_s is not None and record.outcome == "ok" and not record.batch and record.worker != ANSWER_CACHE
    ]  # fmt: skip
