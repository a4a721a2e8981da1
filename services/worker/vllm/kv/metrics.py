"""What the tier reports on the worker's /metrics, beside vLLM's own `external_prefix_cache_*` and `kv_offload_*`."""

import threading
from collections import defaultdict

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
)

BLOCKS = "owngpt_kv_blocks"
BYTES = "owngpt_kv_bytes"
SAVED = "owngpt_kv_seconds_saved"
AWAY = "owngpt_kv_redis_away"


def definitions() -> dict[str, OffloadingMetricMetadata]:
    """Every metric of the tier, for vLLM's registry."""
    return {
        BLOCKS: OffloadingCounterMetadata(
            "KV chunks by what became of them. Lookups: missed, not_worth_it (computing is faster); loads: loaded, "
            "lost (gone or late), foreign (does not verify); stores: stored, present (redis had it), not_admitted "
            "(first sighting while redis is crowded), refused (redis said no), shed (backlog full or redis away).",
            ("result",),
        ),
        BYTES: OffloadingCounterMetadata("Bytes of KV chunks loaded from and stored to redis.", ("direction",)),
        SAVED: OffloadingCounterMetadata(
            "Estimate of prefill time saved: tokens loaded ÷ this worker's measured prefill rate, minus the time "
            "the loads took."
        ),
        AWAY: OffloadingGaugeMetadata("1 while redis-cache does not answer and is left alone."),
    }


class Counts:
    """Counters that any thread adds to and the scheduler takes away."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
        self._was_open = False

    def add(self, name: str, value: float, labels: tuple[str, ...] = ()) -> None:
        """Count."""
        if value:
            with self._lock:
                self._counts[name, labels] += value

    def take(self, *, breaker_open: bool) -> OffloadingConnectorStats | None:
        """What was counted since the last call; None when nothing was."""
        with self._lock:
            counts, self._counts = self._counts, defaultdict(float)
        if not counts and breaker_open == self._was_open:
            return None
        self._was_open = breaker_open
        stats = OffloadingConnectorStats()
        for (name, labels), value in counts.items():
            stats.increase_counter(name, value, labels)
        stats.set_gauge(AWAY, float(breaker_open))
        return stats
