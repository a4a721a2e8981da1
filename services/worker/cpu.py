"""vLLM's CPU worker, told to compute LoRA per adapter (`--worker-cls`). No vLLM file is changed."""

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker


class Worker(CPUWorker):  # type: ignore[misc]  # untyped
    """One rank of an engine on a CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        current_platform.get_punica_wrapper = lambda: "services.worker.punica.GroupedPunica"
