"""Shared memory that killed engines left behind: vLLM unlinks its offload region only when it ends by itself."""

import os
from pathlib import Path

from loguru import logger

from services.worker.engine import ENGINE_ID_PREFIX

SHM = Path("/dev/shm")  # noqa: S108 - where vLLM puts it


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
