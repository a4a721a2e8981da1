"""A driver that is none: libcuda.so.1, in which every function says that there is no device, and libnvidia-ml.so.1 (tests/fake_nvml.c)."""

import re
import subprocess
from pathlib import Path

from services.local.plan import ROOT

NO_DEVICE = 100
SPECIAL = {
    "cuDriverGetVersion": "int cuDriverGetVersion(int *version) { *version = 13000; return 0; }",
    "cuGetErrorName": 'int cuGetErrorName(int error, const char **text) { (void)error; *text = "CUDA_ERROR_NO_DEVICE"; return 0; }',
    "cuGetErrorString": 'int cuGetErrorString(int error, const char **text) { (void)error; *text = "no device"; return 0; }',
}


def build(folder: Path, python: Path) -> None:
    """Both libraries, for what the libraries in `python`'s environment ask of a driver."""
    folder.mkdir()
    names = set(SPECIAL)
    for library in (python.parents[1] / "lib").rglob("*.so*"):
        if "vllm" in library.parts or "torch" in library.parts:
            listed = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=False).stdout
            names.update(re.findall(r" U (cu[A-Z]\w+)\s*$", listed, re.M))
    driver = {name for name in names if not re.match(r"cu(BLAS|FFT|RAND|SPARSE|SOLVER|DNN|PTI)", name)}
    source = folder / "cuda.c"
    source.write_text("\n".join(SPECIAL.get(name, f"int {name}(void) {{ return {NO_DEVICE}; }}") for name in sorted(driver)) + "\n")
    for made, code in (("libcuda.so.1", source), ("libnvidia-ml.so.1", ROOT / "tests/fake_nvml.c")):
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(folder / made), str(code)], check=True)


def environment(libraries: Path, driver: Path, gpu: str) -> dict[str, str]:
    """What makes a process see them."""
    return {"LD_LIBRARY_PATH": str(libraries), "FAKE_NVML": str(driver), "FAKE_GPU": gpu}
