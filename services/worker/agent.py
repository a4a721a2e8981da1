"""One worker's life: start, announce, drain, stop. What ends it, its engine's death or a signal, comes at any time.

A worker that shares its place with others lives that life again and again: it sleeps until requests wait for it and it
is its turn, and sleeps again when others wait for theirs.
"""

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine
from typing import Any

from loguru import logger
from redis.exceptions import RedisError

from common.adapters import read_registry
from common.redis.connect import connect
from common.redis.names import ADAPTERS
from common.sizing.cards import CannotSay
from common.tasks import end_tasks, repeat
from common.workers import Model, State
from services.worker import engines, preflight
from services.worker.engines.base import Engine, EngineSilent
from services.worker.heartbeat import Heart
from services.worker.process import Process
from services.worker.profiling import Profiler
from services.worker.reconcile import Reconciler
from services.worker.settings import WorkerSettings
from services.worker.turns import Turns

ASK_EVERY_S = 0.1
LATE_DECISIONS_S = 0.3
"""Decisions that were made before gateways heard of the draining arrive within this."""
LIST_EVERY_S = 1.0
ROOM_S = 10.0
"""Longer than whoever starts a worker anew takes for a start that failed, after a few of which it gives up."""


class EngineDied(Exception):
    """The engine ended by itself, or never came up."""


class Agent:
    """One engine, watched and announced. `stopping` is set by whoever wants it to leave."""

    def __init__(self, settings: WorkerSettings, engine: Engine | None = None) -> None:
        self._settings = settings
        # A new id each start: what a former life left running can be settled at once.
        worker_id = f"{settings.worker_name}-{secrets.token_hex(2)}"
        self._engine = engine or engines.make(settings, worker_id)
        self._process = Process(self._engine.command(), self._engine.environment())
        self._redis = connect(settings)
        self.heart = Heart(self._redis, self._engine, worker_id, settings.heartbeat_s, settings.stall_s)
        self.heart.alive_file, self.heart.on_demand = settings.alive_file, settings.on_demand
        self._turns = Turns(self._redis, settings, self.heart) if settings.shared_place else None
        self._models = [Model(settings.served_name, settings.max_model_len)]
        self._profiler = None if settings.profile_dir is None or self._engine.name != "vllm" else Profiler(
            settings, settings.profile_dir, lambda: self._process.pid
        )  # fmt: skip
        self._patience_s = math.inf if self._engine.elsewhere else settings.stall_restart_s
        self.stopping = asyncio.Event()
        self.came_up = False
        """Whether its engine ever was ready."""

    async def run(self) -> int:
        """Until told to stop (0) or the engine dies (1)."""
        try:
            preflight.check(self._settings)
        except CannotSay as error:
            logger.error("engine died", worker=self.heart.beat.id, reason=str(error))
            return 1
        self._engine.clean_up()
        turning = [] if self._turns is None else [asyncio.create_task(self._turns.run())]
        try:
            while await self._live_once():
                pass
            return 0
        except EngineDied as error:
            logger.error("engine died", worker=self.heart.beat.id, reason=str(error))
            return 1
        finally:
            await self.heart.tell("gone")
            await self._process.stop()
            self._engine.clean_up()
            await end_tasks(turning)
            if self._turns is not None:
                with contextlib.suppress(RedisError, OSError):  # else it is forgotten after a while
                    await self._turns.leave()
            # Only now: a gateway settles as lost whatever a worker without this key left running.
            await self.heart.forget()
            await self._engine.close()
            await self._redis.aclose()

    async def _live_once(self) -> bool:
        """From one sleep to the next; False: told to stop. Raises EngineDied."""
        if self._turns is not None:
            async with self._resting("asleep"), self._listing_adapters():
                if not await self._unless_stopped(self._turns.may_wake()):
                    return False
            self._turns.is_now("waking")
        async with self._resting("waking"):
            if not await self._unless_stopped(self._wake()):
                return False
        if self._turns is None:
            await self._unless_stopped(self._serve_and_be_profiled())
        else:
            self._turns.is_now("awake")
            asked = await self._unless_stopped(self._first(self._serve_and_be_profiled(), self._turns.must_sleep()))
            if asked and await self._unless_stopped(self._first(self._watch(), self._drain("asleep", math.inf))):
                async with self._resting("asleep"):
                    await self._put_to_sleep(self._turns)
                return True
        await self._unless_died(self._drain("draining", self._settings.drain_timeout_s))
        return False

    @contextlib.asynccontextmanager
    async def _resting(self, state: State) -> AsyncIterator[None]:
        """Say so meanwhile; who shares no place is announced only when it can be asked."""
        tasks = [] if self._turns is None else [asyncio.create_task(self.heart.rest(state))]
        try:
            yield
        finally:
            await end_tasks(tasks)

    @contextlib.asynccontextmanager
    async def _listing_adapters(self) -> AsyncIterator[None]:
        """While it sleeps its tuned models can be asked for too: that wakes it."""
        if not self.heart.beat.models:
            self.heart.serves(self._models, [])

        async def look() -> None:
            registry = read_registry(await self._redis.hgetall(ADAPTERS))
            base = self._models[0]
            self.heart.serves(self._models, [
                Model(a.name, base.max_model_len, a.created, base.id, format=base.format)
                for a in registry.values() if a.base == base.id
            ])  # fmt: skip

        serving = self._engine.adapters is not None
        tasks = [asyncio.create_task(repeat("the list of adapters", look, LIST_EVERY_S))] if serving else []
        try:
            yield
        finally:
            await end_tasks(tasks)

    async def _wake(self) -> None:
        """The engine started, or woken, and announced. Raises EngineDied."""
        began, worker_id = time.monotonic(), self.heart.beat.id
        if self._process.runs:
            try:
                await self._engine.wake()
            except EngineSilent as error:
                raise EngineDied(f"does not wake: {error}") from error
        else:
            await self._find_room()
            pid = await self._process.start()
            logger.info(
                "engine starting", worker=worker_id, pid=pid, engine=self._engine.name, model=self._settings.model
            )
        # Its death is noticed from here on.
        await self._unless_died(self._come_up())
        if self._turns is not None:
            self.heart.beat.wake_s = round(time.monotonic() - began, 1)

    async def _find_room(self) -> None:
        """Until its memory is free, or for ROOM_S: what another gives free takes a moment. Raises EngineDied."""
        deadline = time.monotonic() + (0.0 if self._turns is None else ROOM_S)
        while True:
            try:
                return await asyncio.to_thread(preflight.check_free, self._settings)  # a driver may take seconds
            except CannotSay as error:
                if time.monotonic() >= deadline:
                    raise EngineDied(str(error)) from error
            await asyncio.sleep(ASK_EVERY_S)

    async def _put_to_sleep(self, turns: Turns) -> None:
        """Its memory is free when this is over."""
        if not await self._engine.sleep():
            await self._process.stop()
            self._engine.clean_up()
        turns.is_now("asleep")
        self.heart.beat.waiting, self.heart.beat.kv_use = 0, 0.0
        logger.info("engine asleep", worker=self.heart.beat.id, process="kept" if self._process.runs else "stopped")

    async def _come_up(self) -> bool:
        """Until the engine is healthy and has said what it serves."""
        started, silence = time.monotonic(), ""
        while True:
            try:
                if await self._engine.healthy():
                    self._models = await self._engine.models()
                    self.heart.beat.engine, self.heart.beat.slots = self._engine.name, self._engine.slots
                    self.heart.serves(self._models, [])
                    self.came_up = True
                    logger.info("engine ready", worker=self.heart.beat.id, after_s=round(time.monotonic() - started, 1))
                    return True
            except EngineSilent as error:
                silence = f"; it says: {error}"
            if time.monotonic() - started > self._settings.start_timeout_s:
                raise EngineDied(f"not healthy after START_TIMEOUT_S={self._settings.start_timeout_s:g}{silence}")
            await asyncio.sleep(ASK_EVERY_S)

    async def _serve_and_be_profiled(self) -> None:
        """Serve; out of rotation whenever a profile is wished for, and back."""
        if self._profiler is None:
            await self._serve()
            return
        while True:
            await self._first(self._serve(), self._profiler.wished())
            await self._first(self._watch(), self._drain("draining", self._settings.drain_timeout_s))
            self.heart.profiled = True
            try:
                await self._first(self.heart.rest("draining"), self._profiler.run())
            finally:
                self.heart.profiled, self.heart.beat.held = False, ""  # whose place it is, is said again in a second

    async def _serve(self) -> None:
        """Heartbeats, and adapters beside them, until somebody ends it."""
        work: list[Coroutine[Any, Any, None]] = [self.heart.run(), self._watch()]
        if self._engine.adapters is not None and self._settings.adapters_dir is not None:
            work.append(self._reconciler().run())
        tasks = [asyncio.create_task(each) for each in work]
        try:
            await asyncio.gather(*tasks)  # none ends by itself, unless by a bug that is better seen
        finally:
            await end_tasks(tasks)

    @staticmethod
    async def _first(one: Coroutine[Any, Any, None], other: Coroutine[Any, Any, None]) -> None:
        """Until one of the two is over, and raises what it raises."""
        tasks = [asyncio.create_task(one), asyncio.create_task(other)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await end_tasks(tasks)

    async def _watch(self) -> None:
        """Raises EngineDied once it has been stalled for too long: whoever starts us starts it anew."""
        while True:
            await asyncio.sleep(min(1.0, self._patience_s / 4))
            if self.heart.stalled_s > self._patience_s:
                raise EngineDied(f"stalled for STALL_RESTART_S={self._patience_s:g}; started again")

    def _reconciler(self) -> Reconciler:
        assert self._engine.adapters is not None  # noqa: S101 - asked before
        assert self._settings.adapters_dir is not None  # noqa: S101 - asked before

        def announce(adapters: list[Model]) -> None:
            self.heart.serves(self._models, adapters)

        return Reconciler(
            self._engine.adapters, lambda: self._redis.hgetall(ADAPTERS), self._models[0],
            self._settings.adapters_dir, announce, quiet_s=2 * self._settings.heartbeat_s,
        )

    async def _drain(self, state: State, patience_s: float) -> None:
        """Out of the table first, then wait for what runs."""
        deadline = time.monotonic() + patience_s
        await self.heart.tell(state)
        await asyncio.sleep(min(LATE_DECISIONS_S, patience_s))
        while time.monotonic() < deadline:
            await self.heart.observe()
            if not self.heart.busy:
                break
            await self.heart.tell(state)
            await asyncio.sleep(self._settings.heartbeat_s)
        logger.info("drained", worker=self.heart.beat.id, left=self.heart.beat.in_flight)

    async def _unless_stopped(self, work: Awaitable[Any]) -> bool:
        """Do something until it is done or the agent is told to stop; whether it was done. Raises EngineDied."""
        stopped = asyncio.create_task(self.stopping.wait())
        doing = asyncio.ensure_future(self._unless_died(work))
        try:
            await asyncio.wait({doing, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                doing.result()
                return True
            return False
        finally:
            await end_tasks([doing, stopped])

    async def _unless_died(self, work: Awaitable[Any]) -> None:
        """Do something while the engine lives. Raises EngineDied."""
        died = asyncio.create_task(self._process.wait())
        doing = asyncio.ensure_future(work)
        try:
            await asyncio.wait({doing, died}, return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                raise EngineDied(f"exit status {died.result()}")
            doing.result()
        finally:
            await end_tasks([doing, died])
