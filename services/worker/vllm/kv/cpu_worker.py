"""The device-to-host copies on vLLM's CPU platform, which its own offloading refuses to make.

"Device" blocks are pages of the engine's KV tensors in ordinary memory, host chunks rows of the shared region; the
copy is a memmove, done when it is submitted, so it cannot fail and is finished at once. Bytes are opaque: what is
inside a page depends on the instruction set (`block.Layout.attention`).
Interface: vllm/v1/kv_offload/base.py, `OffloadingWorker`; its GPU counterpart is cpu/gpu_worker.py.
"""

import ctypes
import time

import numpy as np
import torch
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.gpu_worker import compute_sub_block_ptrs
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from services.worker.vllm import shm


class CpuPlatformWorker(OffloadingWorker):
    """Copies between KV tensors and this rank's part of the shared region's rows."""

    def __init__(self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion) -> None:
        self._region = region
        self._blocks_per_chunk = blocks_per_chunk
        self._refs = kv_caches.group_data_refs
        self._device = [t.tensor.view(torch.int8).view(-1, t.page_size_bytes) for t in kv_caches.tensors]
        self._host = [
            region.create_next_worker_view(t.page_size_bytes * blocks_per_chunk) for t in kv_caches.tensors
        ]
        self._done: list[TransferResult] = []
        if region.mmap_obj is not None:
            with memoryview(region.mmap_obj) as pages:
                shm.populate(pages)

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        self._copy(job_id, src_spec, dst_spec, to_host=True)
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        self._copy(job_id, dst_spec, src_spec, to_host=False)
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def shutdown(self) -> None:
        self._host.clear()
        self._region.cleanup()

    def _copy(self, job_id: int, device: GPULoadStoreSpec, host: LoadStoreSpec, *, to_host: bool) -> None:
        assert isinstance(host, BlockIDsLoadStoreSpec)  # noqa: S101 - what the CPU spec hands out
        began, copied = time.perf_counter(), 0
        block_at = chunk_at = 0
        for refs, blocks, first in zip(self._refs, device.group_sizes, device.block_indices, strict=True):
            if not blocks:
                continue
            skip = first % self._blocks_per_chunk  # the first chunk may be entered in its middle
            chunks = -(-(blocks + skip) // self._blocks_per_chunk)
            for ref in refs:
                near, far = np.empty(blocks, np.uint64), np.empty(blocks, np.uint64)
                compute_sub_block_ptrs(
                    device.block_ids[block_at : block_at + blocks], 1, near, self._device[ref.tensor_idx]
                )
                compute_sub_block_ptrs(
                    host.block_ids[chunk_at : chunk_at + chunks], self._blocks_per_chunk, far,
                    self._host[ref.tensor_idx], skip_count=skip,
                )
                source, target = (near, far) if to_host else (far, near)
                for a, b in zip(source.tolist(), target.tolist(), strict=True):
                    ctypes.memmove(b, a, ref.page_size_bytes)
                copied += blocks * ref.page_size_bytes
            block_at += blocks
            chunk_at += chunks
        self._done.append(TransferResult(job_id, True, copied, time.perf_counter() - began))
