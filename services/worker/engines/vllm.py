"""vLLM, started by the agent, with our middleware inside."""

import asyncio
import time
from hashlib import blake2b

import httpx
import psutil
from loguru import logger

from common import checkpoint
from common.workers import Model
from services.worker import dialects, identity
from services.worker.engines.base import (
    LOAD_TIMEOUT_S,
    AdapterLoader,
    EngineSilent,
    Entry,
    Numbers,
    Prometheus,
    Served,
    get,
    listed,
)
from services.worker.middleware import WORKER_ID
from services.worker.settings import WorkerSettings
from services.worker.vllm import command, shm

_METRICS = Prometheus(*dialects.VLLM.metrics)
SLEEP_TIMEOUT_S = 120.0


def _host_has_room(settings: WorkerSettings) -> bool:
    """Whether host memory can take the weights of a sleeping engine."""
    return psutil.virtual_memory().available > 1.2 * checkpoint.weights_bytes(settings.model, settings.model_revision)


class Vllm(Served):
    """One vLLM server on this machine."""

    name = "vllm"
    elsewhere = False

    def __init__(self, settings: WorkerSettings, worker_id: str) -> None:
        super().__init__(settings)
        self._worker_id, self.slots = worker_id, command.sequences(settings)
        self.adapters: AdapterLoader | None = _VllmAdapters(self._http) if command.serves_adapters(settings) else None

    def command(self) -> list[str]:
        return command.command(self._settings)

    def environment(self) -> dict[str, str]:
        return command.environment(self._settings) | {WORKER_ID: self._worker_id}

    async def models(self) -> list[Model]:
        said = await asyncio.to_thread(checkpoint.format_name, self._settings.model, self._settings.model_revision)
        return [
            Model(entry.id, entry.max_model_len or 0, entry.created, entry.parent,
                  await asyncio.to_thread(self._revision, entry), said)
            for entry in await listed(self._http)
        ]

    async def numbers(self) -> Numbers:
        steps, waiting, kv_use, prompt, cached, generated = _METRICS.read(await get(self._http, "/metrics"))
        return Numbers(steps, int(waiting), kv_use, int(prompt), int(cached), int(generated))

    async def sleep(self) -> bool:
        """Level 1: weights in host memory, KV blocks forgotten. On a CPU there is no other memory to put them in."""
        if not command.sleeps(self._settings) or not _host_has_room(self._settings):
            return False
        return await self._tell("/sleep?level=1&mode=wait")

    async def wake(self) -> None:
        if not await self._tell("/wake_up"):
            raise EngineSilent("/wake_up: refused")

    async def _tell(self, path: str) -> bool:
        try:
            answer = await self._http.post(path, timeout=SLEEP_TIMEOUT_S)
        except httpx.HTTPError as error:
            logger.warning("engine does not obey", path=path, error=type(error).__name__)
            return False
        return answer.is_success

    def clean_up(self) -> None:
        shm.sweep()

    def _revision(self, entry: Entry) -> str:
        """What an answer of this model depends on: its files, and how the engine was told to run them."""
        try:
            digest = identity.model_digest(self._settings.model, self._settings.model_revision or None)
        except OSError as error:
            logger.warning("the model's files cannot be read; its answers are not cached", error=str(error))
            return ""
        if entry.parent:
            digest += identity.adapter_digest(entry.root or "").hex()
        return blake2b(f"{digest} {command.shaping(self._settings)}".encode(), digest_size=16).hexdigest()


class _VllmAdapters:
    """vLLM's runtime LoRA: https://docs.vllm.ai/en/latest/features/lora.html"""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def load(self, name: str, folder: str) -> bool:
        return await self._ask("load", {"lora_name": name, "lora_path": folder}, done_already="already")

    async def unload(self, name: str) -> bool:
        return await self._ask("unload", {"lora_name": name}, done_already="cannot be found")

    async def names(self) -> set[str]:
        return {entry.id for entry in await listed(self._http) if entry.parent is not None}

    async def _ask(self, verb: str, body: dict[str, str], done_already: str) -> bool:
        log = logger.bind(verb=verb, adapter=body["lora_name"])
        started = time.monotonic()
        try:
            answer = await self._http.post(f"/v1/{verb}_lora_adapter", json=body, timeout=LOAD_TIMEOUT_S)
        except httpx.HTTPError as error:
            log.warning("adapter not changed", error=type(error).__name__)
            return False
        if answer.status_code == 200 or done_already in answer.text:
            log.info("adapter changed", took_s=round(time.monotonic() - started, 2))
            return True
        log.warning("adapter not changed", status=answer.status_code, text=answer.text[:500])
        return False
