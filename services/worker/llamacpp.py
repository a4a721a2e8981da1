"""llama.cpp and the front before it, in one process: `python -m services.worker.llamacpp`.

xllamacpp is llama.cpp's own C++ server in a wheel: continuous batching, its own threads, no word of Python in a
request. It listens on a port of the loopback that is told to nobody, behind a key that this process makes.
"""

import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from common import logs
from common.settings import read_settings
from services.worker import front
from services.worker.settings import WorkerSettings

SLOTS = 8
"""Sequences at once, when MAX_NUM_SEQS does not say: each takes a share of every step, and of the KV memory."""
KV_BYTES = 2
"""Of an element of the KV cache: f16."""
OPENAIS = {"temp": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
"""How requests that say nothing are sampled, unless the model's authors say. llama.cpp's own defaults are others than
every other engine's: two engines of one name must not write differently."""


def find_file(model: str) -> Path:
    """The GGUF file that MODEL names, itself or as the only one of a folder. Raises ValueError."""
    path = Path(model)
    if path.is_file():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise ValueError(f"MODEL={model}: ENGINE=llamacpp needs a GGUF file or a folder with one; found {len(found)}")
    return found[0]


def sampling(folder: Path) -> dict[str, float]:
    """What the model's authors sample with (generation_config.json beside it), else what OpenAI does."""
    try:
        said = json.loads((folder / "generation_config.json").read_text())
    except (OSError, ValueError):
        said = {}
    named = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
    return OPENAIS | {ours: said[theirs] for ours, theirs in named.items() if isinstance(said.get(theirs), int | float)}


def kv_bytes_per_token(file: Path) -> int:
    """Of keys and values of all layers, by the file's own account."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    said = {name.split(".", 1)[1]: field.contents() for name, field in fields.items() if name.count(".") > 0}
    heads = int(said["attention.head_count"])
    width = int(said.get("attention.key_length", int(said["embedding_length"]) // heads))
    return 2 * KV_BYTES * int(said["block_count"]) * int(said.get("attention.head_count_kv", heads)) * width


def parameters(settings: WorkerSettings) -> Any:
    """What the server is started with. Raises ValueError."""
    import xllamacpp

    file = find_file(settings.model)
    made = xllamacpp.CommonParams()
    made.model.path, made.model_alias = str(file), {settings.served_name}
    made.hostnames, made.port, made.api_keys = ["127.0.0.1"], 0, [secrets.token_urlsafe(24)]
    made.n_parallel, made.kv_unified = settings.max_num_seqs or SLOTS, True
    tokens = settings.kv_cache_gib * 2**30 // kv_bytes_per_token(file)
    made.n_ctx = tokens // 256 * 256
    made.kv_unified_per_slot = settings.max_model_len
    made.cache_ram_mib = int(settings.kv_host_gib * 1024)
    threads = len(settings.cpu_threads_bind.split(",")) if settings.cpu_threads_bind else len(os.sched_getaffinity(0))
    made.cpuparams.n_threads = made.cpuparams_batch.n_threads = threads
    made.endpoint_metrics, made.endpoint_slots, made.endpoint_props, made.ui = True, False, False, False
    made.offline, made.verbosity = True, 2  # its errors and warnings: its lines quote no prompt then
    for name, value in sampling(file.parent).items():
        setattr(made.sampling, name, value)
    return made


def main() -> None:
    """Both, until a signal ends them."""
    settings = read_settings(WorkerSettings, "worker")
    logs.configure("worker", settings.log_level)
    try:
        import xllamacpp

        told = parameters(settings)
        server = xllamacpp.Server(told)
    except ImportError:
        sys.exit("worker: ENGINE=llamacpp needs the package xllamacpp in the worker's environment")
    except (ValueError, RuntimeError, KeyError) as error:
        sys.exit(f"worker: {error}")
    front.serve(settings, server.listening_address, told.api_keys[0])


if __name__ == "__main__":
    main()
