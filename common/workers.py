"""What workers say about themselves, and the table made of it.

Workers publish a `Heartbeat` several times a second (`services/worker`). Nothing here counts requests up and
down: a worker's load is what it last reported plus what this gateway has sent it since, so no lost decrement
can ever make a worker look busy.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec
from loguru import logger

from common.redis.names import HEARTBEAT_TTL_MS

State = Literal["ready", "stalled", "draining", "asleep", "waking", "gone"]
BEST_FIRST: tuple[State, ...] = ("ready", "stalled", "waking", "asleep", "draining")
SERVES = frozenset({"ready", "stalled"})
SLEEPING = frozenset({"asleep", "waking"})
TAKES_NOTHING = SLEEPING | {"draining"}

FORGET_S = 300.0
SUSPECT_S = 2.0
"""How long a worker that just failed a request is avoided, whatever it says of itself."""


class Model(msgspec.Struct):
    """A model a worker serves. `parent` is the base model of an adapter."""

    id: str
    max_model_len: int
    created: int = 0
    parent: str | None = None
    revision: str = ""
    """Digest of the model's files and of the settings that shape its answers; empty: unknown."""
    format: str = ""
    """How its weights are stored: bf16, w8a8, gptq, Q4_1; empty: unknown."""


class Heartbeat(msgspec.Struct):
    """What a worker says about itself: the contract between `services/worker` and the gateway."""

    id: str
    address: str
    """host:port as nginx and the gateway reach it."""
    state: State
    models: list[Model]
    in_flight: int = 0
    """Requests inside the worker now."""
    interactive: int = 0
    """Those of them that are no batch's."""
    slots: int = 0
    """Requests the engine runs at once (max_num_seqs)."""
    waiting: int = 0
    """Requests queued in the engine."""
    kv_use: float = 0.0
    """Share of KV blocks in use, 0 to 1."""
    prompt_tokens: int = 0
    """Tokens read, cached ones among them, since the engine started; with the next two for rates, not for bills."""
    cached_tokens: int = 0
    generated_tokens: int = 0
    keeps: bool = False
    """Whether it stores answers in redis-cache now."""
    engine: str = ""
    """What ENGINE names: which fields it takes, `common/engines.py` knows."""
    wake_s: float = 0.0
    """How long it took to wake last; 0.0: it never slept."""
    held: str = ""
    """What keeps it from serving: training, a profile."""


class Worker:
    """A worker as this process sees it."""

    __slots__ = ("beat", "names", "seen_at", "sent", "suspect_until")

    def __init__(self, beat: Heartbeat, now: float) -> None:
        self.suspect_until = 0.0
        self.update(beat, now)

    def update(self, beat: Heartbeat, now: float) -> None:
        """Take in a newer heartbeat."""
        self.beat = beat
        self.seen_at = now
        self.names = frozenset(model.id for model in beat.models)
        self.sent = 0

    def revision(self, name: str) -> str:
        """The revision of one of its models; empty for none."""
        return next((model.revision for model in self.beat.models if model.id == name), "")

    @property
    def bases(self) -> list[str]:
        """Its models that are no adapters."""
        return [model.id for model in self.beat.models if model.parent is None]

    @property
    def load(self) -> int:
        """Requests in flight: reported plus sent since."""
        return self.beat.in_flight + self.sent


class Pool:
    """The workers that can take a request for a model, in no order, and the same by id."""

    __slots__ = ("by_id", "workers")

    def __init__(self, workers: Iterable[Worker]) -> None:
        self.workers = list(workers)
        random.shuffle(self.workers)  # `routing.choose` looks at a stretch of it
        self.by_id = {worker.beat.id: worker for worker in self.workers}

    def without(self, addresses: Sequence[str]) -> "Pool":
        """Those at other addresses."""
        return Pool(worker for worker in self.workers if worker.beat.address not in addresses)


_decode_heartbeat = msgspec.json.Decoder(Heartbeat).decode


class WorkerTable:
    """All known workers by id.

    What requests ask for (who serves a model, which models there are, a model's revision) is worked out once after a
    change, so that asking costs the same for two workers and for a thousand. A heartbeat that brings new numbers only
    is no change.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.workers: dict[str, Worker] = {}
        self.lost = 0
        """Workers that went without having drained: killed, cut off, or their engine died."""
        self.known_models: set[str] = set()
        """Every model some worker has served: one of them may come back, so asking for it is no mistake."""
        self._engine_seen_at: dict[str, dict[str, float]] = {}
        """Of each model, when an engine last served it: one that is away for a moment may come back."""
        self._tuned_seen_at: dict[str, float] = {}
        """When a worker last had a tuned model: one that nobody has for FORGET_S was deleted."""
        self._clock = clock
        self._changed()

    def _changed(self) -> None:
        """Forget what was worked out."""
        self._pools: dict[tuple[str, frozenset[str] | None], Pool] = {}
        self._engines: dict[str, frozenset[str]] = {}
        self._models: dict[str, Model] | None = None
        self._base_models: frozenset[str] | None = None
        self._revisions: dict[str, str] = {}
        now = self._clock()
        ends = [worker.suspect_until for worker in self.workers.values() if worker.suspect_until > now]
        self._suspicion_ends = min(ends, default=math.inf)

    def take(self, raw: str | bytes) -> None:
        """Take in one heartbeat. A malformed one is logged and ignored."""
        try:
            beat = _decode_heartbeat(raw)
        except msgspec.MsgspecError as error:
            logger.warning("ignored a malformed heartbeat", error=str(error))
            return
        known = self.workers.get(beat.id)
        if beat.state == "gone":
            if known is not None:
                del self.workers[beat.id]
                self.lost += known.beat.state not in TAKES_NOTHING
                self._changed()
                logger.info("worker left", worker=beat.id, was=known.beat.state)
        elif known is None:
            self.workers[beat.id] = Worker(beat, self._clock())
            self._changed()
            logger.info("worker joined", worker=beat.id, address=beat.address, state=beat.state)
        else:
            was = known.beat
            known.update(beat, self._clock())
            if was.state != beat.state:
                logger.info("worker changed state", worker=beat.id, was=was.state, now=beat.state)
            if was.state != beat.state or was.models != beat.models or was.address != beat.address:
                self._changed()
            # What it drops while it serves was deleted; what leaves with it, or was not loaded yet, may be back.
            if was.models != beat.models and {was.state, beat.state} <= SERVES:
                dropped = {model.id for model in was.models} - known.names
                self.known_models -= dropped - self.models().keys()
        self.known_models.update(model.id for model in beat.models)
        for model in beat.models:
            self._engine_seen_at.setdefault(model.id, {})[beat.engine] = self._clock()
            if model.parent is not None:
                self._tuned_seen_at[model.id] = self._clock()

    def expire(self) -> None:
        """Forget workers that have been silent for longer than their heartbeat lives."""
        oldest = self._clock() - HEARTBEAT_TTL_MS / 1000
        for worker_id in [i for i, worker in self.workers.items() if worker.seen_at < oldest]:
            self.lost += self.workers.pop(worker_id).beat.state not in TAKES_NOTHING
            self._changed()
            logger.warning("worker silent, dropped", worker=worker_id)

    def keep_alive(self) -> None:
        """Count every worker as seen now: used while redis itself is away."""
        now = self._clock()
        for worker in self.workers.values():
            worker.seen_at = now

    def tend(self, *, connected: bool) -> None:
        """Call it every second: silent workers are forgotten, unless it is redis that is away."""
        if connected:
            self.expire()
        else:
            self.keep_alive()
        oldest = self._clock() - FORGET_S
        for model, seen in list(self._engine_seen_at.items()):
            for engine in [engine for engine, seen_at in seen.items() if seen_at < oldest]:
                del seen[engine]
                self._engines.pop(model, None)
            if not seen:
                del self._engine_seen_at[model]
        for name in [name for name, seen_at in self._tuned_seen_at.items() if seen_at < oldest]:
            if name not in self.models():
                del self._tuned_seen_at[name]
                self.known_models.discard(name)

    def suspect(self, address: str) -> None:
        """Avoid the worker at an address for SUSPECT_S: a request just failed there."""
        until = self._clock() + SUSPECT_S
        for worker in self.workers.values():
            if worker.beat.address == address:
                worker.suspect_until = until
        self._changed()

    def engines(self, model: str) -> frozenset[str]:
        """The engines that serve a model, or did in the last FORGET_S seconds."""
        found = self._engines.get(model)
        if found is None:
            now = {worker.beat.engine for worker in self.workers.values() if model in worker.names}
            found = frozenset(now.union(self._engine_seen_at.get(model, ())))
            if found:  # else a name that a client made up
                self._engines[model] = found
        return found

    def serving(self, model: str, able: frozenset[str] | None = None) -> Pool:
        """Workers that can take a request for a model, the healthy ones alone where there are any.

        `able`: only those with one of these engines. Draining and sleeping workers are never in it. Suspects and
        stalled workers are the last resort.
        """
        if self._suspicion_ends != math.inf and self._clock() >= self._suspicion_ends:
            self._changed()
        pool = self._pools.get((model, able))
        if pool is None:
            now = self._clock()
            found = [w for w in self._of(model, able) if w.beat.state not in TAKES_NOTHING]
            pool = Pool([w for w in found if w.beat.state == "ready" and w.suspect_until <= now] or found)
            if found:  # else a name that a client made up, of which there is no end
                self._pools[model, able] = pool
        return pool

    def sleeping(self, model: str, able: frozenset[str] | None = None) -> list[Worker]:
        """Workers that serve a model once they are awake; `able` as above."""
        return [w for w in self._of(model, able) if w.beat.state in SLEEPING]

    def _of(self, model: str, able: frozenset[str] | None) -> list[Worker]:
        return [w for w in self.workers.values() if model in w.names and (able is None or w.beat.engine in able)]

    def state_of(self, model: str) -> State:
        """The best state of a worker that serves a model: what a request for it meets."""
        found = {worker.beat.state for worker in self.workers.values() if model in worker.names}
        return next((state for state in BEST_FIRST if state in found), "gone")

    def models(self) -> dict[str, Model]:
        """Every model some worker serves, by name."""
        if self._models is None:
            self._models = {}
            for worker in self.workers.values():
                for model in worker.beat.models:
                    self._models.setdefault(model.id, model)
        return self._models

    def base_models(self) -> frozenset[str]:
        """Names of the models that are no adapters."""
        if self._base_models is None:
            self._base_models = frozenset(name for name, model in self.models().items() if model.parent is None)
        return self._base_models

    def revision(self, name: str) -> str:
        """The revision of a model that all its workers agree on; empty when they do not, or do not say."""
        if name not in self.models():
            return ""
        if name not in self._revisions:
            found = {m.revision for worker in self.workers.values() for m in worker.beat.models if m.id == name}
            self._revisions[name] = found.pop() if len(found) == 1 else ""
        return self._revisions[name]

    def states(self) -> dict[str, int]:
        """How many workers are in each state."""
        counts = {"ready": 0, "stalled": 0, "draining": 0, "asleep": 0, "waking": 0}
        for worker in self.workers.values():
            counts[worker.beat.state] = counts.get(worker.beat.state, 0) + 1
        return counts
