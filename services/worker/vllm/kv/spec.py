"""vLLM's tiering spec with the one part it lacks: a worker for the CPU platform. On a GPU it is vLLM's own."""

from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from services.worker.vllm.kv.cpu_worker import CpuPlatformWorker


class RedisTieringSpec(TieringOffloadingSpec):
    """`spec_name` in kv_connector_extra_config."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if not current_platform.is_cpu():
            return super().get_worker(kv_caches)
        worker: OffloadingWorker | None = getattr(self, "_worker", None)
        if worker is None:
            region = SharedOffloadRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            worker = self._worker = CpuPlatformWorker(kv_caches, self.blocks_per_chunk, region)
        return worker
