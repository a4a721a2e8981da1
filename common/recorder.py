"""The way of a request's record into redis, without waiting for redis.

`Recorder.begin` and `Recorder.end` only append to memory. A background task writes: at once when a request ended
(what ends meanwhile makes the next flush), else every FLUSH_INTERVAL_S. What began but has not ended goes to
`running:{worker}`, what ended goes to the `usage` stream; one script does both, once per flush. When a worker is lost,
any gateway turns what it left in `running:{worker}` into `upstream_error` records (`REAP`). Whoever takes a record out
of `running:{worker}` writes its entry, so each request has one, also when a worker was only thought to be lost.
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
FLUSH_REMEMBERED_S = 3600
MAX_AT_ONCE = 500

_encode = msgspec.json.Encoder().encode

At = tuple[str, str]
"""(worker id, record id): what a record is called until it is in the stream."""


class Recorder:
    """Collects records in memory and writes them in flushes.

    At most MAX_UNWRITTEN records wait; while redis is away longer than that, the newest are dropped and
    counted in `dropped` (their log line stays).
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._key = flushed_key(secrets.token_hex(8))
        self._flushes = 0
        self._begun: dict[At, Record] = {}
        self._shown: set[At] = set()
        self._ended: deque[Record] = deque()
        self._sending: tuple[list[At], int, list[str]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._news, self._hurry = asyncio.Event(), asyncio.Event()
        self._stopping = False
        self.dropped = 0

    def begin(self, record: Record) -> None:
        """Note that a request reached a worker."""
        self._begun[record.worker, record.id] = record
        self._news.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="recorder")

    def end(self, record: Record) -> None:
        """Note how it ended."""
        self._begun.pop((record.worker, record.id), None)
        at = (record.worker, record.id)
        shown = at in self._shown or (self._sending is not None and at in self._sending[0])
        if len(self._ended) >= MAX_UNWRITTEN and not shown:  # one that was shown as begun has to be taken back
            self.dropped += 1
            return
        self._ended.append(record)
        self._news.set()
        self._hurry.set()

    async def flush(self) -> None:
        """Write what waits. Raises RedisError; nothing is lost or doubled then, the next call repeats it."""
        while True:
            if self._sending is None:
                self._sending = self._next()
            if self._sending is None:
                return
            fresh, ended, args = self._sending
            await self._redis.eval(FLUSH, 2, USAGE, self._key, *args)
            self._sending = None
            self._shown.update(fresh)
            for _ in range(ended):
                record = self._ended.popleft()
                self._shown.discard((record.worker, record.id))

    def _next(self) -> tuple[list[At], int, list[str]] | None:
        ended = list(islice(self._ended, MAX_AT_ONCE))
        fresh = [at for at in self._begun if at not in self._shown]
        if not ended and not fresh:
            return None
        self._flushes += 1
        args = [str(FLUSH_REMEMBERED_S), str(USAGE_MAX_ENTRIES), str(self._flushes), str(len(fresh))]
        for record in [self._begun[at] for at in fresh]:
            args += [running_key(record.worker), record.id, _encode(record).decode()]
        for record in ended:
            shown = "1" if (record.worker, record.id) in self._shown else ""
            args += [running_key(record.worker), record.id, _encode(record).decode(), shown]
        return fresh, len(ended), args

    async def close(self) -> None:
        """Stop the background task after the flush it is at, and write the rest."""
        self._stopping = True
        self._news.set()
        self._hurry.set()
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
            await self._news.wait()
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_INTERVAL_S):
                    await self._hurry.wait()
            self._hurry.clear()
            if not healthy:
                await asyncio.sleep(RETRY_S)
            try:
                await self.flush()
            except (RedisError, OSError) as error:
                if healthy:
                    logger.warning("redis does not take usage records; keeping them in memory", error=str(error))
                healthy = False
                self._news.set()
            except Exception:  # a bug here must not end the writing
                logger.exception("usage records could not be written")
                self._news.set()
                await asyncio.sleep(RETRY_S)
            else:
                if not healthy:
                    logger.info("redis takes usage records again", dropped=self.dropped)
                healthy = True
