"""The GPUs of this machine, as the NVIDIA driver tells of them (NVML)."""

import os
from typing import NamedTuple

import pynvml


class GpusAway(Exception):
    """The driver does not answer; the message says what it said instead."""


class Gpu(NamedTuple):
    """One GPU, by its number."""

    name: str
    memory_bytes: int
    free_bytes: int
    uuid: str = ""
    """GPU-…, by which CUDA_VISIBLE_DEVICES may name it."""


class Gpus(NamedTuple):
    """All of them, and the driver's version (580.95)."""

    driver: str
    gpus: tuple[Gpu, ...]

    @property
    def driver_major(self) -> int:
        """580 of 580.95; 0 when it says nothing that is a number."""
        first = self.driver.partition(".")[0]
        return int(first) if first.isdigit() else 0


def visible(found: Gpus, count: int = 1) -> tuple[int, ...]:
    """The numbers of the GPUs that this process may use: CUDA_VISIBLE_DEVICES (numbers, UUIDs), else the first `count`.

    The first as well where a name is of no GPU as a whole (MIG): which it is part of is not known.
    """
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    numbers = [
        int(name) if name.isdigit()
        else next((at for at, gpu in enumerate(found.gpus) if name and gpu.uuid.startswith(name)), None)
        for name in named
    ]  # fmt: skip
    known = tuple(number for number in numbers if number is not None)
    return known if len(known) == len(named) else tuple(range(count))


def look() -> Gpus:
    """Ask the driver. Raises GpusAway."""
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        memories = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        found = tuple(
            Gpu(str(pynvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free),
                str(pynvml.nvmlDeviceGetUUID(handle)))
            for handle, memory in zip(handles, memories, strict=True)
        )
        return Gpus(str(pynvml.nvmlSystemGetDriverVersion()), found)
    except pynvml.NVMLError as error:
        raise GpusAway(str(error)) from error
