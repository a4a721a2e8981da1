"""The record of a request, and its way into redis without waiting for redis.

`Recorder.begin` and `Recorder.end` only append to memory. A background task writes: at once when a request ended
(what ends meanwhile makes the next batch), else every FLUSH_INTERVAL_S. What began but has not ended goes to
`running:{worker}`, what ended goes to the `usage` stream; one script does both, once per batch, so each request ends
up in the stream once. When a worker is lost, any gateway turns what it left in `running:{worker}` into
`upstream_error` records (`REAP`).
"""

import asyncio
import contextlib
import secrets
from collections import deque
from itertools import islice

import msgspec
from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.records import Record
from common.redis.names import USAGE, USAGE_MAX_ENTRIES, flushed_key, running_key
from common.redis.scripts import FLUSH

FLUSH_INTERVAL_S = 0.05
RETRY_S = 1.0
MAX_UNWRITTEN = 20_000


_encode = msgspec.json.Encoder().encode
BATCH_REMEMBERED_S = 3600
MAX_BATCH = 500

At = tuple[str, str]
"""(worker id, record id): what a record is called until it is in the stream."""


class Recorder:
    """Collects records in memory and writes them in batches.

    At most MAX_UNWRITTEN records wait; while redis is away longer than that, the newest are dropped and
    counted in `dropped` (their log line stays).
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._name = secrets.token_hex(8)
        self._batches = 0
        self._begun: dict[At, Record] = {}
        self._shown: set[At] = set()
        self._ended: deque[Record] = deque()
        self._sending: tuple[str, list[At], int, list[str]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._stopping = False
        self.dropped = 0

    def begin(self, record: Record) -> None:
        """Note that a request reached a worker."""
        self._begun[record.worker, record.id] = record
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="recorder")

    def end(self, record: Record) -> None:
        """Note how it ended."""
        self._begun.pop((record.worker, record.id), None)
        if len(self._ended) >= MAX_UNWRITTEN:
            self.dropped += 1
            return
        self._ended.append(record)
        self._wake.set()

    async def flush(self) -> None:
        """Write what waits. Raises RedisError; nothing is lost or doubled then, the next flush repeats the batch."""
        while True:
            if self._sending is None:
                self._sending = self._next_batch()
            if self._sending is None:
                return
            batch, fresh, ended, args = self._sending
            await self._redis.eval(FLUSH, 2, USAGE, batch, *args)
            self._sending = None
            self._shown.update(fresh)
            for _ in range(ended):
                record = self._ended.popleft()
                self._shown.discard((record.worker, record.id))

    def _next_batch(self) -> tuple[str, list[At], int, list[str]] | None:
        ended = list(islice(self._ended, MAX_BATCH))
        fresh = [at for at in self._begun if at not in self._shown]
        if not ended and not fresh:
            return None
        self._batches += 1
        args = [str(BATCH_REMEMBERED_S), str(USAGE_MAX_ENTRIES), str(len(fresh))]
        for record in [*[self._begun[at] for at in fresh], *ended]:
            args += [running_key(record.worker), record.id, _encode(record).decode()]
        return flushed_key(f"{self._name}:{self._batches}"), fresh, len(ended), args

    async def close(self) -> None:
        """Stop the background task after the batch it is at, and write the rest."""
        self._stopping = True
        self._wake.set()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            await self.flush()
        except (RedisError, OSError) as error:
            logger.error("usage records lost at shutdown", count=len(self._ended), error=str(error))
        await self._redis.aclose()

    async def _run(self) -> None:
        healthy = True
        while not self._stopping:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), FLUSH_INTERVAL_S)
            self._wake.clear()
            if not healthy:
                await asyncio.sleep(RETRY_S)
            try:
                await self.flush()
            except (RedisError, OSError) as error:
                if healthy:
                    logger.warning("redis does not take usage records; keeping them in memory", error=str(error))
                healthy = False
            else:
                if not healthy:
                    logger.info("redis takes usage records again", dropped=self.dropped)
                healthy = True
