"""Engines that cannot carry our middleware: `services/worker/front.py` stands before them.

`llamacpp` is started by the agent, with the front in its own process. `trtllm`, `sglang` and any other server
(`attached`) run elsewhere, at ENGINE_URL: there the agent starts the front alone.
"""

import os
import sys
import time

from common.workers import Model
from services.worker.engines import dialects
from services.worker.engines.base import (
    AdapterLoader,
    EngineSilent,
    Entry,
    Load,
    Numbers,
    Prometheus,
    Served,
    get,
    listed,
)
from services.worker.middleware import WORKER_ID
from services.worker.settings import WorkerSettings

OWNERS = {"vllm": "vllm", "llamacpp": "llamacpp", "sglang": "sglang", "tensorrt_llm": "trtllm"}
"""`owned_by` of the models of a server -> what runs there: its fields are taken then, not only OpenAI's."""
USUAL_SLOTS = 64
"""Requests that a server elsewhere is taken to run at once, when MAX_NUM_SEQS does not say."""
HEARD_EVERY_S = 5.0
"""How often a server elsewhere is asked whether it is there: it may be somebody's who counts."""


class Fronted(Served):
    """A front, and the engine behind it."""

    adapters: AdapterLoader | None = None

    def __init__(self, settings: WorkerSettings, worker_id: str) -> None:
        super().__init__(settings)
        self.name: str = settings.engine
        self._worker_id = worker_id
        self.elsewhere = settings.engine != "llamacpp"
        self.slots = settings.max_num_seqs or USUAL_SLOTS
        dialect = dialects.find(settings.engine)
        self._metrics = Prometheus(*dialect.metrics)
        self._tells_steps = bool(dialect.metrics[0])
        self._heard_at = -HEARD_EVERY_S

    def command(self) -> list[str]:
        return [sys.executable, "-m", "services.worker.front" if self.elsewhere else "services.worker.llamacpp"]

    def environment(self) -> dict[str, str]:
        return dict(os.environ) | {WORKER_ID: self._worker_id}

    async def models(self) -> list[Model]:
        """What MODEL names there, else all that it lists. Nobody knows its files: its answers are never cached."""
        entries, ours = await listed(self._http), self._settings
        if ours.engine == "attached":
            self.name = next((OWNERS[entry.owned_by] for entry in entries if entry.owned_by in OWNERS), "attached")
            self._metrics = Prometheus(*dialects.find(self.name).metrics)
        if not self.elsewhere:
            return [self._model(entry, ours.served_name) for entry in entries]
        if not ours.model:
            return [self._model(entry, entry.id) for entry in entries]
        found = [self._model(entry, ours.served_name) for entry in entries if entry.id == ours.model]
        if not found:
            names = ", ".join(entry.id for entry in entries[:10]) or "none"
            raise EngineSilent(f"ENGINE_URL={ours.engine_url} lists no model {ours.model!r}, but: {names}")
        return found

    def _model(self, entry: Entry, name: str) -> Model:
        return Model(name, self._settings.max_model_len or entry.longest, entry.created, entry.parent)

    async def load(self) -> Load:
        found = await super().load()
        now = time.monotonic()
        if self.elsewhere and now - self._heard_at >= HEARD_EVERY_S:
            await listed(self._http)
            self._heard_at = now
        return found

    async def numbers(self) -> Numbers:
        text = await get(self._http, "/metrics")
        steps, waiting, kv_use, prompt, cached, generated = self._metrics.read(text)
        made = self._tells_steps
        return Numbers(steps if made else None, int(waiting), kv_use, int(prompt), int(cached), int(generated))

    async def sleep(self) -> bool:
        return False

    async def wake(self) -> None:
        raise EngineSilent("it never sleeps")

    def clean_up(self) -> None:
        return
