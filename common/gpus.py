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


class Gpus(NamedTuple):
    """All of them, and the driver's version (580.95)."""

    driver: str
    gpus: tuple[Gpu, ...]

    @property
    def driver_major(self) -> int:
        """580 of 580.95; 0 when it says nothing that is a number."""
        first = self.driver.partition(".")[0]
        return int(first) if first.isdigit() else 0


def visible(count: int = 1) -> tuple[int, ...]:
    """The numbers of the GPUs that this process may use: CUDA_VISIBLE_DEVICES, else the first `count`.

    Where that names GPUs otherwise (by UUID), the first as well: their numbers are not known.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return tuple(map(int, named)) if all(name.strip().isdigit() for name in named) else tuple(range(count))


def look() -> Gpus:
    """Ask the driver. Raises GpusAway."""
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        memories = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        found = tuple(
            Gpu(str(pynvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free))
            for handle, memory in zip(handles, memories, strict=True)
        )
        return Gpus(str(pynvml.nvmlSystemGetDriverVersion()), found)
    except pynvml.NVMLError as error:
        raise GpusAway(str(error)) from error
