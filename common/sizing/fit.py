"""Whether models fit on the GPUs of this machine, asked before anything is downloaded or started."""

from common import checkpoint
from common.gpus import Gpus
from common.sizing import cards, memory, shape
from common.sizing.cards import MIN_DRIVER, CannotSay
from common.sizing.memory import Serving, gib


def check_driver(found: Gpus) -> None:
    """Raise CannotSay for a driver that is too old for the pinned CUDA build of vLLM."""
    if found.driver_major < MIN_DRIVER:
        raise CannotSay(f"The NVIDIA driver is {found.driver}; vLLM's CUDA 13.0 build needs {MIN_DRIVER} or newer. "
                        "Choose a host with a newer driver, or ACCELERATOR=cpu.")


def check_free(found: Gpus, gpus: tuple[int, ...], share: float) -> None:
    """Raise CannotSay when others have the memory that an engine is to take."""
    for number in gpus:
        if number >= len(found.gpus):
            raise CannotSay(f"GPU {number} is asked for; this machine has {len(found.gpus)}.")
        gpu = found.gpus[number]
        if gpu.free_bytes < share * gpu.memory_bytes:
            raise CannotSay(
                f"GPU {number} ({gpu.name}) has {gib(gpu.free_bytes)} of {gib(gpu.memory_bytes)} free, and "
                f"{share:.0%} are to be taken: another engine or a training has them. One worker a GPU, or smaller "
                "shares (gpu_memory in models.yaml, GPU_MEMORY_UTILIZATION)."
            )


def check_model(found: Gpus, gpus: tuple[int, ...], model: str, revision: str, how: Serving) -> None:
    """Raise CannotSay with what is missing for a model that does not fit. What is not known passes: model, card."""
    try:
        said = checkpoint.config(model, revision)
        known = shape.of_config(said, model) if said else shape.read(model)
        gpu = found.gpus[gpus[0]]
        card = cards.of_memory(cards.find(gpu.name), gpu.memory_bytes)
    except (CannotSay, IndexError):  # a GPU that is not there is said by check_free
        return
    memory.serve(known, card, how)
