"""The engines that a worker can run, behind one protocol (`base.py`)."""

from services.worker.engines.attached import Attached
from services.worker.engines.base import Engine
from services.worker.engines.vllm import Vllm
from services.worker.settings import WorkerSettings


def make(settings: WorkerSettings, worker_id: str) -> Engine:
    """The engine that ENGINE names."""
    return Attached(settings) if settings.engine == "attached" else Vllm(settings, worker_id)
