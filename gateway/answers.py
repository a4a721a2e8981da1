"""Answers from memory, as the path asks for them.

Look-ups of one turn of the event loop are one MGET. Whoever asks what is being answered right now waits for the stored
answer, never for the first one's client. A question is in flight until its answer stands in redis-cache, or its
request no longer runs (`running:{worker}`): then one of those who wait goes on alone, and the others wait for that one.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from loguru import logger
from prometheus_client import Counter

from common.answers.store import Store, Stored
from common.answers.transcript import Document
from common.metering.context import Keep
from gateway.question import Question
from gateway.steps import Steps

POLL_S, POLL_SHARE, MAX_POLL_S = 0.025, 0.05, 0.25
"""Looked after a twentieth of the time that the answer has taken so far, within these bounds."""
RUNNING_EVERY_S = 0.25
"""Between two looks at whether the question's request still runs."""
GRACE_S = 0.5
"""A request may take so long from its decision to its entry in `running:{worker}`."""
UNKNOWN_S = 5.0
"""Nobody can tell whether it runs, redis being away: after so long nobody waits for it any more."""
MAX_FLIGHTS = 2_000

IsRunning = Callable[[str, str], Awaitable[bool | None]]
"""(worker id, request's uid) -> whether it runs there; None when nobody can tell."""


@dataclass(slots=True)
class Flight:
    """A question that is being answered."""

    uid: str
    worker_id: str
    since: float
    batch: bool = False
    """A batch's, which may take long: nobody who sits before it waits for it."""
    over: "asyncio.Future[Stored | None] | None" = None
    """There once somebody waits: what stands in the store at its end."""
    watch: "asyncio.Task[None] | None" = field(default=None)


class Answers:
    """Memory for one gateway process. `count` hears: hit, joined (the same was being answered), miss."""

    def __init__(self, store: Store, is_running: IsRunning, count: Counter, ttl_s: int, max_bytes: int,
                 longest_s: float) -> None:
        self._store, self._is_running = store, is_running
        self._counts = {result: count.labels(result) for result in ("hit", "joined", "miss")}
        self._ttl_s, self._max_bytes, self._longest_s = ttl_s, max_bytes, longest_s
        self._asked: dict[str, asyncio.Future[Stored | None]] = {}
        self._flights: dict[str, Flight] = {}
        self._reading: set[asyncio.Task[None]] = set()

    def find(self, question: Question, *, batch: bool = False) -> Steps[tuple[Document | None, bool]]:
        """(the answer given before, whether it may be kept otherwise). Waits while the same is being answered."""
        result = "hit"
        while True:
            stored: Stored | None = yield self._look_up(question.name)
            flight = self._flights.get(question.name)
            if stored is not None and flight is not None:
                self._end(question.name, stored)
            if stored is not None or flight is None or self._store.away or (flight.batch and not batch):
                break
            result = "joined"
            stored = yield self._follow(question.name, flight)
            if stored is not None:
                break
        document = stored.document if stored is not None else None
        self._counts[result if document is not None else "miss"].inc()
        return document, stored is None

    def lead(self, question: Question, uid: str, worker_id: str, *, batch: bool = False) -> Keep:
        """This request answers the question from now on; what its worker is told about keeping the answer."""
        flight = self._flights.get(question.name)
        if flight is not None and flight.uid == uid:
            self.moved(question.name, uid, worker_id)  # another attempt of the same request
        elif not self._store.away and (flight is None or (flight.batch and not batch)):
            if flight is None and len(self._flights) >= MAX_FLIGHTS:
                oldest = next(iter(self._flights))  # rather one that nobody waits for
                self._end(next((name for name, f in self._flights.items() if f.over is None), oldest), None)
            self._flights[question.name] = Flight(uid, worker_id, time.monotonic(), batch)
        return Keep(question.name, self._ttl_s, worker_id, self._max_bytes)

    def moved(self, name: str, uid: str, worker_id: str) -> None:
        """The request that leads a question is tried on another worker."""
        if (flight := self._flights.get(name)) is not None and flight.uid == uid:
            flight.worker_id, flight.since = worker_id, time.monotonic()

    def failed(self, name: str, uid: str) -> None:
        """The request that led a question goes nowhere any more."""
        if (flight := self._flights.get(name)) is not None and flight.uid == uid:
            self._end(name, None)

    def tend(self) -> None:
        """Call it every second: forget questions that nobody waits for and that must be over."""
        oldest = time.monotonic() - self._longest_s
        for name in [n for n, flight in self._flights.items() if flight.since < oldest and flight.over is None]:
            del self._flights[name]

    async def close(self) -> None:
        """Nobody waits any more."""
        watches = [flight.watch for flight in self._flights.values() if flight.watch is not None]
        for task in watches:
            task.cancel()
        await asyncio.gather(*watches, *self._reading, return_exceptions=True)
        await self._store.close()

    def _look_up(self, name: str) -> Awaitable[Stored | None]:
        future = self._asked.get(name)
        if future is None:
            loop = asyncio.get_running_loop()
            if not self._asked:
                loop.call_soon(self._send)
            future = self._asked[name] = loop.create_future()
        return asyncio.shield(future)  # whoever leaves must not end it for the others

    def _send(self) -> None:
        asked, self._asked = self._asked, {}
        task = asyncio.create_task(self._read(asked))
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)

    async def _read(self, asked: "dict[str, asyncio.Future[Stored | None]]") -> None:
        found: list[Stored | None] = [None] * len(asked)
        try:
            found = await self._store.read(list(asked))
        except Exception:  # a bug of ours must not leave anybody waiting
            logger.exception("answers could not be looked up")
        finally:
            for future, stored in zip(asked.values(), found, strict=True):
                if not future.done():
                    future.set_result(stored)

    def _follow(self, name: str, flight: Flight) -> Awaitable[Stored | None]:
        if flight.over is None:
            flight.over = asyncio.get_running_loop().create_future()
            flight.watch = asyncio.create_task(self._watch(name, flight))
        return asyncio.shield(flight.over)

    async def _watch(self, name: str, flight: Flight) -> None:
        """Until the answer is there, or will not come."""
        stored: Stored | None = None
        looked_at = float("-inf")
        try:
            while (age_s := time.monotonic() - flight.since) < self._longest_s:
                if age_s >= GRACE_S and time.monotonic() - looked_at >= RUNNING_EVERY_S:
                    looked_at = time.monotonic()
                    running = await self._is_running(flight.worker_id, flight.uid)
                    if running is False or (running is None and age_s > UNKNOWN_S):
                        stored = await self._look_up(name)  # it may have ended, stored, just before
                        break
                await asyncio.sleep(min(MAX_POLL_S, max(POLL_S, POLL_SHARE * age_s)))
                if (stored := await self._look_up(name)) is not None or self._store.away:
                    break
        except Exception:
            logger.exception("a question in flight could not be watched")
        finally:
            if self._flights.get(name) is flight:
                del self._flights[name]
            if flight.over is not None and not flight.over.done():
                flight.over.set_result(stored)

    def _end(self, name: str, stored: Stored | None) -> None:
        flight = self._flights.pop(name)
        if flight.over is not None and not flight.over.done():
            flight.over.set_result(stored)
        if flight.watch is not None:
            flight.watch.cancel()
