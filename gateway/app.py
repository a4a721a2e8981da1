"""The gateway as one ASGI app: deny by default, the request path, and FastAPI for everything that is not hot.

    python -m gateway        # serves it; settings in `gateway/settings.py`
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from loguru import logger
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from common import errors, logs
from common.aliases import AliasTable
from common.answers.store import Store
from common.asgi import Receive, Scope, Send
from common.auth import Authenticator, bearer
from common.feed import Feed, load_workers
from common.metering.meter import Meter
from common.metering.metrics import RequestMetrics
from common.problems import answer_api_error, answer_away, answer_bug, answer_http_exception, answer_invalid
from common.recorder import Recorder
from common.redis.connect import connect, connect_cache
from common.redis.names import CHANNEL_ALIASES, CHANNEL_HELD, CHANNEL_KEYS, CHANNEL_WORKERS
from common.responses.store import ResponseStore
from common.routes import ROUTES
from common.tasks import end_tasks, failures_counter, repeat
from common.upstream import open_session
from common.workers import WorkerTable
from gateway import tending
from gateway.answers import Answers
from gateway.attempts import HeldBack
from gateway.decision import Refuse
from gateway.edge_asgi import AsgiEdge, Sending, respond
from gateway.metrics import GatewayMetrics
from gateway.path import RequestPath
from gateway.responses import OWNER, add_response_routes
from gateway.routes import add_routes
from gateway.settings import Settings
from gateway.waking import Waking

if TYPE_CHECKING:
    from gateway.tracing import Tracing

WORKERS_PATIENCE_S = 2.0
"""How long it waits for the list of workers before it takes requests."""
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Answered without a key. nginx does not let /metrics out."""


class Gateway:
    """The outermost app: a path that is not open needs a key before anything else looks at it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.api = FastAPI(lifespan=self._lifespan, openapi_url=None, docs_url=None, redoc_url=None)
        self.api.add_exception_handler(errors.ApiError, answer_api_error)
        self.api.add_exception_handler(HTTPException, answer_http_exception)
        self.api.add_exception_handler(RequestValidationError, answer_invalid)
        for away in (RedisError, OSError):
            self.api.add_exception_handler(away, answer_away)
        self.api.add_exception_handler(Exception, answer_bug)
        add_routes(self.api)
        add_response_routes(self.api)
        self.path: RequestPath | None = None
        """None while it starts."""
        self._edge: AsgiEdge | None = None
        self._authenticator: Authenticator | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.api(scope, receive, send)
            return
        sending = Sending(send)
        try:
            await self._http(scope, receive, sending)
        except errors.ApiError as error:
            await respond(_refuse(error, scope).response(), sending)
        except Exception as error:  # a bug of ours: the client gets our words, the log gets the cause
            logger.exception("gateway failed", request_id=_label(scope), path=scope["path"])
            if sending.started:
                raise
            said = errors.ApiError(f"The gateway failed ({type(error).__name__}).")
            await respond(_refuse(said, scope).response(), sending)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in ROUTES and self._edge is not None:
            await self._edge(scope, receive, send)
            return
        if scope["path"] not in OPEN_PATHS:
            if self._authenticator is None:
                raise errors.Unavailable("The gateway is starting.", retry_after_s=1)
            scope[OWNER] = await self._authenticator.check(bearer(dict(scope["headers"])))
        await self.api(scope, receive, send)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        settings = self.settings
        registry = CollectorRegistry()
        metrics, table, aliases = GatewayMetrics(registry), WorkerTable(), AliasTable()
        request_metrics = RequestMetrics(registry)
        app.state.table, app.state.aliases, app.state.registry = table, aliases, registry
        app.state.metrics = metrics
        redis = connect(settings)
        recorder = Recorder(connect(settings))
        session = open_session(settings.relay_connect_timeout_s, settings.read_timeout_s)
        self._authenticator = authenticator = Authenticator(redis, service_token=settings.service_token)
        held = tending.HeldBackForAll(settings.hold_back_s, redis)
        meter = Meter(recorder, request_metrics, table.base_models)
        store = open_store(settings, request_metrics)
        answers = open_answers(settings, store, redis, metrics) if store is not None else None
        tracing = open_tracing(settings)
        waking = Waking(redis, table, settings.wake_patience_s)
        self.path = RequestPath(
            settings, table, authenticator, held.here, meter, metrics, answers, aliases, waking, tracing=tracing
        )
        app.state.responses = ResponseStore(redis)
        self._edge = AsgiEdge(self.path, session, settings.worker_token)
        feed = open_feed(settings, table, authenticator, held.here, aliases)
        look_after = tending.Tending(redis, feed, table, answers, metrics)
        background = [
            asyncio.create_task(feed.run(), name="feed"),
            asyncio.create_task(
                repeat("tending", look_after.once, tending.TEND_EVERY_S, failures_counter(registry)), name="tend"
            ),
        ]
        with contextlib.suppress(TimeoutError):  # with redis away it decides from what it knows: nothing yet
            async with asyncio.timeout(WORKERS_PATIENCE_S):
                await feed.first.wait()
        logger.info("gateway up", pid=os.getpid())
        try:
            yield
        finally:
            self.path = None  # what still comes in takes uvicorn's way, which knows that it is shutting down
            await end_tasks(background)
            metrics.count()
            await waking.close()
            await held.close()
            await session.close()
            if answers is not None:
                await answers.close()
            await recorder.close()
            await redis.aclose()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)
            logger.info("gateway down", pid=os.getpid())


def _refuse(error: errors.ApiError, scope: Scope) -> Refuse:
    return Refuse(error, _label(scope), ROUTES.get(scope["path"], ("",))[0])


def _label(scope: Scope) -> str:
    """The client's own request id, on errors that come before the path has looked at it."""
    found: bytes = dict(scope["headers"]).get(b"x-request-id", b"")
    return found.decode("latin-1")


def open_store(settings: Settings, metrics: RequestMetrics) -> Store | None:
    """The answers in redis-cache, if they are kept and there is one."""
    if settings.answer_cache == "off" or not settings.cache_redis_url:
        return None
    redis = connect_cache(settings, settings.cache_redis_url)
    return Store(redis, settings.answer_secret, lambda result: metrics.answers.labels(result).inc())


def open_answers(settings: Settings, store: Store, redis: Redis, metrics: GatewayMetrics) -> Answers:
    """Answers from memory. A request runs while it stands in `running:{worker}`."""

    async def is_running(worker_id: str, uid: str) -> bool | None:
        try:
            return await tending.is_running(redis, worker_id, uid)
        except (RedisError, OSError):
            return None

    return Answers(
        store, is_running, metrics.answers, settings.answer_ttl_s, settings.answer_max_bytes,
        settings.read_timeout_s,
    )


def open_feed(
    settings: Settings, table: WorkerTable, authenticator: Authenticator, held: HeldBack, aliases: AliasTable
) -> Feed:
    """What workers, other gateways and services tell, and what is read after each reconnect."""

    async def on_connect(connection: Redis) -> None:
        authenticator.distrust()  # a revocation may have been missed
        await load_workers(connection, table)
        await aliases.load(connection)

    handlers = {
        CHANNEL_WORKERS: table.take, CHANNEL_KEYS: authenticator.forget, CHANNEL_HELD: held.learn,
        CHANNEL_ALIASES: aliases.take,
    }
    return Feed(lambda: connect(settings, timeout_s=None), handlers, on_connect)


def open_tracing(settings: Settings) -> "Tracing | None":
    """Traces, where somebody takes them. The SDK is only loaded then."""
    if not settings.otlp_traces_endpoint:
        return None
    from gateway.tracing import Tracing

    return Tracing(settings.otlp_traces_endpoint)


def create() -> Gateway:
    """The app from the environment: the factory that uvicorn calls in every process."""
    settings = Settings()  # filled from the environment
    logs.configure("gateway", settings.log_level)
    return Gateway(settings)
