"""Where each worker runs: the GPUs dealt out, and what it is told of its entry and its place."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from services.local.catalog import Catalog, Entry
from services.local.errors import UserError

MOST_SHARE = 0.98
"""Of a GPU's memory that all engines on it may take together."""
USUAL_SHARE = 0.90
"""What engines on a GPU take together when nobody says."""
ASLEEP_SHARE = 0.05
"""Left for each engine that sleeps when nobody says shares (`memory.ASLEEP_BYTES` of a 24 GB card)."""


class Place(NamedTuple):
    """Where one worker runs: the GPUs it may see, and its share of their memory. On a CPU: none."""

    gpus: tuple[int, ...] = ()
    share: float = 0.0
    shared: tuple[int, ...] = ()
    """Its GPUs and those that hang together with them, by a worker that runs on several."""

    @property
    def name(self) -> str:
        """Whose on_demand models take turns, and which a training takes as a whole."""
        return "gpu-" + "-".join(map(str, self.shared)) if self.gpus else "cpu"


def environment(entry: Entry, models: Path, place: Place, awake: int) -> dict[str, str]:
    """What the worker of an entry is told beside what all are told; only what the entry says."""
    found: dict[str, Any] = {
        "ENGINE": entry.engine, "ENGINE_URL": entry.url, "ENGINE_KEY_FILE": entry.key_file,
        "MODEL": entry.model(models), "MODEL_REVISION": entry.revision,
        "SERVED_MODEL_NAME": entry.name, "MAX_MODEL_LEN": entry.max_tokens or "", "MAX_NUM_SEQS": entry.sequences or "",
        "MAX_LORAS": "" if entry.adapters and entry.task == "chat" else 0, "ENGINE_ARGS": entry.arguments,
    }
    if entry.engine == "vllm":
        del found["ENGINE"]
    if place.gpus:
        found |= {"GPU_MEMORY_UTILIZATION": place.share, "TENSOR_PARALLEL_SIZE": len(place.gpus)} | visible(place.gpus)
    elif entry.kv_cache_gib is not None:
        found["KV_CACHE_GIB"] = entry.kv_cache_gib
    if entry.start == "on_demand":
        found |= {"ON_DEMAND": "true", "AWAKE_AT_ONCE": awake}
    if entry.start == "on_demand" or place.gpus:
        found["PLACE"] = place.name
    # An empty revision is said, too: else that of another model would be taken over from the environment.
    return {name: str(value) for name, value in found.items() if value != "" or name == "MODEL_REVISION"}


def visible(gpus: Sequence[int]) -> dict[str, str]:
    """What shows a program these GPUs alone, numbered as the driver does: CUDA's own order is the fastest first."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def deal(catalog: Catalog, gpus: Sequence[int]) -> dict[str, list[Place]]:
    """Where each entry's replicas run, by its slug; without GPUs all on the CPU. Raises UserError for too few.

    The emptiest GPUs. `on_demand` models of one GPU take turns: they need the `awake` largest shares.
    """
    dealt: dict[str, list[Place]] = {entry.slug: [Place()] * entry.replicas for entry in catalog.models}
    ours = [entry for entry in catalog.models if entry.engine == "vllm"]
    if not gpus or not ours:
        return dealt
    usual = _usual_share(ours, catalog.awake, len(gpus))
    cards = {gpu: _Card() for gpu in gpus}
    for entry in sorted(ours, key=lambda entry: (entry.start != "always", -entry.gpus)):  # the sort is stable
        share, dealt[entry.slug] = entry.gpu_memory or usual, []
        for _ in range(entry.replicas):
            mine = {gpu for place in dealt[entry.slug] for gpu in place.gpus}
            fit = _place(entry, share, cards, catalog.awake, mine)
            for gpu in fit:
                cards[gpu].take(entry, share)
            dealt[entry.slug].append(Place(fit, share))
    whole = _hang_together(place.gpus for entry in ours for place in dealt[entry.slug])
    for entry in ours:
        dealt[entry.slug] = [place._replace(shared=whole[place.gpus[0]]) for place in dealt[entry.slug]]
    return dealt


class _Card:
    """What is promised of one GPU's memory."""

    def __init__(self) -> None:
        self.always = 0.0
        self.turns: list[float] = []
        """The shares of those that take turns."""

    def take(self, entry: Entry, share: float) -> None:
        if entry.start == "always":
            self.always += share
        else:
            self.turns.append(share)

    def needed(self, awake: int, more: Sequence[float] = ()) -> float:
        """The share that is in use at most, with `more` that take turns."""
        return self.always + sum(sorted([*self.turns, *more], reverse=True)[:awake])


def _place(
    entry: Entry, share: float, cards: Mapping[int, _Card], awake: int, mine: Collection[int]
) -> tuple[int, ...]:
    """GPUs for a worker: the emptiest; for one that takes turns those where the fewest do.

    `mine`: where replicas of it are.
    """

    def needed(gpu: int) -> float:
        return cards[gpu].needed(awake) + share if entry.start == "always" else cards[gpu].needed(awake, [share])

    able = [gpu for gpu in cards if needed(gpu) <= MOST_SHARE + 1e-9]
    able.sort(key=lambda gpu: (gpu in mine, len(cards[gpu].turns), cards[gpu].always, gpu))
    if len(able) < entry.gpus:
        left = ", ".join(f"GPU {gpu} would hold {needed(gpu):.0%}" for gpu in cards)
        raise UserError(f"models.yaml: {entry.name} needs {share:.0%} of {entry.gpus} GPU(s), and with it {left}; "
                        f"{MOST_SHARE:.0%} are the most. Lower gpu_memory or replicas, or let models start on_demand.")
    return tuple(sorted(able[: entry.gpus]))


def _hang_together(sets: Iterable[tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """Of each GPU all those that it hangs together with: a worker on 0 and 1 shares memory with one on 0, one on 1."""
    whole: dict[int, tuple[int, ...]] = {}
    for gpus in sets:
        joined = tuple(sorted({other for gpu in gpus for other in whole.get(gpu, (gpu,))}))
        whole |= dict.fromkeys(joined, joined)
    return whole


def _usual_share(ours: Sequence[Entry], awake: int, gpus: int) -> float:
    """What an entry without `gpu_memory` takes: USUAL_SHARE, or what those that sleep leave, for all that one GPU holds
    at once.
    """
    always = sum(entry.replicas * entry.gpus for entry in ours if entry.start == "always")
    turning = [entry for entry in ours if entry.start == "on_demand"]
    count = sum(entry.replicas for entry in turning)
    at_once = min(count, awake)
    emptiest = gpus - always % gpus  # that hold always // gpus engines; the others one more
    beside = always // gpus if max((entry.gpus for entry in turning), default=0) <= emptiest else -(-always // gpus)
    engines = max(1, -(-always // gpus), beside + at_once)
    return round(min(USUAL_SHARE, MOST_SHARE - ASLEEP_SHARE * (count - at_once)) / engines, 3)
