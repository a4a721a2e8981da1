"""The token check, the load report, and the metering of every request: what vLLM loads with `--middleware`, and what
`front.py` puts before other engines.
"""

import hmac
import os
from collections.abc import Collection

import msgspec
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.exposition import ALLOWUTF8, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common import logs
from common.answers.store import Store
from common.errors import Unauthorized, encode
from common.metering.meter import Meter
from common.metering.metered import Metering
from common.metering.metrics import RequestMetrics
from common.recorder import Recorder
from common.redis.connect import connect, connect_cache
from common.responses.store import ResponseStore
from services.worker.dialects import SALTED_BY_VLLM
from services.worker.settings import WorkerSettings
from services.worker.vllm import times

LOAD_PATH = "/owngpt/load"
"""In-flight requests as JSON, for the agent."""
WORKER_ID = "OWNGPT_WORKER_ID"
"""Environment variable by which the agent tells the middleware whose requests these are."""
OPENMETRICS = b"application/openmetrics-text; version=1.0.0; charset=utf-8"
OPEN_PATHS = frozenset({"/health", "/metrics", LOAD_PATH})


class WorkerMiddleware:
    """Outermost layer of an engine's app: without the worker token only health, metrics and load are answered.

    `salted`: the routes on which the engine takes a `cache_salt`.
    """

    def __init__(self, app: ASGIApp, *, vllm: bool = True, salted: Collection[str] = SALTED_BY_VLLM) -> None:
        settings = WorkerSettings()  # filled from the environment
        logs.configure("worker", settings.log_level)
        self._app, self._vllm = app, vllm
        self._expected = f"Bearer {settings.worker_token}".encode()
        redis = connect(settings)
        self._recorder = Recorder(redis)
        served, metrics = frozenset({settings.served_name}), RequestMetrics(REGISTRY)
        self.meter = Meter(self._recorder, metrics, lambda: served, times.take)
        self._store: Store | None = None
        if settings.cache_redis_url and settings.answer_secret_file is not None:
            cache = connect_cache(settings, settings.cache_redis_url)
            self._store = Store(cache, settings.answer_secret, lambda result: metrics.answers.labels(result).inc())
        self._metered = Metering(
            app, self.meter, os.environ[WORKER_ID], salted=salted, priority=vllm, store=self._store,
            responses=ResponseStore(redis),
        )

    @property
    def keeps(self) -> bool:
        """Whether answers worth keeping are stored now."""
        return self._store is not None and not self._store.away

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._closing(send))
            return
        if scope["type"] != "http":
            return
        path = scope["path"]
        if path == LOAD_PATH:
            load = {"in_flight": self.meter.in_flight, "interactive": self.meter.interactive,
                    "reading": self.meter.reading, "keeps": self.keeps}
            await _answer(send, 200, [(b"content-type", b"application/json")], msgspec.json.encode(load))
        elif path == "/metrics" and self._vllm and wants_exemplars(scope):
            await _answer(send, 200, [(b"content-type", OPENMETRICS)], generate_latest(REGISTRY, ALLOWUTF8))  # type: ignore[no-untyped-call]
        elif path in OPEN_PATHS:
            await self._app(scope, receive, send)
        elif not any(
            name == b"authorization" and hmac.compare_digest(value, self._expected)
            for name, value in scope["headers"]
        ):
            await _answer(send, *encode(Unauthorized()))
        else:
            await self._metered(scope, receive, send)

    def _closing(self, send: Send) -> Send:
        """Write the last records before the server says it is down."""

        async def closing(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown"):
                await self._recorder.close()
                if self._store is not None:
                    await self._store.close()
            await send(message)

        return closing


def wants_exemplars(scope: Scope) -> bool:
    """Whether /metrics is ours to answer.

    vLLM's route knows the old text format alone, which has no exemplars; and prometheus_client's own application writes
    `vllm_` where the metric is called `vllm:`. With several API servers only vLLM can add their numbers up.
    """
    accepted = next((value for name, value in scope["headers"] if name == b"accept"), b"")
    return b"openmetrics" in accepted and "PROMETHEUS_MULTIPROC_DIR" not in os.environ


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
