"""What the worker says of itself, several times a second: to redis with a time to live, and to whoever listens.

A redis that is away, or full, stops no engine: gateways keep what they heard last, and a message is heard though
nothing can be stored.
"""

import asyncio
import contextlib
import time
from pathlib import Path

import msgspec
from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.redis.names import CHANNEL_WORKERS, HEARTBEAT_TTL_MS, WORKERS, worker_key
from common.tasks import end_tasks
from common.workers import Heartbeat, Model, State
from services.worker.engines.base import Engine, EngineSilent

NUMBERS_EVERY_S = 1.0
TOLD_ANYWAY_S = 0.5
"""An idle worker that has nothing new to say is heard this often. A busy one speaks each time: until then what gateways
count as sent since is wrong."""
STOPPING_TTL_MS = 20_000
"""How long the engine may take to stop before gateways count what it ran as lost."""


class Heart:
    """Observes the engine and tells of it."""

    def __init__(self, redis: Redis, engine: Engine, worker_id: str, every_s: float, stall_s: float) -> None:
        self._redis, self._engine, self._every_s, self._stall_s = redis, engine, every_s, stall_s
        self.beat = Heartbeat(
            id=worker_id, address=engine.address, state="ready", models=[], slots=engine.slots, engine=engine.name,
        )
        self.reading = 0
        """Clients for whom the engine must stay, though it has nothing to do for them."""
        self.profiled = False
        """Whether the engine works for nobody outside, under a profiler."""
        self.alive_file: Path | None = None
        self.on_demand = False
        self._steps: float | None = -1.0
        self._stepped_at = self._heard_at = time.monotonic()
        self._numbers_at = 0.0
        self._heard_of = {"publish": True, "set": True}
        self._told, self._told_at = "", 0.0
        self._saying: asyncio.Task[None] | None = None
        self._used_at = time.monotonic()

    def serves(self, base: list[Model], adapters: list[Model]) -> None:
        """What the next heartbeat lists."""
        self.beat.models = [*base, *adapters]

    async def run(self) -> None:
        """Until cancelled."""
        self._stepped_at = self._heard_at = time.monotonic()
        while True:
            await self.observe()
            await self.tell(self.state(), news_only=True)
            await asyncio.sleep(self._every_s)

    async def rest(self, state: State) -> None:
        """Say that it is so, until cancelled: nobody is to be sent there."""
        while True:
            await self.tell(state, news_only=True)
            await asyncio.sleep(self._every_s)

    @property
    def busy(self) -> bool:
        """Whether somebody is served, or the engine profiled."""
        return self.beat.in_flight + self.reading > 0 or self.profiled

    @property
    def idle_s(self) -> float:
        """How long nobody was."""
        return 0.0 if self.busy else time.monotonic() - self._used_at

    async def observe(self) -> None:
        """Ask the engine for its load, and now and then for its numbers."""
        now = time.monotonic()
        try:
            load = await self._engine.load()
            self.beat.in_flight, self.beat.interactive = load.in_flight, load.interactive
            self.beat.keeps, self.reading = load.keeps, load.reading
            self._heard_at = time.monotonic()
            if now - self._numbers_at >= NUMBERS_EVERY_S:
                self._numbers_at = now
                await self._read_numbers()
        except EngineSilent as error:
            logger.warning("engine does not answer", worker=self.beat.id, error=str(error))
        if self.beat.in_flight == 0:
            self._stepped_at = time.monotonic()
        if self.busy:
            self._used_at = time.monotonic()

    async def _read_numbers(self) -> None:
        numbers, beat = await self._engine.numbers(), self.beat
        if numbers.steps != self._steps:
            self._steps, self._stepped_at = numbers.steps, time.monotonic()
        if numbers.prompt_tokens != beat.prompt_tokens:  # too short to be seen in flight
            self._used_at = time.monotonic()
        beat.waiting, beat.kv_use = numbers.waiting, numbers.kv_use
        beat.prompt_tokens, beat.cached_tokens = numbers.prompt_tokens, numbers.cached_tokens
        beat.generated_tokens = numbers.generated_tokens

    def state(self) -> State:
        """Stalled: the server's process is silent, or requests run while the engine makes no step (vLLM #39863)."""
        now = time.monotonic()
        silent = now - self._heard_at > self._stall_s / 2
        stuck = self._tells_steps and self.beat.in_flight > 0 and now - self._stepped_at > self._stall_s
        return "stalled" if silent or stuck else "ready"

    @property
    def stalled_s(self) -> float:
        """How long it has been stalled; 0.0 when it is not."""
        if self.state() != "stalled":
            return 0.0
        now = time.monotonic()
        stuck_s = now - self._stepped_at if self._tells_steps and self.beat.in_flight else 0.0
        return max(now - self._heard_at, stuck_s)

    @property
    def _tells_steps(self) -> bool:
        """Whether the engine says that it makes steps; of others nobody sees that they are stuck."""
        return self._steps is not None

    async def tell(self, state: State, *, news_only: bool = False) -> None:
        """One heartbeat; with `news_only` an idle worker is silent until it has news, for at most TOLD_ANYWAY_S."""
        if self.alive_file is not None and self._is_well(state, self.alive_file):
            with contextlib.suppress(OSError):  # a full disk makes a check fail, and ends nothing
                self.alive_file.touch()
        if self.profiled:
            self.beat.held = "a profile"
        if state != self.beat.state:
            logger.info("worker state", worker=self.beat.id, was=self.beat.state, now=state)
            self.beat.state = state
        raw = msgspec.json.encode(self.beat).decode()
        lately = time.monotonic() - self._told_at < TOLD_ANYWAY_S
        if news_only and self.beat.in_flight == 0 and raw == self._told and lately:
            return
        self._told = ""  # until it is told
        await self._in_order()
        self._saying = asyncio.create_task(self._say(raw, state))
        await asyncio.shield(self._saying)  # cut off on its way, it could reach redis after the next one

    async def _in_order(self) -> None:
        """Until the heartbeat before this one is over, or given up."""
        if self._saying is not None:
            await asyncio.wait({self._saying}, timeout=TOLD_ANYWAY_S)
            await end_tasks([self._saying])

    async def _say(self, raw: str, state: State) -> None:
        """To whoever listens, and to redis. Raises nothing."""
        try:
            await self._redis.publish(CHANNEL_WORKERS, raw)  # first, and by itself: a full redis still passes it on
            self._worked("publish")
        except (RedisError, OSError) as error:
            self._failed("publish", error)
            return
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.set(worker_key(self.beat.id), raw, px=STOPPING_TTL_MS if state == "gone" else HEARTBEAT_TTL_MS)
                pipe.sadd(WORKERS, self.beat.id)
                await pipe.execute()
            self._worked("set")
            self._told, self._told_at = raw, time.monotonic()
        except (RedisError, OSError) as error:
            self._failed("set", error)

    def _is_well(self, state: State, alive: Path) -> bool:
        """Whether a health check may pass: it answers, or sleeps and wakes by right, or did answer before it slept."""
        rests = state in ("asleep", "waking") or (state == "draining" and self.profiled)
        return state == "ready" or (rests and (self.on_demand or bool(self.beat.held) or alive.exists()))

    async def forget(self) -> None:
        """The engine has stopped: whoever finds something it left running may settle it. Raises nothing."""
        await self._in_order()
        try:
            await self._redis.delete(worker_key(self.beat.id))
        except (RedisError, OSError) as error:
            self._failed("set", error)

    def _failed(self, what: str, error: Exception) -> None:
        if self._heard_of[what]:
            text = "redis is away; still serving" if what == "publish" else "redis stores nothing; still serving"
            logger.warning(text, worker=self.beat.id, error=str(error) or type(error).__name__)
        self._heard_of[what] = False

    def _worked(self, what: str) -> None:
        if not self._heard_of[what]:
            text = "redis is back" if what == "publish" else "redis stores again"
            logger.info(text, worker=self.beat.id)
        self._heard_of[what] = True
