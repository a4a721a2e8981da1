"""The CPU engine as it was before norms were fused and the model moved into the scheduler's process (docs/decisions/0017).

For `default_speed`: `--worker-cls bench.before.Worker --distributed-executor-backend mp`.
"""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from services.worker.vllm import cpu


class Worker(CPUWorker):  # type: ignore[misc]  # untyped
    """One rank."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cpu.pin()
        super().__init__(*args, **kwargs)
        cpu.never_compile()
        cpu.put_adapters_right()
