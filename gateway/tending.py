"""What a gateway does once a second, and what it tells the others."""

import asyncio
import time
from collections.abc import Container

from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.feed import Feed
from common.redis.names import (
    CHANNEL_HELD,
    HEARTBEAT_TTL_MS,
    USAGE,
    USAGE_MAX_ENTRIES,
    WORKERS,
    reaped_key,
    running_key,
    worker_key,
)
from common.redis.scripts import REAP
from common.workers import WorkerTable
from gateway.answers import Answers
from gateway.attempts import HeldBack
from gateway.metrics import GatewayMetrics

TEND_EVERY_S = 1.0
REAPED_REMEMBERED_S = 3600
REAP_EVERY = 2
"""Rounds of tending between two looks for lost workers."""


class Tending:
    """Forgets silent workers, settles what lost ones left, refreshes the gauges."""

    def __init__(
        self, redis: Redis, feed: Feed, table: WorkerTable, answers: Answers | None, metrics: GatewayMetrics
    ) -> None:
        self._redis, self._feed, self._table, self._answers, self._metrics = redis, feed, table, answers, metrics
        self._lost = self._rounds = 0

    async def once(self) -> bool:
        """What is due, every TEND_EVERY_S; whether redis was asked. Raises RedisError."""
        self._rounds += 1
        table, metrics, feed = self._table, self._metrics, self._feed
        metrics.count()
        table.tend(connected=feed.connected)
        metrics.workers_lost.inc(table.lost - self._lost)
        self._lost = table.lost
        for state, count in table.states().items():
            metrics.workers.labels(state).set(count)
        if self._answers is not None:
            self._answers.tend()
        # A redis that was away longer than heartbeats live has forgotten live workers: let them speak first.
        settled = feed.connected and time.monotonic() - feed.connected_at > 2 * HEARTBEAT_TTL_MS / 1000
        if not settled or self._rounds % REAP_EVERY:
            return False
        if requests := await reap(self._redis, table.workers):
            metrics.lost_requests.inc(requests)
            logger.warning("requests lost with their worker", count=requests)
        return True


async def reap(redis: Redis, heard: Container[str]) -> int:
    """Record as `upstream_error` what lost workers left running. Returns how many requests that were.

    `heard`: workers whose messages arrive. They live, though a full redis may have no place for what they say.
    """
    lost = 0
    for worker_id in map(str, await redis.smembers(WORKERS)):
        if worker_id not in heard and not await redis.exists(worker_key(worker_id)):
            keys = [worker_key(worker_id), running_key(worker_id), WORKERS, USAGE, reaped_key(worker_id)]
            arguments = (worker_id, str(USAGE_MAX_ENTRIES), str(REAPED_REMEMBERED_S))
            count = int(await redis.eval(REAP, len(keys), *keys, *arguments))
            lost += max(count, 0)
    return lost


async def is_running(redis: Redis, worker_id: str, uid: str) -> bool:
    """Whether a request was begun on a worker and has not ended. Raises RedisError."""
    return bool(await redis.hexists(running_key(worker_id), uid))


class HeldBackForAll:
    """`here`: the bodies held back; what this gateway adds, all others hear of."""

    def __init__(self, hold_s: int, redis: Redis) -> None:
        self._redis = redis
        self._telling: set[asyncio.Task[None]] = set()
        self.here = HeldBack(hold_s, self._publish)

    def _publish(self, digest: str) -> None:
        task = asyncio.create_task(self._tell(digest))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell(self, digest: str) -> None:
        try:
            await self._redis.publish(CHANNEL_HELD, digest)
        except (RedisError, OSError) as error:
            logger.warning("other gateways do not know of a held-back request", error=str(error))

    async def close(self) -> None:
        """Finish telling."""
        await asyncio.gather(*self._telling, return_exceptions=True)
