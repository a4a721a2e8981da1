"""A worker's turn at the place that it shares (`common/places.py`): when it may wake, when it is to sleep."""

import asyncio
import contextlib

from redis.asyncio import Redis

from common import places
from common.places import Saying, Stage, Turn
from common.redis.names import wake_key
from common.tasks import repeat
from services.worker.heartbeat import Heart
from services.worker.settings import WorkerSettings

LISTEN_EVERY_S = 0.1
"""How often one that sleeps looks for requests that wait for it."""
SAY_EVERY_S = 1.0


class Turns:
    """Says how this worker is, hears whose turn it is. While redis is away everything stays as it is."""

    def __init__(self, redis: Redis, settings: WorkerSettings, heart: Heart) -> None:
        self._redis, self._settings, self._heart = redis, settings, heart
        self._stage: Stage = "asleep"
        self._changed = asyncio.Event()
        self._may_wake, self._must_sleep = asyncio.Event(), asyncio.Event()
        self._unsaid_s = 0.0
        self._releases = False
        """Its place is to be given free before it is wanted again."""

    async def run(self) -> None:
        """Until cancelled."""
        await repeat("the turns of a place", self._look, 0.0)

    async def may_wake(self) -> None:
        """Until it may, and is wished for."""
        await self._may_wake.wait()

    async def must_sleep(self) -> None:
        """Until somebody else wants its place."""
        await self._must_sleep.wait()

    def is_now(self, stage: Stage) -> None:
        """It has got so far; said at once."""
        self._stage, self._releases = stage, stage == "asleep"
        self._may_wake.clear()
        self._must_sleep.clear()
        self._changed.set()

    async def leave(self) -> None:
        """Give the place free. Raises RedisError, OSError."""
        await self._say("asleep", wants=False)

    async def _look(self) -> None:
        stage, wants = self._stage, True
        if self._releases:
            await self.leave()
            self._releases = False
        if stage == "asleep":
            wants = await self._is_wished()
        if wants or self._unsaid_s >= SAY_EVERY_S or self._changed.is_set():
            self._changed.clear()
            turn = await self._say(stage, wants=wants)
            self._unsaid_s = 0.0
            if stage == self._stage:  # else it is about what was
                self._heart.beat.held = "training" if turn.taken else ""
                if stage == "asleep" and wants and turn.holds:
                    self._stage = "waking"  # it has its place, also when nobody wishes for it any more
                    self._may_wake.set()
                elif stage == "awake" and turn.asked:
                    self._must_sleep.set()
        pause_s = LISTEN_EVERY_S if stage == "asleep" else SAY_EVERY_S
        self._unsaid_s += pause_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._changed.wait()

    async def _is_wished(self) -> bool:
        """Whether requests wait for it; one that is always there wishes so itself."""
        return not self._settings.on_demand or bool(await self._redis.exists(wake_key(self._settings.served_name)))

    async def _say(self, stage: Stage, *, wants: bool) -> Turn:
        settings, heart = self._settings, self._heart
        said = Saying(
            settings.worker_name, "turn" if settings.on_demand else "always", wants, stage, heart.busy, heart.idle_s,
            settings.awake_at_once,
        )
        return places.heard(await self._redis.eval(*places.call(settings.shared_place, said)))
