"""vLLM's shared memory for offloaded blocks: pages made at the start, leftovers of killed engines swept."""

import ctypes
import os
from pathlib import Path

from loguru import logger

from services.worker.vllm.command import ENGINE_ID_PREFIX

SHM = Path("/dev/shm")  # noqa: S108 - where vLLM puts it


MADV_POPULATE_WRITE = 23
"""Linux 5.14; older kernels make pages as they are touched."""


def populate(view: memoryview) -> None:
    """Make every page of a shared region now, for this process.

    Else the first round of stores pays a page fault for each 4 KiB, in the step that computes and in the thread that
    sends (docs/log.md).
    """
    first = ctypes.c_char.from_buffer(view)
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.madvise(ctypes.addressof(first), view.nbytes, MADV_POPULATE_WRITE)


def sweep(folder: Path = SHM) -> int:
    """Remove the offload regions whose agent is no more. Returns how many bytes that freed."""
    freed = 0
    for file in folder.glob(f"vllm_offload_{ENGINE_ID_PREFIX}*.mmap"):
        agent = file.name.removeprefix(f"vllm_offload_{ENGINE_ID_PREFIX}").partition("-")[0]
        try:
            if file.stat().st_uid != os.getuid() or (agent.isdigit() and _is_agent(int(agent))):
                continue
            freed += file.stat().st_blocks * 512
            file.unlink()
        except FileNotFoundError:
            continue  # another worker sweeps, too
        logger.info("removed shared memory of an engine that was killed", file=file.name)
    return freed


def _is_agent(pid: int) -> bool:
    """Whether a process is a worker's agent other than this one (which has started nothing yet)."""
    try:
        return pid != os.getpid() and b"services.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
