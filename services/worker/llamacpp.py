"""llama.cpp and the front before it, in one process: `python -m services.worker.llamacpp`.

xllamacpp is llama.cpp's own C++ server in a wheel: continuous batching, its own threads, no word of Python in a
request. It listens on a port of the loopback that is told to nobody, behind a key that this process makes.
"""

import json
import os
import re
import secrets
import sys
from pathlib import Path
from typing import Any

from common import logs
from common.settings import read_settings
from services.worker import dialects, front
from services.worker.settings import WorkerSettings

LEAST_TOKENS = 4096
"""A sequence gets at least so many, or what the model can, before there is a second one at once."""
KV_BYTES = 2
"""Of an element of the KV cache: f16."""
STEP_TOKENS = 256
"""Of prompts in one step: meanwhile all others stand still, and it tells no numbers."""
OPENAIS = {"temp": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "penalty_repeat": 1.0}
"""How requests that say nothing are sampled, unless the model's authors say. llama.cpp's own defaults are others than
every other engine's."""
_LATER_PART = re.compile(r"-(?!0*1-of-)\d+-of-\d+\.gguf$")
_CORES = re.compile(r"(\d+)(?:-(\d+))?")


def find_file(model: str) -> Path:
    """The GGUF file that MODEL names, itself or as the only one of a folder, or its first part. Raises ValueError."""
    path = Path(model)
    if path.is_file():
        return path
    found = [file for file in sorted(path.glob("*.gguf")) if not _LATER_PART.search(file.name)]
    if len(found) != 1:
        raise ValueError(f"MODEL={model}: ENGINE=llamacpp needs a GGUF file or a folder with one; found {len(found)}")
    return found[0]


def sampling(folder: Path) -> dict[str, float]:
    """What the model's authors sample with (generation_config.json beside it), else what OpenAI does."""
    try:
        said = json.loads((folder / "generation_config.json").read_text())
    except (OSError, ValueError):
        said = {}
    named = {name: name for name in OPENAIS} | {"temp": "temperature", "penalty_repeat": "repetition_penalty"}
    return OPENAIS | {ours: said[theirs] for ours, theirs in named.items() if isinstance(said.get(theirs), int | float)}


def shape(file: Path) -> tuple[int, int]:
    """Bytes of keys and values a token, and the longest sequence, by the file's own account. Raises ValueError."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(file).fields
        said = {name.split(".", 1)[1]: field.contents() for name, field in fields.items() if "." in name}
        layers, heads = int(said["block_count"]), said.get("attention.head_count_kv", said["attention.head_count"])
        whole = said["attention.head_count"]
        widest = max(whole) if isinstance(whole, list) else whole
        width = said.get("attention.key_length") or said["embedding_length"] // widest
        all_heads = sum(heads) if isinstance(heads, list) else heads * layers  # a list: of each layer
        return 2 * KV_BYTES * int(all_heads) * int(width), int(said["context_length"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{file.name}: its metadata do not say how large its KV cache is ({error})") from error


def split(tokens: int, longest: int, slots: int, asked: int) -> tuple[int, int]:
    """(sequences at once, tokens of each) for KV memory of so many tokens.

    No sequence shares another's: when a pool runs full llama.cpp fails all of them. `slots`: at most; `asked`: tokens
    of each, 0: what there is.
    """
    longest = min(asked or longest, longest, tokens)
    many = max(1, min(slots, tokens // (longest if asked else min(longest, LEAST_TOKENS))))
    return many, min(longest, tokens // many)


def threads(bind: str) -> int:
    """Of CPU_THREADS_BIND: cores like 0-3,6, of ranks between bars; the cores there are when it names none."""
    found = sum(int(last or first) - int(first) + 1 for first, last in _CORES.findall(bind))
    return found or len(os.sched_getaffinity(0))


def parameters(settings: WorkerSettings) -> Any:
    """What the server is started with. Raises ValueError."""
    import xllamacpp

    file = find_file(settings.model)
    made = xllamacpp.CommonParams()
    made.model.path, made.model_alias = str(file), {settings.served_name}
    made.hostnames, made.port, made.api_keys = ["127.0.0.1"], 0, [secrets.token_urlsafe(24)]
    bytes_per_token, longest = shape(file)
    tokens = settings.kv_cache_gib * 2**30 // max(1, bytes_per_token)
    slots = settings.max_num_seqs or dialects.find("llamacpp").slots
    made.n_parallel, each = split(tokens, longest, slots, settings.max_model_len)
    made.n_ctx, made.kv_unified = made.n_parallel * each, False
    made.n_batch = made.n_ubatch = STEP_TOKENS
    made.cache_ram_mib = int(settings.kv_host_gib * 1024)
    made.cpuparams.n_threads = made.cpuparams_batch.n_threads = threads(settings.cpu_threads_bind)
    made.endpoint_metrics, made.endpoint_slots, made.endpoint_props, made.ui = True, False, False, False
    made.offline, made.verbosity = True, 1  # errors: further lines quote what was asked
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
