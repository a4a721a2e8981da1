"""The gateway as one ASGI app: deny by default, the request path, and FastAPI for everything that is not hot.

    python -m gateway        # serves it; settings in `gateway/settings.py`
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from loguru import logger
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, multiprocess
from redis.asyncio import Redis
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from common import errors, logs
from common.aliases import AliasTable
from common.asgi import Message, Receive, Scope, Send
from common.auth import Authenticator, bearer
from common.feed import Feed, load_workers
from common.metering.meter import Meter
from common.metering.metrics import RequestMetrics
from common.problems import answer_api_error, answer_http_exception
from common.recorder import Recorder
from common.redis.connect import connect, connect_cache
from common.redis.names import CHANNEL_ALIASES, CHANNEL_HELD, CHANNEL_KEYS, CHANNEL_WORKERS, HEARTBEAT_TTL_MS
from common.routes import ROUTES
from common.tasks import end_tasks
from common.workers import Model, WorkerTable
from gateway.answers import Answers
from gateway.metrics import GatewayMetrics
from gateway.path import HeldBack, RequestPath, name_request, send_error
from gateway.registry import reap
from gateway.relay import open_session
from gateway.settings import Settings

if TYPE_CHECKING:
    from gateway.tracing import Tracing

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Answered without a key. nginx does not let /metrics out."""


class Gateway:
    """The outermost app: a path that is not open needs a key before anything else looks at it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.api = FastAPI(lifespan=self._lifespan, openapi_url=None, docs_url=None, redoc_url=None)
        self.api.add_exception_handler(errors.ApiError, answer_api_error)
        self.api.add_exception_handler(HTTPException, answer_http_exception)
        add_routes(self.api)
        self._path: RequestPath | None = None
        self._authenticator: Authenticator | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.api(scope, receive, send)
            return
        answer = Answer(send)
        try:
            await self._http(scope, receive, answer)
        except errors.ApiError as error:
            await answer.error(error, name_request(scope))
        except Exception as error:  # a bug of ours: the client gets our words, the log gets the cause
            request_id = name_request(scope)
            logger.exception("gateway failed", request_id=request_id.decode(), path=scope["path"])
            if answer.started:
                raise
            await answer.error(errors.ApiError(f"The gateway failed ({type(error).__name__})."), request_id)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in ROUTES and self._path is not None:
            await self._path(scope, receive, send)
            return
        if scope["path"] not in OPEN_PATHS:
            if self._authenticator is None:
                raise errors.Unavailable("The gateway is starting.", retry_after_s=1)
            await self._authenticator.check(bearer(scope["headers"]))
        await self.api(scope, receive, send)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        settings = self._settings
        registry = CollectorRegistry()
        metrics, table, aliases = GatewayMetrics(registry), WorkerTable(), AliasTable()
        redis = connect(settings)
        recorder = Recorder(connect(settings))
        session = open_session(settings)
        authenticator = Authenticator(redis)
        tasks: set[asyncio.Task[None]] = set()

        def publish_held(digest: str) -> None:
            task = asyncio.create_task(_publish_held(redis, digest))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        held = HeldBack(settings.hold_back_s, publish_held)
        meter = Meter(recorder, RequestMetrics(registry), lambda: frozenset(
            name for name, model in table.models().items() if model.parent is None
        ))
        async def on_connect(connection: Redis) -> None:
            authenticator.distrust()  # a revocation may have been missed
            await load_workers(connection, table)
            await aliases.load(connection)

        feed = Feed(
            lambda: connect(settings, timeout_s=None),
            {
                CHANNEL_WORKERS: table.take, CHANNEL_KEYS: authenticator.forget, CHANNEL_HELD: held.learn,
                CHANNEL_ALIASES: aliases.take,
            },
            on_connect,
        )
        app.state.table, app.state.aliases, app.state.metrics, app.state.registry = table, aliases, metrics, registry
        self._authenticator = authenticator
        answers = open_answers(settings, metrics)
        tracing = open_tracing(settings)
        self._path = RequestPath(
            settings, table, authenticator, held, session, meter, metrics, answers, aliases, tracing=tracing
        )
        background = [
            asyncio.create_task(feed.run(), name="feed"),
            asyncio.create_task(_tend(redis, feed, table, metrics), name="tend"),
        ]
        logger.info("gateway up", edge=settings.edge, pid=os.getpid())
        try:
            yield
        finally:
            await end_tasks(background)
            await asyncio.gather(*tasks, return_exceptions=True)
            await session.close()
            if answers is not None:
                await answers.close()
            await recorder.close()
            await redis.aclose()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)
            logger.info("gateway down", pid=os.getpid())


def open_answers(settings: Settings, metrics: GatewayMetrics) -> Answers | None:
    """The answer cache, if it is on and there is a redis-cache."""
    if settings.answer_cache == "off" or not settings.cache_redis_url:
        return None
    redis = connect_cache(settings, settings.cache_redis_url)
    return Answers(redis, settings.cache_secret, settings.answer_ttl_s, settings.answer_max_bytes, metrics.answers)


def open_tracing(settings: Settings) -> "Tracing | None":
    """Traces, where somebody takes them. The SDK is only loaded then."""
    if not settings.otlp_traces_endpoint:
        return None
    from gateway.tracing import Tracing

    return Tracing(settings.otlp_traces_endpoint)


class Answer:
    """A `send` that knows whether the response has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def __call__(self, message: Message) -> None:
        self.started = True
        await self._send(message)

    async def error(self, error: errors.ApiError, request_id: bytes) -> None:
        """Answer with an error."""
        await send_error(error, request_id, self._send)


async def _tend(redis: Redis, feed: Feed, table: WorkerTable, metrics: GatewayMetrics) -> None:
    """Once a second: forget silent workers, settle what lost ones left, refresh the gauges."""
    lost = 0
    while True:
        table.tend(connected=feed.connected)
        if feed.connected:
            try:
                # A redis that was away longer than heartbeats live has forgotten live workers: let them speak first.
                settled = time.monotonic() - feed.connected_at > 2 * HEARTBEAT_TTL_MS / 1000
                if settled and (requests := await reap(redis)):
                    metrics.lost_requests.inc(requests)
                    logger.warning("requests lost with their worker", count=requests)
            except (RedisError, OSError) as error:
                logger.warning("could not look for lost requests", error=str(error))
            except Exception:  # a bug here must not stop the tending
                logger.exception("tending failed")
        metrics.workers_lost.inc(table.lost - lost)
        lost = table.lost
        for state, count in table.states().items():
            metrics.workers.labels(state).set(count)
        await asyncio.sleep(1.0)


async def _publish_held(redis: Redis, digest: str) -> None:
    try:
        await redis.publish(CHANNEL_HELD, digest)
    except (RedisError, OSError) as error:
        logger.warning("other gateways do not know of a held-back request", error=str(error))


def add_routes(api: FastAPI) -> None:
    """Everything that is not generation."""

    @api.get("/health")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @api.get("/ready")
    async def ready(request: Request) -> Response:
        """At least one worker answers."""
        states = request.app.state.table.states()
        if states["ready"]:
            return JSONResponse({"status": "ready", "workers": states})
        return JSONResponse({"status": "no worker is ready", "workers": states}, 503, {"retry-after": "2"})

    @api.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Prometheus text, of every gateway process of this container."""
        registry = request.app.state.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @api.get("/v1/models")
    async def models(request: Request) -> dict[str, object]:
        """Every model some worker serves, and every alias of one."""
        found = models_and_aliases(request)
        return {"object": "list", "data": [describe(found[name]) for name in sorted(found)]}

    @api.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, object]:
        """One model."""
        found = models_and_aliases(request).get(name)
        if found is None:
            raise errors.NotFound(f"The model {name!r} does not exist.", param="model", code="model_not_found")
        return describe(found)


def models_and_aliases(request: Request) -> dict[str, Model]:
    """By name. An alias looks like the model it stands for; what stands for nothing served is left out."""
    found: dict[str, Model] = request.app.state.table.models()
    targets: dict[str, str] = request.app.state.aliases.targets
    return found | {
        alias: msgspec.structs.replace(found[name], id=alias, parent=name)
        for alias, name in targets.items() if name in found
    }


def describe(model: Model) -> dict[str, object]:
    """A model in OpenAI's shape, with vLLM's `max_model_len` and `parent`."""
    return {
        "id": model.id, "object": "model", "created": model.created, "owned_by": "owngpt",
        "max_model_len": model.max_model_len, "parent": model.parent,
    }


def create() -> Gateway:
    """The app from the environment: the factory that uvicorn calls in every process."""
    settings = Settings()  # filled from the environment
    logs.configure("gateway", settings.log_level)
    return Gateway(settings)
