"""The jobs service as a FastAPI app: python -m services.jobs serves it behind nginx."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from loguru import logger
from prometheus_client import CollectorRegistry
from starlette.requests import ClientDisconnect

from common import logs
from common.aliases import AliasTable
from common.auth import Authenticator
from common.database import Database
from common.feed import Feed, load_workers
from common.redis.connect import blocking, connect
from common.redis.names import CHANNEL_ALIASES, CHANNEL_KEYS, CHANNEL_WORKERS
from common.serving import exposition, make_api
from common.tasks import end_tasks, start_all
from common.workers import WorkerTable
from services.jobs import tables
from services.jobs.aliases import Aliases
from services.jobs.batch import UNFINISHED
from services.jobs.batch_load import LOOK_EVERY_S, BatchLoad
from services.jobs.batches import Batches
from services.jobs.checks import Checks
from services.jobs.files import ORPHAN_S, Files
from services.jobs.front_door import FrontDoor
from services.jobs.internal import add_internal
from services.jobs.leases import RENEW_EVERY_S, Leases
from services.jobs.legacy import move_in
from services.jobs.means import Means
from services.jobs.metrics import JobsMetrics
from services.jobs.routes import add_routes
from services.jobs.settings import JobsSettings
from services.jobs.trainers import Trainers
from services.jobs.tuning import Tuning

MIGRATIONS = Path(__file__).with_name("migrations")
CHECK_EVERY_S = 0.5


def create(settings: JobsSettings) -> FastAPI:
    """The app."""

    api = make_api(lambda app: running(app, settings))
    api.add_exception_handler(ClientDisconnect, answer_nobody)

    @api.get("/metrics")
    async def metrics(request: Request) -> Response:
        with contextlib.suppress(OSError):  # the rest is as true without it
            request.app.state.metrics.queued.set(await request.app.state.tuning.queued())
        return exposition(request.app.state.registry)

    add_routes(api)
    add_internal(api, settings.trainer_token)
    return api


@contextlib.asynccontextmanager
async def running(app: FastAPI, settings: JobsSettings) -> AsyncIterator[None]:
    """Everything the routes use, and the tasks beside them."""
    redis, table, aliases = connect(settings), WorkerTable(), AliasTable()
    database = Database(settings.database_url, MIGRATIONS)
    await asyncio.to_thread(prepare, settings, database)
    state = app.state
    state.authenticator = authenticator = Authenticator(redis)
    state.files = files = Files(
        database, settings.files_dir, settings.max_file_bytes, settings.max_files_per_key,
        settings.max_stored_bytes_per_key, settings.min_free_bytes,
    )
    state.trainers, state.aliases, state.table = Trainers(database), Aliases(redis), table
    state.tuning = Tuning(
        database, redis, table.base_models, settings.max_waiting_jobs, lambda: state.trainers.trained
    )
    state.registry = registry = CollectorRegistry()
    state.metrics = metrics = JobsMetrics(registry)
    front_door = FrontDoor(settings.gateway_url, settings.service_token)
    load, checks = BatchLoad(redis, table), Checks(database, files)
    means = Means(database, files, redis, front_door, lambda: servable(table, aliases), load.room, metrics)
    leases = Leases(database, tables.batches, UNFINISHED)
    state.batches = batches = Batches(means, leases, settings.max_waiting_batches)

    async def on_connect(connection: Any) -> None:
        authenticator.distrust()
        await load_workers(connection, table)
        await aliases.load(connection)

    feed = Feed(
        lambda: connect(settings, timeout_s=None),
        {CHANNEL_WORKERS: table.take, CHANNEL_KEYS: authenticator.forget, CHANNEL_ALIASES: aliases.take},
        on_connect,
    )
    look_after = Tending(feed, table, files, database)
    background = [asyncio.create_task(feed.run()), *start_all(
        metrics.failures, ("tending", look_after.once, 1.0), ("checks", checks.look, CHECK_EVERY_S),
        ("the leases of batches", batches.look, RENEW_EVERY_S),
        ("the pace of batches", lambda: load.look(lambda: means.in_flight), LOOK_EVERY_S),
    )]
    logger.info("jobs service up")
    try:
        yield
    finally:
        await end_tasks(background)
        for part in (checks, batches, front_door):
            with contextlib.suppress(OSError):
                await part.close()
        await redis.aclose()
        database.close()


def servable(table: WorkerTable, aliases: AliasTable) -> set[str]:
    """Models that a batch may name now."""
    return table.models().keys() | aliases.targets.keys()


def prepare(settings: JobsSettings, database: Database) -> None:
    """The tables of this release, and what an older one left. Blocks. Raises DatabaseAway, RedisError."""
    database.migrate()
    with blocking(settings) as redis:
        move_in(redis, database, settings.files_dir)


SWEEP_EVERY_S, SWEEP_AGAIN_S = 3600.0, 60.0


class Tending:
    """Forgets silent workers; once an hour removes what crashes left on the volume."""

    def __init__(self, feed: Feed, table: WorkerTable, files: Files, database: Database) -> None:
        self._feed, self._table, self._files, self._database = feed, table, files, database
        self._sweep_at = time.monotonic() + ORPHAN_S  # whoever waited for this service registers its files first

    async def once(self) -> bool:
        """What is due, every second; whether anything was asked. Raises OSError."""
        self._table.tend(connected=self._feed.connected)
        if time.monotonic() < self._sweep_at:
            return False
        self._sweep_at = time.monotonic() + SWEEP_AGAIN_S
        if removed := await self._files.sweep():
            logger.info("removed files without a record", count=removed)
        await asyncio.to_thread(self._database.tidy)
        self._sweep_at = time.monotonic() + SWEEP_EVERY_S
        return True


async def answer_nobody(request: Request, error: Exception) -> Response:
    """The client left in the middle of its upload; nothing of it was kept, and nobody reads this."""
    return Response(status_code=499)


def from_environment() -> FastAPI:
    """The factory that uvicorn calls."""
    settings = JobsSettings()  # filled from the environment
    logs.configure("jobs", settings.log_level)
    return create(settings)
