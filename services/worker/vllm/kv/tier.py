"""The secondary tier that vLLM's scheduler calls: looks blocks up in redis, fetches them, stores them.

Runs in the engine's scheduler process. Everything vLLM calls here returns at once; threads do the waiting. Whatever
goes wrong with redis is a miss before anything is scheduled on it, so no answer can depend on redis being there.

    lookup        one thread, one pipeline of STRLEN a request and step
    load          LOAD_THREADS threads, stripes of a job in parallel, payloads straight into the host tier's slots
    store         one thread; a bounded backlog, sheds what does not fit

Written against vLLM 0.32's `SecondaryTierManager` (experimental; tests/test_kv.py pins the signatures).
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, ClassVar, TypeVar

from loguru import logger
from redis.exceptions import RedisError
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from common.breaker import Breaker
from services.worker.settings import WorkerSettings
from services.worker.vllm import shm
from services.worker.vllm.kv import metrics
from services.worker.vllm.kv.block import HEADER, SEEN_PREFIX, Sealer
from services.worker.vllm.kv.economy import Economy
from services.worker.vllm.kv.wire import TooSlow, Wire

LOAD_THREADS = 2
STRIPE_BYTES = 4 * 1024 * 1024
"""Asked for at once on one connection. Redis keeps whole replies in fresh memory; its pages cost more than the copy."""
BACKLOG_SHARE = 0.5
"""Stores waiting hold slots of the host tier; they may hold this share of it."""
CROWDED = 0.8
"""From this fill of redis-cache on, a block is admitted only when somebody computes it a second time."""
SEEN_TTL_S = 3600
FILL_EVERY_S = 1.0
REFRESH_SHARE = 0.25
"""A block in use is given its whole life again once this share of it has passed."""
MAX_REFRESHED = 100_000
MAX_FOREIGN = 10_000

Said = TypeVar("Said")


@dataclass(frozen=True)
class Adapter:
    """Per-request state: the digest of the LoRA adapter's files (set by the connector)."""

    digest: bytes


class _Lookup(AsyncLookupManager):
    """vLLM's bookkeeping of lookups, with our question in the middle."""

    def __init__(self, tier: "RedisTier", tier_type: str) -> None:
        self._tier = tier
        super().__init__(tier_type=tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        return self._tier.look_up(keys, req_context)

    @property
    def waiting(self) -> bool:
        """Whether answers are on their way."""
        return any(state.result is None for state in self._lookup_state.values())


class _Load:
    """A load job in stripes."""

    def __init__(self, job: TransferJob, stripes: int) -> None:
        self.job = job
        self.left = stripes
        self.good: list[OffloadKey] = []
        self.began = time.monotonic()
        self.lock = threading.Lock()


class RedisTier(SecondaryTierManager):
    """KV chunks in redis-cache, behind vLLM's host tier."""

    medium: ClassVar[Medium] = Medium.STORAGE
    cache_hit_source: ClassVar[CacheHitSource] = CacheHitSource.EXTERNAL_UNSPECIFIED

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        namespace: str,
        backpressure_detector: BackpressureDetector | None = None,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality.REMOTE
        self._settings = WorkerSettings()  # filled from the environment
        self._slots = primary_kv_view.cast("B")
        if current_platform.is_cpu():
            shm.populate(self._slots)
        self._chunk_bytes = self.block_size_bytes
        self.host_chunks = len(self._slots) // self._chunk_bytes
        """How many the tier between us and the engine holds."""
        config = offloading_spec.config
        self._chunk_tokens = max(group.tokens_per_block for group in config.groups) * config.cache.blocks_per_chunk
        self._sealer = Sealer(self._settings.kv_secret, bytes.fromhex(namespace))
        self._ttl_s = self._settings.kv_ttl_s
        self._backlog_limit = int(len(self._slots) * BACKLOG_SHARE)
        self._backlog_bytes = 0
        self.economy = Economy()
        self._breaker = Breaker()
        self._counts = metrics.Counts()
        self._jobs: dict[int, TransferJob] = {}
        self._finished: SimpleQueue[JobResult] = SimpleQueue()
        self._load_done = threading.Event()
        self._running: set[Future[None]] = set()
        self._refreshed: dict[bytes, float] = {}
        self._foreign: set[bytes] = set()
        self._fill, self._filled_at = 0.0, float("-inf")
        self._local = threading.local()
        self._wires: list[Wire] = []
        self._loaders = ThreadPoolExecutor(LOAD_THREADS, "kv-load")
        self._storers = ThreadPoolExecutor(1, "kv-store")
        self._lookups = _Lookup(self, tier_type)
        logger.info("kv tier", redis=self._settings.cache_redis_url, namespace=namespace,
                    chunk_tokens=self._chunk_tokens, chunk_bytes=self._chunk_bytes)

    # --- lookup --------------------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if self._breaker.open:
            return LookupResult.MISS
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def look_up(self, keys: Sequence[OffloadKey], req_context: ReqContext) -> list[bool]:
        """In the lookup thread: which of a request's chunks are there, in the order of its prompt."""
        names = self._names(keys, req_context)
        began = time.monotonic()
        sizes = self._talk(lambda wire: wire.sizes(names))
        if sizes is None:
            return [False] * len(keys)
        self.economy.looked_up(time.monotonic() - began)
        found = [size == HEADER.size + self._chunk_bytes for size in sizes]
        run = next((i for i, there in enumerate(found) if not there), len(found))
        self._counts.add(metrics.BLOCKS, len(found) - run, ("missed",))
        if run and not self.economy.pays(run * self._chunk_tokens, run * self._chunk_bytes):
            self._counts.add(metrics.BLOCKS, run, ("not_worth_it",))
            return [False] * len(keys)
        return found

    def settle(self, timeout_s: float) -> bool:
        """Give lookups that were just posted a moment. True when all were answered: asking again saves a step."""
        self._lookups.flush()
        if not self._lookups.waiting:
            return False
        until = time.monotonic() + timeout_s
        while (waiting := self._lookups.waiting) and time.monotonic() < until:
            time.sleep(0.0001)
            self._lookups.drain_results()
        return not waiting

    # --- load ----------------------------------------------------------------------------------

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._jobs[job_metadata.job_id] = job_metadata
        keys = list(job_metadata.keys)
        slots = [self._slot(chunk) for chunk in job_metadata.chunk_ids]
        names = self._names(keys, job_metadata.req_context)
        width = max(1, STRIPE_BYTES // self._chunk_bytes)
        starts = range(0, len(keys), width)
        load = _Load(job_metadata, len(starts))
        for at in starts:
            part = slice(at, at + width)
            self._submit(self._loaders, self._load_stripe, load, keys[part], names[part], slots[part])

    def _load_stripe(
        self, load: _Load, keys: list[OffloadKey], names: list[bytes], slots: list[memoryview]
    ) -> None:
        good: list[OffloadKey] = []
        try:
            items = list(zip(names, slots, strict=True))
            headers = self._talk(lambda wire: wire.load(items, HEADER.size, self._ttl_s)) or [None] * len(keys)
            for key, name, slot, header in zip(keys, names, slots, headers, strict=True):
                if header is None:
                    continue
                if self._sealer.verifies(name, header, slot):
                    good.append(key)
                else:
                    self._counts.add(metrics.BLOCKS, 1, ("foreign",))
                    if len(self._foreign) < MAX_FOREIGN:
                        self._foreign.add(name)  # to be written over once it is computed
                    logger.warning("a KV block in redis does not verify; it is computed instead")
        finally:
            with load.lock:
                load.good += good
                load.left -= 1
                last = load.left == 0
            if last:
                self._loaded(load)

    def _loaded(self, load: _Load) -> None:
        asked, good, took_s = list(load.job.keys), load.good, time.monotonic() - load.began
        size_bytes = len(good) * self._chunk_bytes
        self._counts.add(metrics.BLOCKS, len(good), ("loaded",))
        self._counts.add(metrics.BLOCKS, len(asked) - len(good), ("lost",))
        self._counts.add(metrics.BYTES, size_bytes, ("loaded",))
        if good:
            self.economy.fetched(size_bytes, took_s)
            compute_s = self.economy.compute_s(len(good) * self._chunk_tokens)
            self._counts.add(metrics.SAVED, max(0.0, (compute_s or 0.0) - took_s))
        self._finished.put(JobResult(
            load.job.job_id, success=len(good) == len(asked), successful_keys=tuple(good) or None,
            transfer_time=took_s, transfer_bytes=size_bytes,
        ))
        self._load_done.set()

    def await_load(self, timeout_s: float) -> None:
        """For a scheduler with nothing else to do: let a load have the processor instead of spinning."""
        if self._finished.empty() and any(job.is_promotion for job in self._jobs.values()):
            self._load_done.wait(timeout_s)
            self._load_done.clear()

    # --- store ---------------------------------------------------------------------------------

    def submit_store(self, job_metadata: TransferJob) -> None:
        keys = list(job_metadata.keys)
        size_bytes = len(keys) * self._chunk_bytes
        full = self._backlog_bytes + size_bytes > self._backlog_limit
        self._jobs[job_metadata.job_id] = job_metadata
        self._backlog_bytes += size_bytes
        if full or self._breaker.open:
            self._counts.add(metrics.BLOCKS, len(keys), ("shed",))
            self._finished.put(JobResult(job_metadata.job_id, success=True, transfer_time=0.0, transfer_bytes=0))
            return
        slots = [self._slot(chunk) for chunk in job_metadata.chunk_ids]
        names = self._names(keys, job_metadata.req_context)
        self._submit(self._storers, self._store, job_metadata.job_id, names, slots)

    def _store(self, job_id: int, names: list[bytes], slots: list[memoryview]) -> None:
        began, stored = time.monotonic(), None
        try:
            stored = self._talk(lambda wire: self._store_missing(wire, names, slots))
        finally:
            self._finished.put(JobResult(
                job_id, success=stored is not None, transfer_time=time.monotonic() - began,
                transfer_bytes=(stored or 0) * self._chunk_bytes,
            ))

    def _store_missing(self, wire: Wire, names: list[bytes], slots: list[memoryview]) -> int:
        whole = HEADER.size + self._chunk_bytes
        wanted = [(n, s) for n, s, size in zip(names, slots, wire.sizes(names), strict=True)
                  if size != whole or n in self._foreign]
        self._foreign.difference_update(names)
        self._counts.add(metrics.BLOCKS, len(names) - len(wanted), ("present",))
        if wanted and self._crowded(wire):
            seen = wire.see([SEEN_PREFIX + name for name, _ in wanted], SEEN_TTL_S)
            self._counts.add(metrics.BLOCKS, seen.count(False), ("not_admitted",))
            wanted = [item for item, before in zip(wanted, seen, strict=True) if before]
        done = 0
        for name, slot in wanted:
            done += wire.store([(name, self._sealer.seal(name, slot), slot)], self._ttl_s).count(True)
        self._counts.add(metrics.BLOCKS, done, ("stored",))
        self._counts.add(metrics.BLOCKS, len(wanted) - done, ("refused",))
        self._counts.add(metrics.BYTES, done * (HEADER.size + self._chunk_bytes), ("stored",))
        return done

    def _crowded(self, wire: Wire) -> bool:
        now = time.monotonic()
        if now - self._filled_at > FILL_EVERY_S:
            self._fill, self._filled_at = wire.fill(), now
        return self._fill > CROWDED

    # --- use -----------------------------------------------------------------------------------

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Blocks found in a nearer tier stay alive here, too: the next worker will want them."""
        if self._breaker.open or not keys:
            return
        now = time.monotonic()
        due = [name for name in self._names(list(keys), req_context)
               if now - self._refreshed.get(name, float("-inf")) > self._ttl_s * REFRESH_SHARE]
        if not due:
            return
        if len(self._refreshed) > MAX_REFRESHED:
            self._refreshed.clear()
        self._refreshed.update(dict.fromkeys(due, now))
        self._submit(self._storers, self._refresh, due)

    def _refresh(self, names: list[bytes]) -> None:
        self._talk(lambda wire: wire.refresh(names, self._ttl_s))

    # --- vLLM's bookkeeping --------------------------------------------------------------------

    def get_finished_jobs(self) -> Iterable[JobResult]:
        done: list[JobResult] = []
        while not self._finished.empty():
            result = self._finished.get()
            job = self._jobs.pop(result.job_id)
            if not job.is_promotion:
                self._backlog_bytes -= len(job.keys) * self._chunk_bytes
            elif not result.success:  # asked again at once, they would be promised again (vLLM #49176)
                self._lookups.mark_miss(set(job.keys) - set(result.successful_keys or ()))
            done.append(result)
        return done

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._lookups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._lookups.flush()

    def drain_jobs(self) -> None:
        wait(set(self._running))

    def shutdown(self) -> None:
        self._lookups.shutdown()
        for pool in (self._loaders, self._storers):
            pool.shutdown(wait=True, cancel_futures=True)
        for wire in self._wires:
            wire.close()
        self._slots.release()

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        return metrics.definitions()

    def get_stats(self) -> OffloadingConnectorStats | None:
        return self._counts.take(breaker_open=self._breaker.open)

    # --- threads -------------------------------------------------------------------------------

    def _slot(self, chunk: int) -> memoryview:
        at = int(chunk) * self._chunk_bytes
        return self._slots[at : at + self._chunk_bytes]

    def _names(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> list[bytes]:
        adapter = req_context.get_state(Adapter)
        digest = adapter.digest if adapter else b""
        return [self._sealer.name(key, digest) for key in keys]

    def _submit(self, pool: ThreadPoolExecutor, work: Callable[..., None], *args: object) -> None:
        future = pool.submit(work, *args)
        self._running.add(future)
        future.add_done_callback(self._done)

    def _done(self, future: "Future[None]") -> None:
        self._running.discard(future)
        if not future.cancelled() and (error := future.exception()) is not None:
            logger.opt(exception=error).error("a KV transfer failed; its blocks are computed instead")

    def _talk(self, say: Callable[[Wire], Said]) -> Said | None:
        """Run a conversation on this thread's connection; None when redis is no help."""
        for attempt in (1, 2):
            if self._breaker.open:
                return None
            wire: Wire | None = getattr(self._local, "wire", None)
            try:
                if wire is None:
                    attempt = 2
                    wire = self._local.wire = Wire(
                        self._settings.cache_redis_url, self._settings.redis_user, self._settings.redis_password
                    )
                    self._wires.append(wire)
                said = say(wire)
            except (OSError, RedisError) as error:
                self._forget(wire)
                if attempt == 1 and not isinstance(error, TooSlow):
                    continue  # it may only have been restarted since we last spoke
                if self._breaker.failed():
                    logger.warning("redis-cache is away; KV blocks are computed", error=str(error))
                return None
            except BaseException:  # a bug: what is left of the replies must not be taken for later ones
                self._forget(wire)
                raise
            if self._breaker.worked():
                logger.info("redis-cache is back")
            return said
        return None

    def _forget(self, wire: Wire | None) -> None:
        """Let go of this thread's connection."""
        self._local.wire = None
        if wire is not None and wire in self._wires:
            self._wires.remove(wire)
            wire.close()
