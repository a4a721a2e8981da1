"""The engine's command line and environment: pure functions of the settings; a test shows them to vLLM's parser."""

import contextlib
import json
import os
import secrets
import sys
from pathlib import Path

from common import checkpoint, gpus
from common.sizing import cards, memory
from services.worker import profiling
from services.worker.settings import WorkerSettings
from services.worker.vllm import family, serve

MIDDLEWARE = "services.worker.middleware.WorkerMiddleware"
PLUGIN = Path(__file__).parent / "plugin"
"""Holds the entry point by which vLLM finds `stat_logger.py`."""
LOGGING = Path(__file__).parent / "logging.json"
"""Makes vLLM's own lines JSON."""
NO_MEDIA_DOMAIN = "media-fetching-is-off.invalid"
"""`--allowed-media-domains` with a name that cannot exist: no `image_url` is ever fetched (SSRF)."""


SMALL_MACHINE_CORES = 4
CPU_STEP_TOKENS = 512
CPU_SEQUENCES = 64
CUDA_CHUNK_BLOCKS = 15
"""Blocks in one redis value on a GPU: of 16 tokens each 30 MiB for an 8B model, which fits jemalloc's classes
(docs/kv-cache.md). Given in blocks, for their size is the attention backend's choice."""
MAX_LORA_RANK = 16
KEPT_ADAPTERS = 16
"""Adapters whose weights stay in memory; others are read again from their folder."""
ENGINE_ID_PREFIX = "owngpt-"
"""Then the agent's process id: whose shared memory a file in /dev/shm is."""


def command(settings: WorkerSettings) -> list[str]:
    """The command that starts vLLM's OpenAI server with our middleware inside."""
    return [*bare(settings), "--middleware", MIDDLEWARE]


def bare(settings: WorkerSettings) -> list[str]:
    """The same without the middleware, which needs the stack.

    A module, because the `vllm` console script of the CPU wheel does not start (no metadata under the name vllm).
    """
    args = [
        sys.executable, "-m", "services.worker.vllm.serve" if forks(settings) else "vllm.entrypoints.openai.api_server",
        "--model", settings.model,
        "--served-model-name", settings.served_name,
        "--host", settings.engine_host,
        "--port", str(settings.engine_port),
        "--max-num-seqs", str(sequences(settings)),
        "--scheduling-policy", "priority",  # batches wait longer
        "--enable-prompt-tokens-details",
        "--enable-auto-tool-choice", "--tool-call-parser", tool_parser(settings),
        "--tool-strict-level", "parameter",  # forced calls fit their schema, strict or not
        "--allowed-media-domains", NO_MEDIA_DOMAIN,
        "--allowed-origins", "[]",
        "--disable-fastapi-docs",
        "--disable-uvicorn-access-log",
        "--uvicorn-log-level", "warning",
    ]  # fmt: skip
    if settings.model_revision and not Path(settings.model).is_dir():
        args += ["--revision", settings.model_revision, "--tokenizer-revision", settings.model_revision]
    if settings.max_model_len:
        args += ["--max-model-len", str(settings.max_model_len)]
    elif settings.accelerator == "cuda":
        args += ["--max-model-len", "auto"]  # the model's own, or as much as there is memory for
    if settings.otlp_traces_endpoint:
        args += ["--otlp-traces-endpoint", settings.otlp_traces_endpoint]
    if settings.accelerator == "cuda":
        args += [
            "--gpu-memory-utilization", str(settings.gpu_memory_utilization),
            "--tensor-parallel-size", str(settings.tensor_parallel_size),
        ]  # fmt: skip
        if sleeps(settings):
            args.append("--enable-sleep-mode")
    else:
        args += ["--enforce-eager", "--worker-cls", "services.worker.vllm.cpu.Worker"]
        if forks(settings):
            args += ["--distributed-executor-backend", serve.EXECUTOR]
    decoder = family.is_decoder(checkpoint.config(settings.model, settings.model_revision))
    if serves_adapters(settings) and decoder:
        args += adapters(settings)
    if settings.kv_tier == "redis" and decoder:
        args += kv_tier(settings)
    if settings.profile_dir is not None:
        args += profiling.arguments(settings.profile_dir)
    return args + settings.extra_args


def adapters(settings: WorkerSettings) -> list[str]:
    """The flags that let adapters be loaded while the engine runs."""
    return [
        "--enable-lora", "--max-loras", str(settings.max_loras), "--max-lora-rank", str(MAX_LORA_RANK),
        "--max-cpu-loras", str(max(settings.max_loras, KEPT_ADAPTERS)),
    ]  # fmt: skip


def sleeps(settings: WorkerSettings) -> bool:
    """Whether its engine can give a GPU free without ending (vLLM's sleep mode)."""
    return settings.accelerator == "cuda" and bool(settings.shared_place)


def serves_adapters(settings: WorkerSettings) -> bool:
    """Whether tuned models can be loaded beside the base."""
    return settings.adapters_dir is not None and settings.max_loras > 0


def tool_parser(settings: WorkerSettings) -> str:
    """The one that was named, else the family's."""
    return settings.tool_call_parser or family.tool_parser(
        checkpoint.config(settings.model, settings.model_revision)
    )


def sequences(settings: WorkerSettings) -> int:
    """Requests at once: what was asked for, else what suits the accelerator."""
    if settings.max_num_seqs or settings.accelerator == "cpu":
        return settings.max_num_seqs or CPU_SEQUENCES
    with contextlib.suppress(cards.CannotSay):
        return memory.sequences(cards.find(gpu_name()))
    return memory.USUAL_SEQUENCES


def gpu_name() -> str:
    """The name of the first GPU, as the driver says it; empty when no driver answers."""
    try:
        found = gpus.look()
        return found.gpus[gpus.visible(found)[0]].name
    except (gpus.GpusAway, IndexError):
        return ""


def shaping(settings: WorkerSettings) -> str:
    """The settings on which an answer's text may depend."""
    return f"{settings.max_model_len} {tool_parser(settings)} {settings.engine_args}"


def kv_tier(settings: WorkerSettings) -> list[str]:
    """The flags that put redis-cache behind the engine's KV blocks (`kv/`). No secret is among them."""
    extra: dict[str, object] = {
        "spec_name": "RedisTieringSpec",
        "spec_module_path": "services.worker.vllm.kv.spec",
        "cpu_bytes_to_use": int(settings.kv_host_gib * 2**30),
        "offload_prompt_only": False,  # the next turn of a chat begins with this answer
        "secondary_tiers": [{"type": "RedisTier", "module_path": "services.worker.vllm.kv.tier"}],
    }
    if settings.accelerator == "cuda":
        extra["blocks_per_chunk"] = CUDA_CHUNK_BLOCKS
    args = [
        "--prefix-caching-hash-algo", "sha256_cbor",  # the same in every process and Python version
        "--kv-transfer-config", json.dumps({
            "kv_connector": "RedisOffloadingConnector",
            "kv_connector_module_path": "services.worker.vllm.kv.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "engine_id": f"{ENGINE_ID_PREFIX}{os.getpid()}-{secrets.token_hex(4)}",
            "kv_connector_extra_config": extra,
        }),
    ]  # fmt: skip
    if settings.accelerator == "cpu":
        # A request waits a few engine steps for its blocks; on a CPU a step of 2,048 tokens takes seconds.
        args += ["--max-num-batched-tokens", str(CPU_STEP_TOKENS)]
    return args


def environment(settings: WorkerSettings) -> dict[str, str]:
    """The engine's environment: ours, and vLLM's own switches."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PLUGIN), env.get("PYTHONPATH")]))
    env |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}
    env["VLLM_LOGGING_CONFIG_PATH"] = str(LOGGING)
    if Path(settings.model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if settings.otlp_traces_endpoint:
        env |= {"OTEL_SERVICE_NAME": "worker", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    if serves_adapters(settings):
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"  # behind the worker's token; nginx never routes there
    if sleeps(settings):
        env["VLLM_SERVER_DEV_MODE"] = "1"  # /sleep and /wake_up; behind the worker's token, nginx never routes there
    if settings.accelerator == "cuda":
        env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # it would be compiled with the host's nvcc, in front of a client
    else:
        env["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)
        env["VLLM_CPU_OMP_THREADS_BIND"] = bind(settings)
        env["NUMBA_THREADING_LAYER"] = "workqueue"  # n-gram drafts; its others leave OpenMP one thread
        if forks(settings):
            env |= serve.environment(bind(settings))
    return env


def bind(settings: WorkerSettings) -> str:
    """VLLM_CPU_OMP_THREADS_BIND."""
    return settings.cpu_threads_bind or threads_bind(sorted(os.sched_getaffinity(0)))


def forks(settings: WorkerSettings) -> bool:
    """Whether its processes are forked: on a CPU, when it is known which cores its one rank has."""
    return settings.accelerator == "cpu" and bool(serve.cores(bind(settings)))


def threads_bind(cores: list[int]) -> str:
    """VLLM_CPU_OMP_THREADS_BIND for the cores a worker may use.

    vLLM's `auto` sets a core aside for the server; on a machine with few cores that costs more than it gains
    (2 cores, 32 concurrent: 530 tokens/s with both, 405 with auto; docs/log.md).
    """
    return "auto" if len(cores) > SMALL_MACHINE_CORES else ",".join(map(str, cores))
