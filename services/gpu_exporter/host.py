"""The machine itself: cores, memory, disks. In a container that is the host: /proc knows no other."""

import shutil
from pathlib import Path

import psutil

from services.gpu_exporter.samples import Snapshot


def sample(disks: tuple[Path, ...]) -> Snapshot:
    """Host metrics now. CPU use is that since the last call in this thread; a disk that is not there is left out."""
    found = Snapshot()
    found.gauge("host_cpu_utilization_ratio", "Share of all cores in use since the last sample.",
                psutil.cpu_percent(None) / 100)
    found.gauge("host_cpus", "Logical cores.", psutil.cpu_count() or 0)
    found.gauge("host_load1", "Load average of one minute.", psutil.getloadavg()[0])
    memory = psutil.virtual_memory()
    found.gauge("host_memory_total_bytes", "Memory of the host.", memory.total)
    found.gauge("host_memory_used_bytes", "Memory in use: total minus available.", memory.total - memory.available)
    for folder in disks:
        try:
            usage = shutil.disk_usage(folder)
        except OSError:
            continue
        found.gauge("host_disk_total_bytes", "Size of the file system a folder is on.", usage.total, folder=str(folder))
        found.gauge("host_disk_free_bytes", "Free bytes of it for a plain user.", usage.free, folder=str(folder))
    return found
