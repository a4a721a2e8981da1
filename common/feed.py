"""A redis subscription across restarts of redis; and the workers that were there before it."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.redis.names import WORKERS, worker_key
from common.workers import WorkerTable


class Feed:
    """A redis subscription that calls a handler per message, for ever, across redis restarts.

    `on_connect` runs after each (re)connect, once messages are already being collected, so what it reads
    cannot be older than the first message.
    """

    def __init__(
        self,
        connect: Callable[[], Redis],
        handlers: dict[str, Callable[[str], None]],
        on_connect: Callable[[Redis], Awaitable[None]],
    ) -> None:
        self._connect = connect
        self._handlers = handlers
        self._on_connect = on_connect
        self.connected = False
        self.connected_at = 0.0
        self.first = asyncio.Event()
        """Set once it was connected, and `on_connect` has read what there is."""

    async def run(self) -> None:
        """Until cancelled."""
        first = True
        while True:
            redis = self._connect()
            try:
                async with redis.pubsub() as pubsub:
                    await pubsub.subscribe(*self._handlers)
                    await self._on_connect(redis)
                    if not first and not self.connected:
                        logger.info("redis is back")
                    self.connected, self.connected_at = True, time.monotonic()
                    self.first.set()
                    first = False
                    while True:
                        # The ping notices a frozen redis, which keeps the connection open but says nothing.
                        async with asyncio.timeout(2.0):
                            message = await pubsub.get_message(True, timeout=1.0)
                        if message is None:
                            async with asyncio.timeout(1.0):
                                await redis.ping()
                        elif message["type"] == "message":
                            self._handlers[message["channel"]](message["data"])
            except (RedisError, OSError, TimeoutError) as error:
                if self.connected or first:
                    reason = str(error) or type(error).__name__
                    logger.warning("redis is away; deciding from what is known", error=reason)
                self.connected = False
                first = False
            except Exception:  # a bug in a handler must not end the feed
                logger.exception("the feed failed and starts again")
                self.connected = False
            finally:
                with contextlib.suppress(RedisError, OSError, TimeoutError):
                    await redis.aclose()
            await asyncio.sleep(0.5)


async def load_workers(redis: Redis, table: WorkerTable) -> None:
    """Read the workers that are registered now."""
    ids = sorted(map(str, await redis.smembers(WORKERS)))
    if ids:
        for raw in await redis.mget([worker_key(i) for i in ids]):
            if raw is not None:
                table.take(raw)
