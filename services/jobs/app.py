"""The jobs service as a FastAPI app: python -m services.jobs serves it behind nginx."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from loguru import logger
from prometheus_client import CollectorRegistry
from redis.exceptions import RedisError
from starlette.requests import ClientDisconnect

from common import logs
from common.aliases import AliasTable
from common.auth import Authenticator
from common.feed import Feed, load_workers
from common.redis.connect import connect
from common.redis.names import CHANNEL_ALIASES, CHANNEL_KEYS, CHANNEL_WORKERS
from common.serving import exposition, make_api
from common.tasks import end_tasks, repeat
from common.workers import WorkerTable
from services.jobs.aliases import Aliases
from services.jobs.batch_load import LOOK_EVERY_S, BatchLoad
from services.jobs.batches import Batches
from services.jobs.files import Files
from services.jobs.front_door import FrontDoor
from services.jobs.metrics import JobsMetrics
from services.jobs.routes import add_routes
from services.jobs.settings import JobsSettings
from services.jobs.tuning import Tuning


def create(settings: JobsSettings) -> FastAPI:
    """The app."""

    api = make_api(lambda app: running(app, settings))
    api.state.max_file_bytes = settings.max_file_bytes
    api.add_exception_handler(ClientDisconnect, answer_nobody)

    @api.get("/metrics")
    async def metrics(request: Request) -> Response:
        with contextlib.suppress(RedisError, OSError):  # the rest is as true without it
            request.app.state.metrics.queued.set(await request.app.state.tuning.queued())
        return exposition(request.app.state.registry)

    add_routes(api)
    return api


@contextlib.asynccontextmanager
async def running(app: FastAPI, settings: JobsSettings) -> AsyncIterator[None]:
    """Everything the routes use, and the tasks beside them."""
    redis, table, aliases = connect(settings), WorkerTable(), AliasTable()
    app.state.authenticator = authenticator = Authenticator(redis)
    app.state.files = files = Files(redis, settings.files_dir, settings.max_file_bytes, settings.max_files_per_key)
    app.state.tuning = tuning = Tuning(redis, files, table.base_models, settings.max_waiting_jobs)

    app.state.aliases, app.state.table = Aliases(redis), table
    front_door = FrontDoor(settings.gateway_url, settings.service_token)
    app.state.registry = CollectorRegistry()
    app.state.metrics = metrics = JobsMetrics(app.state.registry)
    load = BatchLoad(redis, table)

    def models() -> set[str]:
        return table.models().keys() | aliases.targets.keys()

    app.state.batches = batches = Batches(
        redis, files, settings.files_dir / "batches", front_door, models, load.room, metrics
    )

    async def on_connect(connection: Any) -> None:
        authenticator.distrust()
        await load_workers(connection, table)
        await aliases.load(connection)
        await tuning.check_again()
        await batches.go_on()

    feed = Feed(
        lambda: connect(settings, timeout_s=None),
        {CHANNEL_WORKERS: table.take, CHANNEL_KEYS: authenticator.forget, CHANNEL_ALIASES: aliases.take},
        on_connect,
    )
    look_after = Tending(feed, table, files)
    background = [
        asyncio.create_task(work)
        for work in (
            feed.run(), repeat("tending", look_after.once, 1.0),
            repeat("the pace of batches", lambda: load.look(lambda: batches.in_flight), LOOK_EVERY_S),
        )
    ]
    logger.info("jobs service up")
    try:
        yield
    finally:
        await end_tasks(background)
        await tuning.close()
        await batches.close()
        await front_door.close()
        await redis.aclose()


SWEEP_EVERY_S, SWEEP_AGAIN_S = 3600.0, 60.0


class Tending:
    """Forgets silent workers; once an hour removes what crashes left on the volume."""

    def __init__(self, feed: Feed, table: WorkerTable, files: Files) -> None:
        self._feed, self._table, self._files = feed, table, files
        self._sweep_at = 0.0

    async def once(self) -> bool:
        """What is due, every second; whether redis was asked. Raises RedisError, OSError."""
        self._table.tend(connected=self._feed.connected)
        if not self._feed.connected or time.monotonic() < self._sweep_at:
            return False
        self._sweep_at = time.monotonic() + SWEEP_AGAIN_S
        if removed := await self._files.sweep():
            logger.info("removed files without a record", count=removed)
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
