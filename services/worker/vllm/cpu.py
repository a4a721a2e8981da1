"""vLLM's CPU worker (`--worker-cls`): nothing compiles lazily, norms are one kernel, LoRA per adapter.

No vLLM file is changed.
"""

import os
import sys
from types import FunctionType
from typing import Any

import torch
from vllm.lora.layers import base_linear, fused_moe
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker

from services.worker.vllm import norms, serve


def never_compile() -> None:
    """Run vLLM's small `@torch.compile` helpers as the Python they are.

    Their first use would call a C++ compiler in front of every running request: 10 to 16 s where there is one, the end
    of the engine where there is none (the container). One of them counts the ranks of `logprobs`.
    """
    type(current_platform).simple_compile_backend = "eager"  # for modules that come later
    for name, module in list(sys.modules.items()):
        if not name.startswith("vllm."):
            continue
        for attribute, value in list(vars(module).items()):
            raw = getattr(value, "_torchdynamo_orig_callable", None) if isinstance(value, FunctionType) else None
            if raw is not None:
                setattr(module, attribute, raw)


def pin() -> None:
    """Bind this thread as the first of its OpenMP's, where it is known which cores there are."""
    if threads := serve.cores(os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "")):
        os.sched_setaffinity(0, {threads[0]})


def put_adapters_right() -> None:
    """LoRA per adapter, on W8A8 layers too: vLLM asks a layer's weight where it lies; oneDNN has packed that away."""
    base_linear._get_lora_device = fused_moe._get_lora_device = lambda layer: torch.device("cpu")
    current_platform.get_punica_wrapper = lambda: "services.worker.vllm.punica.GroupedPunica"


class Worker(CPUWorker):  # type: ignore[misc]  # untyped
    """One rank of an engine on a CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pin()
        super().__init__(*args, **kwargs)
        never_compile()
        norms.put_in_place()
        put_adapters_right()
