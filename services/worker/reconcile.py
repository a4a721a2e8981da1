"""Adapters: the engine has what the registry has, neither more nor less, whatever fails on the way.

Loading is slow and may hang, so adapters are loaded beside each other and beside the heartbeats. One that is not in the
registry any more is first no longer announced, then unloaded, and tried again until it is gone.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from common.adapters import Adapter, is_ours, read_registry
from common.tasks import end_tasks, repeat
from common.workers import Model
from services.worker.engines.base import AdapterLoader, EngineSilent

EVERY_S = 1.0
RETRY_S = 10.0
LOOK_EVERY_S = 30.0
"""Between two looks at what the engine has: a load that was given up may end well long after its unload."""
AT_ONCE = 4

Registry = Callable[[], Awaitable[dict[Any, Any]]]
"""The registry as redis has it. Raises RedisError."""


class Reconciler:
    """Compares once every EVERY_S. `announce` hears of the adapters that may be asked for."""

    def __init__(
        self, loader: AdapterLoader, registry: Registry, base: Model, folder: Path,
        announce: Callable[[list[Model]], None], quiet_s: float,
    ) -> None:
        self._loader, self._registry, self._base, self._folder = loader, registry, base, folder
        self._announce, self._quiet_s = announce, quiet_s
        self._loaded: dict[str, Model] = {}
        self._leaving: set[str] = set()
        """No longer announced; maybe still in the engine."""
        self._doubtful: set[str] = set()
        """Loads that failed, or seemed to: one that timed out may be there all the same."""
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._not_before: dict[str, float] = {}
        self._looked_at = time.monotonic()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await repeat("the look at the adapters' registry", self.compare, EVERY_S)
        finally:
            await end_tasks(self._busy.values())

    async def compare(self) -> None:
        """Begin what is to be done. Raises RedisError."""
        registry = read_registry(await self._registry())
        wanted = {name: adapter for name, adapter in registry.items() if adapter.base == self._base.id}
        for name in self._loaded.keys() - wanted.keys():
            del self._loaded[name]  # from the next heartbeat on no gateway sends anything there
            self._leaving.add(name)
            self._announce(list(self._loaded.values()))
            self._not_before[name] = time.monotonic() + self._quiet_s
        self._leaving |= self._doubtful - wanted.keys()
        self._doubtful &= wanted.keys()
        if time.monotonic() - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            with contextlib.suppress(EngineSilent):
                ours = filter(is_ours, await self._loader.names())  # others are the owner's business (--lora-modules)
                self._leaving |= set(ours) - wanted.keys() - self._busy.keys()
        for name in sorted(self._leaving):
            self._begin(name, self._unload(name))
        for name, adapter in wanted.items():
            if name not in self._loaded and name not in self._leaving:
                self._begin(name, self._load(adapter))
        for name in self._not_before.keys() - wanted.keys() - self._leaving:
            del self._not_before[name]

    def _begin(self, name: str, work: Any) -> None:
        """Do it beside the rest, unless it is being done, is to wait, or too much is going on."""
        if name in self._busy or len(self._busy) >= AT_ONCE or self._not_before.get(name, 0.0) > time.monotonic():
            work.close()
            return
        task = self._busy[name] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._busy.pop(name, None))

    async def _load(self, adapter: Adapter) -> None:
        if await self._loader.load(adapter.name, str(self._folder / adapter.folder)):
            self._doubtful.discard(adapter.name)
            self._loaded[adapter.name] = self._describe(adapter)
            self._announce(list(self._loaded.values()))
        else:
            self._doubtful.add(adapter.name)
            self._not_before[adapter.name] = time.monotonic() + RETRY_S

    async def _unload(self, name: str) -> None:
        if await self._loader.unload(name):
            self._leaving.discard(name)
            self._not_before.pop(name, None)
        else:
            self._not_before[name] = time.monotonic() + RETRY_S

    def _describe(self, adapter: Adapter) -> Model:
        """An adapter as gateways hear of it."""
        base = self._base
        revision = f"{base.revision} {adapter.digest}"
        return Model(
            id=adapter.name, max_model_len=base.max_model_len, created=adapter.created, parent=base.id,
            revision=blake2b(revision.encode(), digest_size=16).hexdigest() if base.revision else "",
            format=base.format,
        )
