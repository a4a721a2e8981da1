"""Before an engine starts on a GPU: what it would say after minutes, in a traceback, in words at once."""

from common import gpus
from common.sizing import fit
from common.sizing.cards import CannotSay
from common.sizing.memory import Serving
from services.worker.settings import WorkerSettings


def check(settings: WorkerSettings) -> None:
    """Raise CannotSay for a driver that is too old, memory that others have, a model that cannot fit."""
    if settings.accelerator != "cuda" or settings.engine != "vllm":
        return
    try:
        found = gpus.look()
    except gpus.GpusAway as error:
        raise CannotSay(f"The NVIDIA driver does not answer: {error}") from error
    fit.check_driver(found)
    if settings.extra_args:
        return  # they may make it fit: other KV types, weights on the host
    how = Serving(
        settings.tensor_parallel_size, settings.gpu_memory_utilization, settings.max_model_len, settings.max_num_seqs,
        settings.max_loras if settings.adapters_dir is not None else 0,
    )
    ours = gpus.visible(found, settings.tensor_parallel_size)
    fit.check_model(found, ours, settings.model, settings.model_revision, how)


def check_free(settings: WorkerSettings) -> None:
    """Raise CannotSay when others have the memory that the engine is to take; asked just before it starts."""
    if settings.accelerator == "cuda" and settings.engine == "vllm":
        try:
            found = gpus.look()
            ours = gpus.visible(found, settings.tensor_parallel_size)
            fit.check_free(found, ours, settings.gpu_memory_utilization)
        except gpus.GpusAway as error:
            raise CannotSay(f"The NVIDIA driver does not answer: {error}") from error
