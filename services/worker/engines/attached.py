"""An engine that runs elsewhere: any server with OpenAI's API at ENGINE_URL. No process of ours, no middleware in it.

The gateway relays its requests and meters them. Its load is read where its /metrics has vLLM's names, else unknown.
"""

import contextlib

import httpx

from common.workers import Model
from services.worker.engines.base import (
    ANSWER_TIMEOUT_S,
    AdapterLoader,
    EngineSilent,
    Load,
    Numbers,
    Prometheus,
    Refused,
    get,
    listed,
)
from services.worker.settings import WorkerSettings

_METRICS = Prometheus(b"vllm:num_requests_running", b"vllm:num_requests_waiting", b"vllm:kv_cache_usage_perc")
USUAL_SLOTS = 64
"""Requests that it is taken to run at once, when MAX_NUM_SEQS does not say."""


class Attached:
    """A server somebody else runs."""

    name = "attached"
    metered = False
    adapters: AdapterLoader | None = None

    def __init__(self, settings: WorkerSettings) -> None:
        url = httpx.URL(settings.engine_url)
        self.address, self.slots = f"{url.host}:{url.port or 80}", settings.max_num_seqs or USUAL_SLOTS
        # Without the worker token: whoever runs the server would have it, and could ask our workers.
        self._http = httpx.AsyncClient(base_url=f"http://{self.address}", timeout=ANSWER_TIMEOUT_S)

    def command(self) -> None:
        return None

    def environment(self) -> dict[str, str]:
        return {}

    async def healthy(self) -> bool:
        try:
            return bool(await self.models())
        except EngineSilent:
            return False

    async def models(self) -> list[Model]:
        """What it lists. Nobody knows its files, so there is no revision, and its answers are never cached."""
        entries = await listed(self._http)
        return [Model(entry.id, entry.max_model_len or 0, entry.created, entry.parent) for entry in entries]

    async def load(self) -> Load:
        running, waiting, _ = await self._metrics()
        return Load(int(running + waiting), int(running + waiting))

    async def numbers(self) -> Numbers:
        _, waiting, kv_use = await self._metrics()
        return Numbers(waiting=int(waiting), kv_use=kv_use)

    async def sleep(self) -> bool:
        return False

    async def wake(self) -> None: ...

    def clean_up(self) -> None:
        return

    async def close(self) -> None:
        await self._http.aclose()

    async def _metrics(self) -> list[float]:
        text = b""
        with contextlib.suppress(Refused):  # many have none
            text = await get(self._http, "/metrics")
        return _METRICS.read(text)
