"""vLLM's OffloadingConnector, told what only the engine's configuration knows.

It names the namespace of this engine's blocks, tells the tier which adapter a request uses, measures prefill for the
break-even rule, and waits a millisecond for a lookup that would otherwise cost the request a whole engine step.
Loaded by `kv_connector_module_path`; no vLLM file is changed.
"""

import time
from typing import TYPE_CHECKING

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from common import logs
from services.worker import identity
from services.worker.settings import WorkerSettings
from services.worker.vllm.kv.block import Layout
from services.worker.vllm.kv.tier import Adapter, RedisTier

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SETTLE_S = 0.002
"""How long the scheduler may wait for lookups in one step (a pipeline of STRLEN takes 0.2 ms over a unix socket)."""
IDLE_S = 0.005
"""How long a step without tokens may wait for a load; a new request waits as long at most."""
PREFILL_TOKENS = 128
"""Steps with fewer tokens say little about prefill."""


class RedisOffloadingConnector(OffloadingConnector):
    """`kv_connector` in --kv-transfer-config."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        self._tier: RedisTier | None = None
        if role is KVConnectorRole.SCHEDULER:
            settings = WorkerSettings()  # filled from the environment
            logs.configure("worker", settings.log_level)
            assert vllm_config.kv_transfer_config is not None  # noqa: S101 - else nobody made a connector
            tier_config = vllm_config.kv_transfer_config.kv_connector_extra_config["secondary_tiers"][0]
            tier_config["namespace"] = layout(vllm_config, kv_cache_config).namespace().hex()
        super().__init__(vllm_config, role, kv_cache_config)
        if self.connector_scheduler is not None:
            self._tier = next(
                tier for tier in self.connector_scheduler.manager.secondary_tiers if isinstance(tier, RedisTier)
            )
            self._chunk_tokens = self.connector_scheduler.config.kv_group_configs[0].tokens_per_chunk
        self._adapters: dict[tuple[int, str], Adapter] = {}
        self._patience_s = SETTLE_S
        self._steps: list[tuple[float, int]] = []
        self._step_ended = 0.0

    def on_new_request(self, request: Request) -> None:
        super().on_new_request(request)
        if request.lora_request is not None:
            status = self.scheduler._req_status[request.request_id]
            # Read once: the engine goes on with the weights it has loaded, whatever becomes of the files.
            lora = (request.lora_request.lora_int_id, request.lora_request.lora_path)
            if lora not in self._adapters:
                self._adapters[lora] = Adapter(identity.adapter_digest(lora[1]))
            status.req_context.set_state(self._adapters[lora])

    def _max_loadable_tokens(self, request: Request, num_computed_tokens: int) -> int | None:
        """Whole chunks that leave at least one token to compute: what a local prefix hit would give as well.

        Then the step that follows has the same shape after either kind of hit, and so the same text. And no more chunks
        than half of the host tier holds: a prompt with more would push out its own first ones, and fetch them again.
        """
        whole = (request.num_tokens - 1) // self._chunk_tokens * self._chunk_tokens
        bound: int | None = super()._max_loadable_tokens(request, num_computed_tokens)
        mine: int = max(0, whole - num_computed_tokens)
        if self._tier is not None:
            mine = min(mine, max(1, self._tier.host_chunks // 2) * self._chunk_tokens)
        return mine if bound is None else min(bound, mine)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        matched: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if matched[0] is None and self._tier is not None and self._patience_s > 0:
            began = time.monotonic()
            settled = self._tier.settle(self._patience_s)
            self._patience_s -= time.monotonic() - began
            if settled:
                matched = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return matched

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        self._patience_s = SETTLE_S
        if self._tier is not None and not scheduler_output.total_num_scheduled_tokens:
            self._tier.await_load(IDLE_S)
        self._steps.append((time.monotonic(), scheduler_output.total_num_scheduled_tokens))
        return super().build_connector_meta(scheduler_output)

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Called once at the end of every step, which makes it the step's clock."""
        if self._tier is not None and self._steps:
            began, tokens = self._steps.pop(0)
            now = time.monotonic()
            if tokens >= PREFILL_TOKENS:
                self._tier.economy.prefilled(tokens, now - max(began, self._step_ended))
            self._step_ended = now
        stats: KVConnectorStats | None = super().get_kv_connector_stats()
        return stats


def layout(vllm_config: "VllmConfig", kv_cache_config: KVCacheConfig) -> Layout:
    """What decides the bytes of this engine's blocks."""
    offloading = build_offloading_config(vllm_config, kv_cache_config)
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    return Layout(
        platform=f"{current_platform.device_type} {current_platform.get_device_name()}",
        attention=attention(vllm_config, spec),
        model=identity.model_digest(model.model, model.revision),
        dtype=str(model.dtype),
        kv_dtype=str(cache.cache_dtype),
        quantization=str(model.quantization),
        layers=tuple(name for group in offloading.groups for name in group.layer_names),
        tokens_per_block=offloading.groups[0].tokens_per_block,
        blocks_per_chunk=offloading.cache.blocks_per_chunk,
        kv_layout=str(offloading.kv_cache_layout),
        row_bytes=offloading.worker_kv_bytes_per_block * parallel.world_size * offloading.cache.blocks_per_chunk,
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        context_parallel=parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size,
        hash_algorithm=cache.prefix_caching_hash_algo,
        overrides=f"{model.hf_overrides} {model.max_model_len if model.hf_overrides else ''}",
        vllm=".".join(vllm.__version__.split(".")[:2]),
    )


def attention(vllm_config: "VllmConfig", spec: object) -> str:
    """The backend that writes K and V into a block, and on CPU the instruction set it does that for."""
    chosen = str(vllm_config.attention_config.backend)
    if not current_platform.is_cpu():
        # None: vLLM chose by card and version, which are in the layout; where the model is in this process, it says.
        layers = vllm_config.compilation_config.static_forward_context.values()
        return next((layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")), chosen)
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(
        vllm_config.model_config.dtype, vllm_config.cache_config.block_size,
        getattr(spec, "head_size", None), vllm_config.cache_config.cache_dtype,
    )
    return f"{chosen} {current_platform.get_cpu_architecture().name} {isa}"
