"""cpu or cuda, which is installed for: `accelerator.py auto|cpu|cuda` prints it. Runs before anything is installed.

Ends with 1 and a line for the user when a GPU is asked for, or there, that cannot be used.
"""

import ctypes
import shutil
import sys
from pathlib import Path

MIN_DRIVER = 580
"""As common/sizing/cards.py says; a test compares the two."""
NEEDS_BYTES = {"cpu": 4_000_000_000, "cuda": 14_000_000_000}
"""Of disk: the environment, pip's temporary files, and the bundled model."""


def driver() -> str | None:
    """The NVIDIA driver's version; None where there is no driver that answers, or no GPU."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() if hasattr(nvml, "nvmlInit_v2") else nvml.nvmlInitWithFlags(0):
        return None
    count, version = ctypes.c_uint(), ctypes.create_string_buffer(80)
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) or not count.value:
        return None
    return None if nvml.nvmlSystemGetDriverVersion(version, 80) else version.value.decode()


def chosen(asked: str) -> str:
    """cpu or cuda. Raises ValueError with a line for the user."""
    if asked not in ("auto", "cpu", "cuda"):
        raise ValueError(f"ACCELERATOR={asked}: auto, cpu or cuda.")
    found = None if asked == "cpu" else driver()
    if found is None:
        if asked == "cuda":
            raise ValueError("ACCELERATOR=cuda: no NVIDIA driver answers here. Without a GPU: ACCELERATOR=cpu")
        return "cpu"
    major = int(found.partition(".")[0])
    if major < MIN_DRIVER:
        raise ValueError(f"The NVIDIA driver is {found}; vLLM's CUDA 13.0 build needs {MIN_DRIVER} or newer. Choose a "
                         "host with a newer driver, or serve on the CPU: ACCELERATOR=cpu")
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        raise ValueError("Triton compiles its kernels when an engine starts, and there is no C compiler here. "
                         "On Debian and Ubuntu: apt install gcc python3.11-dev")
    return "cuda"


def main(asked: str) -> int:
    """The command."""
    try:
        accelerator = chosen(asked or "auto")
        free = shutil.disk_usage(Path.cwd()).free
        if not Path(".venv/bin/python").exists() and free < NEEDS_BYTES[accelerator]:
            needed = NEEDS_BYTES[accelerator] / 1e9
            raise ValueError(f"The installation ({accelerator}) needs {needed:.0f} GB of free disk here; there are "
                             f"{free / 1e9:.1f} GB.")
    except ValueError as error:
        print(f"owngpt: {error}", file=sys.stderr)
        return 1
    print(accelerator)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
