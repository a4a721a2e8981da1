"""Requests that wait for a model that sleeps. Workers look for `wake:{model}`, which is there while somebody waits."""

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Sequence

from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from common import errors
from common.redis.names import wake_key
from common.tasks import end_tasks
from common.workers import Worker, WorkerTable

LOOK_EVERY_S = 0.02
WISH_EVERY_S = 1.0
WISH_TTL_S = 5
MAX_WAITING = 256
"""Requests that wait for one model here; more are told to come back."""
UNKNOWN_WAKE_S = 30


class Waking:
    """Who waits for what."""

    def __init__(self, redis: Redis, table: WorkerTable, patience_s: float) -> None:
        self._redis, self._table, self._patience_s = redis, table, patience_s
        self._name = secrets.token_hex(4)
        self._waiting: dict[str, int] = {}
        self._wishing: dict[str, asyncio.Task[None]] = {}
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._until: dict[str, float] = {}
        """How long a model is wished for though nobody waits: they were told to come back."""

    def wait(self, model: str, sleepers: Sequence[Worker]) -> Awaitable[None]:
        """Until a worker that serves the model is awake. Raises Unavailable, at once when it would take too long."""
        expected_s = min((worker.beat.wake_s for worker in sleepers), default=0.0)
        held = {worker.beat.held for worker in sleepers}
        if "" not in held:
            raise errors.Unavailable(
                f"The model {model!r} sleeps while its GPU is used for {held.pop()}.",
                code="model_asleep", retry_after_s=UNKNOWN_WAKE_S,
            )
        base = next(m.parent or m.id for m in sleepers[0].beat.models if m.id == model)
        if self._waiting.get(base, 0) >= MAX_WAITING:
            raise errors.Unavailable(
                f"{MAX_WAITING} requests wait for the model {model!r} already.",
                code="model_waking", retry_after_s=self._retry_after_s(expected_s),
            )
        if expected_s > self._patience_s:
            self._until[base] = time.monotonic() + expected_s + WISH_TTL_S
            self._wish(base)
            raise errors.Unavailable(
                f"The model {model!r} is being woken; that takes about {expected_s:.0f} s.",
                code="model_waking", retry_after_s=self._retry_after_s(expected_s),
            )
        return self._until_awake(model, base, expected_s)

    async def close(self) -> None:
        """Wish no more."""
        await end_tasks([*self._wishing.values(), *self._looking.values()])

    async def _until_awake(self, model: str, base: str, expected_s: float) -> None:
        self._waiting[base] = self._waiting.get(base, 0) + 1
        self._wish(base)
        if (look := self._looking.get(model)) is None or look.done():
            look = self._looking[model] = asyncio.create_task(self._look(model, base))
        try:
            async with asyncio.timeout(self._patience_s):
                await asyncio.shield(look)
        except TimeoutError:
            raise errors.Unavailable(
                f"The model {model!r} did not wake within {self._patience_s:.0f} s (WAKE_PATIENCE_S).",
                code="model_waking", retry_after_s=self._retry_after_s(expected_s),
            ) from None
        finally:
            self._waiting[base] -= 1

    async def _look(self, model: str, base: str) -> None:
        """Until a worker serves the model: once for all who wait for it, or until none does."""
        while not self._table.serving(model).workers and self._waiting.get(base):  # noqa: ASYNC110 - the table tells nobody
            await asyncio.sleep(LOOK_EVERY_S)

    def _wish(self, base: str) -> None:
        """Say that it is waited for, as long as it is."""
        if (wishing := self._wishing.get(base)) is None or wishing.done():
            self._wishing[base] = asyncio.create_task(self._keep_wishing(base))

    async def _keep_wishing(self, base: str) -> None:
        key, away = wake_key(base), False
        while True:
            try:
                async with self._redis.pipeline(transaction=True) as pipe:
                    pipe.hset(key, self._name, str(self._waiting.get(base, 0)))
                    pipe.expire(key, WISH_TTL_S)
                    await pipe.execute()
                away = False
            except (RedisError, OSError) as error:
                if not away:
                    logger.warning("a model is not woken", model=base, error=str(error) or type(error).__name__)
                away = True
            await asyncio.sleep(WISH_EVERY_S)
            if not self._waiting.get(base) and time.monotonic() > self._until.get(base, 0.0):
                self._waiting.pop(base, None)
                self._until.pop(base, None)
                return  # the wish is forgotten by itself, after enough time for a worker to have seen it

    @staticmethod
    def _retry_after_s(expected_s: float) -> int:
        return math.ceil(expected_s) or UNKNOWN_WAKE_S
