"""Hears from vLLM when it finished a request; `times.py` keeps it. The entry point in `plugin/` leads vLLM here."""

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from services.worker.vllm import times


class RequestTimes(StatLoggerBase):
    """Hands on the times of finished requests."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        pass

    def record(
        self, scheduler_stats: SchedulerStats | None, iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None, engine_idx: int = 0,
    ) -> None:
        """Take in one engine step."""
        for done in iteration_stats.finished_requests if iteration_stats is not None else ():
            if done.request_id is not None:
                times.keep(done.request_id, (done.queued_time, done.prefill_time, done.decode_time))

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
