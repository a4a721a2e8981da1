"""vLLM's OpenAI server on a CPU, imported once instead of thrice: `python -m services.worker.vllm.serve` and its flags.

vLLM's CPU platform starts the engine's process, and from it the worker's, as new interpreters (`spawn`): each imports
torch, transformers and vLLM again, nine seconds on two cores, one after the other. Forked, they have it all, and share
its memory. A fork is safe here: nothing has computed before it, so no thread pool of OpenMP's is lost. What OpenMP
reads when it is loaded, a fork cannot be told any more: `environment` has it beforehand (docs/decisions/0016).
"""

import importlib.util
import multiprocessing
import os
import re
import runpy
from multiprocessing.context import BaseContext
from pathlib import Path

LOADED = ("LD_PRELOAD", "OMP_NUM_THREADS", "GOMP_CPU_AFFINITY")
"""Read by OpenMP as it is loaded, and by vLLM at other times, to whom it means something else."""
EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""The model in the scheduler's own process. In one beside it, the scheduler spins until the step is done, on a core
that the step needs. vLLM makes the other one of `uni` on a CPU, for OpenMP's sake; here OpenMP knows all beforehand."""
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def cores(bind: str) -> list[int]:
    """The cores of VLLM_CPU_OMP_THREADS_BIND, like 0-3,6; none: there are several ranks, or vLLM decides.

    Only one worker process can be forked into: others would need other cores.
    """
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", bind):
        return []
    return [core for first, last in _RANGE.findall(bind) for core in range(int(first), int(last or first) + 1)]


def environment(bind: str) -> dict[str, str]:
    """What `spawn` would tell the worker: torch's own OpenMP, and a thread on each of its cores."""
    threads = cores(bind)
    said = {"OMP_NUM_THREADS": str(len(threads)), "GOMP_CPU_AFFINITY": " ".join(map(str, threads))}
    torch = importlib.util.find_spec("torch")
    library = Path(torch.origin or "").parent / "lib/libgomp.so.1" if torch is not None else Path()
    if library.is_file():
        said["LD_PRELOAD"] = ":".join(filter(None, (str(library), os.environ.get("LD_PRELOAD"))))
    return said


def forked() -> BaseContext:
    """The way to make processes, for all of vLLM."""
    return multiprocessing.get_context("fork")


def main() -> None:
    """The server, until it ends."""
    os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))  # OpenMP has put this thread on the first core
    for name in LOADED:
        os.environ.pop(name, None)
    import vllm.utils.system_utils as system

    system.get_mp_context = forked
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
