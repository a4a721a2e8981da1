"""How batches ask: the gateway's own request path in this process, as the owner of the batch.

Routing, retries, held-back requests and metering are those of every other request; only the key is not checked again,
and requests say that they can wait (vLLM's priority: a larger number waits longer).
"""

import time

import aiohttp
import httpx
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from common import errors
from common.aliases import AliasTable
from common.auth import Authenticator
from common.keys import ApiKey
from common.metering.meter import Meter
from common.metering.metrics import RequestMetrics
from common.recorder import Recorder
from common.workers import WorkerTable
from gateway.metrics import GatewayMetrics
from gateway.path import HeldBack, RequestPath
from gateway.settings import Settings

PRIORITY = b"100"
TIMEOUT_S = 3600.0


class Owners(Authenticator):
    """Takes the owner's id for a key: only this process can send one."""

    def cached(self, header: bytes) -> ApiKey | None:
        return ApiKey(header.decode(), "batch", "", int(time.time()))

    async def check(self, header: bytes) -> ApiKey:
        raise errors.Unauthorized


class Asking:
    """One request at a time through the path."""

    def __init__(
        self, settings: Settings, redis: Redis, recorder: Recorder, table: WorkerTable, aliases: AliasTable,
        session: aiohttp.ClientSession,
    ) -> None:
        registry = CollectorRegistry()
        meter = Meter(recorder, RequestMetrics(registry), lambda: frozenset(table.models()))
        held = HeldBack(settings.hold_back_s, lambda digest: None)
        path = RequestPath(
            settings, table, Owners(redis), held, session, meter, GatewayMetrics(registry), answers=None,
            aliases=aliases, priority=PRIORITY,
        )  # fmt: skip
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(path, raise_app_exceptions=False), base_url="http://batch", timeout=TIMEOUT_S
        )

    async def __call__(self, endpoint: str, body: bytes, owner: str, request_id: str) -> tuple[int, bytes]:
        """(status, body) of the answer."""
        answer = await self._http.post(endpoint, content=body, headers={
            "authorization": owner, "content-type": "application/json", "x-request-id": request_id,
        })  # fmt: skip
        return answer.status_code, answer.content

    async def close(self) -> None:
        """At the end of the lifespan."""
        await self._http.aclose()
