"""The engines that a worker can run, behind one protocol (`base.py`)."""

from services.worker.engines.base import Engine
from services.worker.engines.fronted import Fronted
from services.worker.engines.vllm import Vllm
from services.worker.settings import WorkerSettings


def make(settings: WorkerSettings, worker_id: str) -> Engine:
    """The engine that ENGINE names."""
    return Vllm(settings, worker_id) if settings.engine == "vllm" else Fronted(settings, worker_id)
