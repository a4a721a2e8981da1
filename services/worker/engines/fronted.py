"""Engines that cannot carry our middleware: `services/worker/front.py` stands before them.

`llamacpp` is started by the agent, with the front in its own process. `trtllm`, `sglang` and any other server
(`attached`) run elsewhere, at ENGINE_URL: there the agent starts the front alone.
"""

import os
import sys

from common.workers import Model
from services.worker import dialects
from services.worker.engines.base import (
    AdapterLoader,
    EngineSilent,
    Entry,
    Load,
    Numbers,
    Prometheus,
    Served,
    ask,
    get,
    listed,
)
from services.worker.middleware import WORKER_ID
from services.worker.settings import WorkerSettings


class Fronted(Served):
    """A front, and the engine behind it."""

    adapters: AdapterLoader | None = None

    def __init__(self, settings: WorkerSettings, worker_id: str) -> None:
        super().__init__(settings)
        self.name: str = settings.engine
        self._worker_id = worker_id
        self.elsewhere = settings.engine != "llamacpp"
        self.slots = settings.max_num_seqs or dialects.find(settings.engine).slots

    def command(self) -> list[str]:
        return [sys.executable, "-m", "services.worker.front" if self.elsewhere else "services.worker.llamacpp"]

    def environment(self) -> dict[str, str]:
        return dict(os.environ) | {WORKER_ID: self._worker_id}

    async def models(self) -> list[Model]:
        """What MODEL names there, else all that it lists. Nobody knows its files: its answers are never cached."""
        said = (await ask(self._http, "/health")).headers
        self.name = said.get(dialects.ENGINE.decode(), self.name)
        self.slots = self._settings.max_num_seqs or int(said.get(dialects.SLOTS.decode(), 0)) or self.slots
        entries, ours = await listed(self._http), self._settings
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
        longest = self._settings.max_model_len or entry.longest
        return Model(name, longest, entry.created, entry.parent, format=entry.format)

    async def load(self) -> Load:
        found = await super().load()
        await get(self._http, "/health")  # the front answers, and knows whether the engine does
        return found

    async def numbers(self) -> Numbers:
        dialect = dialects.find(self.name)
        text = b""
        try:
            text = await get(self._http, dialects.NUMBERS_PATH)
        except EngineSilent:
            if not self.elsewhere:
                raise
        steps, waiting, kv_use, prompt, cached, generated = Prometheus(*dialect.metrics).read(text)
        if dialect.cached_apart:
            prompt += cached
        # What runs elsewhere is not started anew by us, whatever it does.
        told = None if self.elsewhere or not dialect.metrics[0] else steps
        return Numbers(told, int(waiting), kv_use, int(prompt), int(cached), int(generated))

    async def sleep(self) -> bool:
        return False

    async def wake(self) -> None:
        raise EngineSilent("it never sleeps")

    def clean_up(self) -> None:
        return
