"""The record of a request, and its way into redis without waiting for redis.

`Recorder.begin` and `Recorder.end` only append to memory. A background task writes both every
FLUSH_INTERVAL_S: what began but has not ended goes to `running:{worker}`, what ended goes to the `usage`
stream, and one MULTI does both, so each request ends up in the stream exactly once. When a worker is lost,
any gateway turns what it left in `running:{worker}` into `upstream_error` records (`REAP`).
"""

import asyncio
from collections import deque
from typing import Literal

import msgspec
from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from gateway.store import USAGE, USAGE_MAX_ENTRIES, running_key

FLUSH_INTERVAL_S = 0.05
MAX_UNWRITTEN = 20_000

Outcome = Literal[
    "ok",
    "client_error",  # the worker answered 4xx
    "cancelled",  # the client left
    "refused",  # the worker answered 503 and ran nothing
    "upstream_error",  # the worker failed before the first byte
    "stream_error",  # 200 was sent, then the stream broke
]


class Record(msgspec.Struct):
    """One request on one worker. Times are seconds; `started_at` is Unix time; tokens are counts."""

    request_id: str
    key: str
    model: str
    route: str
    worker: str
    started_at: float
    adapter: str = ""
    stream: bool = False
    attempt: int = 1
    outcome: Outcome = "upstream_error"
    status: int = 0
    finish_reason: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    tokens_estimated: bool = False
    ttft_s: float | None = None
    duration_s: float = 0.0


_encode = msgspec.json.Encoder().encode

# KEYS[1] worker:{id}  KEYS[2] running:{id}  KEYS[3] workers  KEYS[4] usage ; ARGV[1] id  ARGV[2] max entries
# Returns how many requests were lost, or -1 when the worker is alive.
REAP = """
if redis.call('EXISTS', KEYS[1]) == 1 then return -1 end
local left = redis.call('HVALS', KEYS[2])
for _, record in ipairs(left) do
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[2], '*', 'r', record)
end
redis.call('DEL', KEYS[2])
redis.call('SREM', KEYS[3], ARGV[1])
return #left
"""


class Recorder:
    """Collects records in memory and writes them in batches.

    At most MAX_UNWRITTEN records wait; while redis is away longer than that, the oldest are dropped and
    counted in `dropped` (their log line stays).
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._begun: dict[tuple[str, str], Record] = {}
        self._shown: set[tuple[str, str]] = set()
        self._ended: deque[Record] = deque()
        self._task: asyncio.Task[None] | None = None
        self.dropped = 0

    def begin(self, record: Record) -> None:
        """Note that a request reached a worker."""
        self._begun[record.worker, record.request_id] = record
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="recorder")

    def end(self, record: Record) -> None:
        """Note how it ended."""
        self._begun.pop((record.worker, record.request_id), None)
        if len(self._ended) >= MAX_UNWRITTEN:
            self._ended.popleft()
            self.dropped += 1
        self._ended.append(record)

    async def flush(self) -> None:
        """Write what waits. Raises RedisError; nothing is lost then, the next flush repeats it."""
        ended = list(self._ended)
        fresh = [(at, record) for at, record in self._begun.items() if at not in self._shown]
        if not ended and not fresh:
            return
        async with self._redis.pipeline(transaction=True) as pipe:
            for (worker, request_id), record in fresh:
                pipe.hset(running_key(worker), request_id, _encode(record).decode())
            for record in ended:
                pipe.xadd(USAGE, {"r": _encode(record).decode()}, maxlen=USAGE_MAX_ENTRIES, approximate=True)
                if (record.worker, record.request_id) in self._shown:
                    pipe.hdel(running_key(record.worker), record.request_id)
            await pipe.execute()
        self._shown.update(at for at, _ in fresh)
        for record in ended:
            self._ended.popleft()
            self._shown.discard((record.worker, record.request_id))

    async def close(self) -> None:
        """Stop the background task and write the rest once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            await self.flush()
        except RedisError as error:
            logger.error("usage records lost at shutdown", count=len(self._ended), error=str(error))
        await self._redis.aclose()

    async def _run(self) -> None:
        healthy = True
        while True:
            await asyncio.sleep(FLUSH_INTERVAL_S if healthy else 1.0)
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
