"""Whether this machine can hold what it is to serve; said before anything is started or downloaded."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from common import checkpoint, gpus
from common.sizing import fit
from common.sizing.cards import CannotSay
from common.sizing.memory import Serving
from services.local import model as bundled
from services.local import places
from services.local.catalog import BUNDLED, Entry
from services.local.errors import UserError
from services.local.plan import Dials

WORKER_NEEDS_BYTES = 3_200_000_000
"""Resident memory of one CPU worker beside weights and KV blocks, with room to breathe (docs/log.md)."""
LLAMACPP_NEEDS_BYTES = 600_000_000
"""The same of llama.cpp and the front before it."""
STATE_NEEDS_BYTES = 500_000_000


def available_bytes() -> int:
    """Memory that programs can have without swapping."""
    with open("/proc/meminfo") as meminfo:
        return next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))


def on_a_cpu(entry: Entry, models: Path) -> int:
    """Memory of one CPU worker of an entry. Raises UserError for a dial that is no number."""
    if entry.elsewhere:
        return 0
    try:
        kv_bytes = (entry.kv_cache_gib or int(os.environ.get("KV_CACHE_GIB") or 1)) << 30
        host_bytes = int(float(os.environ.get("KV_HOST_GIB") or 0.5) * 2**30)
    except ValueError as error:
        raise UserError(f"KV_CACHE_GIB is a whole number of GiB, KV_HOST_GIB a number: {error}.") from error
    if (os.environ.get("KV_TIER") or "redis") == "redis":
        kv_bytes += host_bytes
    if entry.engine == "llamacpp":
        return LLAMACPP_NEEDS_BYTES + kv_bytes + _gguf_bytes(entry.model(models))
    return WORKER_NEEDS_BYTES + kv_bytes + checkpoint.weights_bytes(entry.model(models), entry.revision)


def _gguf_bytes(model: str) -> int:
    """Of a GGUF file, or of those in a folder."""
    path = Path(model)
    parts = path.parent.glob(path.name.replace("-00001-of-", "-*-of-")) if path.is_file() else path.glob("*.gguf")
    return sum(file.stat().st_size for file in parts)


def together(dials: Dials) -> int:
    """Memory of all CPU workers that are awake at once."""
    needs = {entry.slug: on_a_cpu(entry, dials.models) for entry in dials.catalog.models}
    always = sum(needs[e.slug] * e.replicas for e in dials.catalog.models if e.start == "always")
    return always + largest(
        (needs[e.slug] for e in dials.catalog.models if e.start == "on_demand" for _ in range(e.replicas)),
        dials.catalog.awake,
    )


def largest(sizes: Iterable[int], count: int) -> int:
    """The sum of the largest few."""
    return sum(sorted(sizes, reverse=True)[:count])


def check_gpus(dials: Dials) -> None:
    """Raise UserError when the driver is too old or a model cannot fit; models and cards it does not know pass."""
    try:
        found = gpus.look()
        fit.check_driver(found)
        dealt = places.deal(dials.catalog, dials.gpus)
        for entry in dials.catalog.models:
            for place in dealt[entry.slug]:
                if entry.engine == "vllm" and place.gpus and not entry.arguments:
                    how = Serving(len(place.gpus), place.share, entry.max_tokens, entry.sequences, 4 * entry.adapters)
                    fit.check_model(found, place.gpus, entry.model(dials.models), entry.revision, how)
    except (gpus.GpusAway, CannotSay) as error:
        raise UserError(f"{error}") from error


def check_room(dials: Dials) -> None:
    """Raise UserError when memory or disk cannot hold the stack."""
    if not dials.gpus:
        available, needed = available_bytes(), together(dials)
        if available < needed:
            dial = f"WORKERS={dials.always}" if dials.models_file is None else str(dials.models_file)
            raise UserError(
                f"{dial} needs about {needed / 1e9:.1f} GB of free memory; this machine has {available / 1e9:.1f} GB. "
                "Stop other programs, or lower WORKERS or KV_CACHE_GIB, or let models start on_demand."
            )
    else:
        check_gpus(dials)
    free = shutil.disk_usage(dials.state).free
    unpacked = not any(e.source == BUNDLED for e in dials.catalog.models) or checkpoint.weights_bytes(
        str(dials.models / bundled.NAME)
    )
    wanted = STATE_NEEDS_BYTES + (0 if unpacked else bundled.NEEDS_BYTES)
    if free < wanted:
        raise UserError(f"{dials.state} has {free / 1e9:.1f} GB of free disk; {wanted / 1e9:.1f} GB are needed. "
                        "Make room, or choose another place with STATE_DIR.")
