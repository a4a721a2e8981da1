"""The engine's command line and environment: pure functions of the settings; a test shows them to vLLM's parser."""

import os
import sys
from pathlib import Path

from services.worker.settings import WorkerSettings

MIDDLEWARE = "services.worker.middleware.WorkerMiddleware"
NO_MEDIA_DOMAIN = "media-fetching-is-off.invalid"
"""`--allowed-media-domains` with a name that cannot exist: no `image_url` is ever fetched (SSRF)."""


SMALL_MACHINE_CORES = 4


def command(settings: WorkerSettings) -> list[str]:
    """The command that starts vLLM's OpenAI server.

    The module is used because the `vllm` console script of the CPU wheel does not start (no metadata under
    the name vllm).
    """
    args = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", settings.model,
        "--served-model-name", settings.served_name,
        "--host", settings.engine_host,
        "--port", str(settings.engine_port),
        "--max-num-seqs", str(settings.max_num_seqs),
        "--middleware", MIDDLEWARE,
        "--enable-prompt-tokens-details",
        "--enable-auto-tool-choice", "--tool-call-parser", settings.tool_call_parser,
        "--allowed-media-domains", NO_MEDIA_DOMAIN,
        "--allowed-origins", "[]",
        "--disable-fastapi-docs",
        "--disable-uvicorn-access-log",
        "--uvicorn-log-level", "warning",
    ]  # fmt: skip
    if settings.max_model_len:
        args += ["--max-model-len", str(settings.max_model_len)]
    if settings.accelerator == "cuda":
        args += [
            "--gpu-memory-utilization", str(settings.gpu_memory_utilization),
            "--tensor-parallel-size", str(settings.tensor_parallel_size),
        ]  # fmt: skip
        if settings.quantization:
            args += ["--quantization", settings.quantization]
    else:
        args += ["--enforce-eager"]
    return args + settings.extra_args


def environment(settings: WorkerSettings) -> dict[str, str]:
    """The engine's environment: ours, and vLLM's own switches."""
    env = dict(os.environ)
    env |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}
    if Path(settings.model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if settings.accelerator == "cpu":
        env["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)
        env["VLLM_CPU_OMP_THREADS_BIND"] = settings.cpu_threads_bind or threads_bind(sorted(os.sched_getaffinity(0)))
    return env


def threads_bind(cores: list[int]) -> str:
    """VLLM_CPU_OMP_THREADS_BIND for the cores a worker may use.

    vLLM's `auto` sets a core aside for the server; on a machine with few cores that costs more than it gains
    (2 cores, 32 concurrent: 530 tokens/s with both, 405 with auto; docs/log.md).
    """
    return "auto" if len(cores) > SMALL_MACHINE_CORES else ",".join(map(str, cores))
