"""The ledger as a FastAPI app: python -m services.ledger serves it behind nginx."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from loguru import logger
from prometheus_client import CollectorRegistry

from common import logs
from common.auth import Authenticator
from common.database import Database
from common.feed import Feed, load_workers
from common.redis.connect import blocking, connect
from common.redis.names import CHANNEL_KEYS, CHANNEL_WORKERS, wake_key
from common.serving import Owner, exposition, make_api
from common.tasks import end_tasks, failures_counter, start_all
from common.workers import SLEEPING, WorkerTable
from services.ledger.costs import Costs
from services.ledger.legacy import move_in
from services.ledger.live import LastHour, LastMinute, Speeds, describe
from services.ledger.metrics import LedgerMetrics
from services.ledger.neighbours import LOOK_EVERY_S, Neighbours
from services.ledger.settings import LedgerSettings
from services.ledger.tables import ALL
from services.ledger.usage import ENTRIES_AT_ONCE, Books, total

COST_EVERY_S = 5
FOLLOW_EVERY_S = 0.2
"""Records are added up together: one transaction for all that came in so long."""
MIGRATIONS = Path(__file__).with_name("migrations")


class Ledger:
    """Everything the routes read, and the tasks that keep it fresh."""

    def __init__(self, settings: LedgerSettings) -> None:
        self._redis = connect(settings)
        self._database = Database(settings.database_url, MIGRATIONS)
        self._settings = settings
        self.registry = CollectorRegistry()
        self._failures = failures_counter(self.registry)
        self.metrics = LedgerMetrics(self.registry)
        self.authenticator = Authenticator(self._redis)
        self.table = WorkerTable()
        self.books = Books(connect(settings, timeout_s=5.0), self._database)
        self.costs = Costs(self._database, settings.hourly_usd, settings.budget_usd)
        self.last_minute = LastMinute()
        self.speeds = Speeds()
        self._wished: dict[str, int] = {}
        """Requests that wait for a sleeping worker, by its id."""
        self.last_hour = LastHour()
        self.neighbours = Neighbours(settings.gpu_exporter_url, settings.prometheus_url)
        self._tokens_today = 0
        self._feed = Feed(
            lambda: connect(settings, timeout_s=None),
            {CHANNEL_WORKERS: self.table.take, CHANNEL_KEYS: self.authenticator.forget},
            self._on_connect,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """With its tasks."""
        await asyncio.to_thread(prepare, self._settings, self._database)
        self.metrics.show(self.costs)
        tasks = [asyncio.create_task(self._feed.run()), *start_all(
            self._failures, ("the usage stream", self._follow, FOLLOW_EVERY_S), ("tending", self._tend, 1.0),
            ("the count of money", self._count_money, COST_EVERY_S),
            ("the look at neighbours", self.neighbours.look, LOOK_EVERY_S),
        )]
        logger.info("ledger up")
        try:
            yield
        finally:
            await end_tasks(tasks)
            await self.neighbours.close()
            await self.books.close()
            await self._redis.aclose()
            self._database.close()

    async def _on_connect(self, redis: Any) -> None:
        self.authenticator.distrust()
        await load_workers(redis, self.table)

    async def _follow(self) -> None:
        """What has come into the usage stream. Raises RedisError, DatabaseAway."""
        while records := await self.books.next_records():
            self.metrics.count(records)
            self.last_minute.add(records)
            if len(records) < ENTRIES_AT_ONCE // 2:
                break
        self.metrics.lost.set(self.books.lost)
        self.metrics.behind.set(time.time())

    async def _tend(self) -> None:
        """Silent workers, speeds, who waits for sleeping ones; call it every second. Raises RedisError."""
        self.table.tend(connected=self._feed.connected)
        self.speeds.take(self.table.workers.values())
        total = self.total()
        self.last_hour.take(total["tokens_per_s"], int(total["in_flight"]), int(total["waiting"]))
        self._wished = {
            worker.beat.id: sum([int(n) for base in worker.bases for n in await self._redis.hvals(wake_key(base))])
            for worker in list(self.table.workers.values()) if worker.beat.state in SLEEPING
        }

    async def _count_money(self) -> None:
        """Call it every COST_EVERY_S; what it misses is counted at the next tick. Raises DatabaseAway."""
        await self.costs.tick()
        used = await self.books.days(ALL, 1)
        self._tokens_today = _tokens(total(used[0][1])) if used else 0
        self.metrics.show(self.costs)

    def total(self) -> dict[str, float]:
        """All workers together."""
        workers = self.table.workers.values()
        speeds = [self.speeds.of(worker.beat.id) for worker in workers]
        return {
            "ready": self.table.states()["ready"],
            "in_flight": sum(w.beat.in_flight for w in workers),
            "waiting": sum(w.beat.waiting for w in workers),
            "tokens_per_s": round(sum(out for out, _ in speeds), 1),
            "prompt_tokens_per_s": round(sum(read for _, read in speeds), 1),
        }

    def status(self) -> dict[str, object]:
        """What `/v1/status` says."""
        workers = sorted(self.table.workers.values(), key=lambda worker: worker.beat.id)
        speeds = [self.speeds.of(worker.beat.id) for worker in workers]
        return {
            "object": "status",
            "at": time.time(),
            "workers": [
                describe(w.beat, speed) | {"wished": self._wished.get(w.beat.id, 0)}
                for w, speed in zip(workers, speeds, strict=True)
            ],
            "total": self.total(),
            "last_minute": self.last_minute.public(),
            "last_hour": list(self.last_hour.points),
            "gpus": self.neighbours.gpus,
            "host": self.neighbours.host,
            "cost": self.costs.public(self._tokens_today),
            "alerts": self.neighbours.alerts,
        }


def prepare(settings: LedgerSettings, database: Database) -> None:
    """The tables of this release, and what an older one left. Blocks. Raises DatabaseAway, RedisError."""
    database.migrate()
    with blocking(settings) as redis:
        move_in(redis, database)


def _tokens(counts: dict[str, int]) -> int:
    """Prompt and completion tokens together."""
    return counts["prompt_tokens"] + counts["completion_tokens"]


def create(settings: LedgerSettings) -> FastAPI:
    """The app."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.ledger = ledger = Ledger(settings)
        app.state.authenticator = ledger.authenticator
        async with ledger.running():
            yield

    api = make_api(lifespan)
    add_routes(api)
    return api


def add_routes(api: FastAPI) -> None:
    """All of them; `state.ledger` is there once it is up."""

    @api.get("/metrics")
    async def metrics(request: Request) -> Response:
        return exposition(request.app.state.ledger.registry)

    @api.post("/alerts")
    async def alerts(request: Request) -> Response:
        """What Alertmanager sends when nobody else is to be told; nginx does not let anybody in here."""
        for alert in (await request.json()).get("alerts", []):
            labels, notes = alert.get("labels", {}), alert.get("annotations", {})
            level = "INFO" if alert.get("status") == "resolved" or labels.get("severity") == "none" else "WARNING"
            logger.log(level, "alert", alert=labels.get("alertname"), status=alert.get("status"),
                       severity=labels.get("severity"), summary=notes.get("summary"), runbook=notes.get("runbook_url"))
        return Response(status_code=204)

    @api.get("/v1/status")
    async def status(request: Request, _: Owner) -> dict[str, object]:
        """How the stack is doing, for anybody with a key."""
        return dict(request.app.state.ledger.status())

    @api.get("/v1/usage")
    async def usage(
        request: Request, who: Owner, days: Annotated[int, Query(ge=1, le=100)] = 30
    ) -> dict[str, object]:
        """What the asking key has used, by day and model, today first. Days are UTC."""
        found = await request.app.state.ledger.books.days(who, days)
        return {
            "object": "usage", "key": who,
            "days": [{"date": day.isoformat(), "models": models, "total": total(models)} for day, models in found],
        }


def from_environment() -> FastAPI:
    """The factory that uvicorn calls."""
    settings = LedgerSettings()  # filled from the environment
    logs.configure("ledger", settings.log_level)
    return create(settings)
