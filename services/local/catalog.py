"""models.yaml: what this stack serves, one entry a model. Read, checked, and made into the environments of workers.

`make up` and compose get the same entries (`programs.py`, `compose.py`). Without the file there is one entry, made
of MODEL and WORKERS. Its JSON schema for editors is made from the classes here: `python -m services.local.catalog`.
"""

import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import yaml
from msgspec import Meta

from services.local import model as bundled
from services.local.errors import UserError

BUNDLED = "bundled"
SCHEMA = Path(__file__).parent / "models.schema.json"
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_UNKNOWN = re.compile(r"unknown field `(.+)`")
_FIELD = re.compile(r"\.(\w+)|\[(\d+)\]")
MOST_SHARE = 0.98
"""Of a GPU's memory that all engines on it may take together."""
USUAL_SHARE = 0.90
"""What engines on a GPU take together when nobody says."""

Text = Annotated[str, Meta(min_length=1)]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One model."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,95}$", description="what clients ask for")]
    source: Annotated[Text, Meta(description="bundled, a checkpoint folder, or a hub name like org/model@revision")] = (
        BUNDLED
    )
    task: Annotated[Literal["chat", "embedding", "rerank"], Meta(description="what it is for")] = "chat"
    engine: Annotated[Literal["vllm", "attached"], Meta(description="attached: a server that runs at `url`")] = "vllm"
    url: Annotated[str, Meta(pattern=r"^(http://[^/]+)?/?$", description="engine: attached: where; no path")] = ""
    start: Annotated[Literal["always", "on_demand"], Meta(
        description="on_demand: started by the first request for it; takes turns with others of its kind"
    )] = "always"
    replicas: Annotated[int, Meta(ge=1, le=16, description="workers that serve it")] = 1
    gpus: Annotated[int, Meta(ge=1, le=8, description="GPUs a worker, over which the weights are split")] = 1
    gpu_memory: Annotated[float, Meta(gt=0, le=0.98, description="share of its GPUs' memory; else dealt")] | None = (
        None
    )
    kv_cache_gib: Annotated[int, Meta(ge=1, description="CPU: memory for KV blocks")] | None = None
    max_tokens: Annotated[int, Meta(ge=0, description="longest sequence; 0: the model's, or what fits")] = 0
    sequences: Annotated[int, Meta(ge=0, description="requests at once; 0: what suits the accelerator")] = 0
    adapters: Annotated[bool, Meta(description="whether it can be fine-tuned and serve tuned models")] = True
    arguments: Annotated[str, Meta(description="further vLLM flags, as on a command line")] = ""

    def model(self, models: Path) -> str:
        """The checkpoint folder or the hub name. `models`: where the bundled one is unpacked."""
        return str(models / bundled.NAME) if self.source == BUNDLED else self.source.partition("@")[0]

    @property
    def revision(self) -> str:
        """A hub model's; empty: its main branch."""
        return "" if Path(self.source).is_absolute() else self.source.partition("@")[2]

    @property
    def slug(self) -> str:
        """Its name as a part of a program's."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:40]
        return plain if plain == self.name else f"{plain}-{sha256(self.name.encode()).hexdigest()[:4]}"


class Catalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file."""

    models: Annotated[list[Entry], Meta(min_length=1, max_length=64)]
    awake: Annotated[int, Meta(ge=1, le=64, description="on_demand models of one place that are awake at once")] = 1

    @property
    def trained(self) -> Entry | None:
        """The model that fine-tuning jobs start from."""
        return next((e for e in self.models if e.task == "chat" and e.adapters and e.engine == "vllm"), None)


def read(path: Path) -> Catalog:
    """The file's entries, folders made absolute. Raises UserError with file, line and field."""
    try:
        text = path.read_text()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: no YAML: {getattr(error, 'problem', error)}") from error
    try:
        found = msgspec.convert(document, Catalog)
    except msgspec.ValidationError as error:
        said, _, field = str(error).partition(" - at `$")
        field = field.rstrip("`")
        if unknown := _UNKNOWN.search(said):
            field, said = f"{field}.{unknown[1]}", "there is no such field"
        raise UserError(f"{path}, line {_line(root, field)}: {field.lstrip('.') or 'the file'}: {said}") from error
    for field, problem in _problems(found, path.parent):
        raise UserError(f"{path}, line {_line(root, field)}: {field.lstrip('.')}: {problem}")
    return msgspec.structs.replace(found, models=[_absolute(entry, path.parent) for entry in found.models])


def _problems(found: Catalog, base: Path) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it) of what the classes cannot say."""
    names: set[str] = set()
    for number, entry in enumerate(found.models):
        at = f".models[{number}]"
        if entry.name in names:
            yield f"{at}.name", f"there is another model called {entry.name!r}"
        names.add(entry.name)
        if entry.engine == "attached":
            if not entry.url:
                yield at, "engine: attached needs the url of the server"
            if entry.start == "on_demand":
                yield f"{at}.start", "a server that runs elsewhere cannot be started on demand"
            continue
        if entry.url:
            yield f"{at}.url", "is for engine: attached"
        if entry.source == BUNDLED:
            if entry.task != "chat":
                yield f"{at}.task", "the bundled model is for chat"
        elif not _is_folder(entry.source):
            if not _HUB.fullmatch(entry.source):
                yield f"{at}.source", f"{entry.source!r} is neither bundled, a folder, nor like org/model@revision"
        elif not (base / Path(entry.source).expanduser() / "config.json").is_file():
            yield f"{at}.source", f"there is no checkpoint (no config.json) in {entry.source}"
        try:
            shlex.split(entry.arguments)
        except ValueError as error:
            yield f"{at}.arguments", str(error)


def _is_folder(source: str) -> bool:
    return source.startswith((".", "/", "~"))


def _absolute(entry: Entry, base: Path) -> Entry:
    if entry.engine == "attached" or not _is_folder(entry.source):
        return entry
    return msgspec.structs.replace(entry, source=str((base / Path(entry.source).expanduser()).resolve()))


def _line(root: yaml.Node | None, field: str) -> int:
    """The line of a field like `.models[1].name`, or of the innermost part of it that is there."""
    node = root
    line = node.start_mark.line + 1 if node is not None else 1
    for name, number in _FIELD.findall(field):
        if isinstance(node, yaml.MappingNode):
            pairs = [(key, value) for key, value in node.value if key.value == name]
            if not pairs:
                break
            line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
        elif isinstance(node, yaml.SequenceNode) and number and int(number) < len(node.value):
            node = node.value[int(number)]
            line = node.start_mark.line + 1
        else:
            break
    return line


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
    attached = entry.engine == "attached"
    found: dict[str, Any] = {
        "ENGINE": "attached" if attached else "", "ENGINE_URL": entry.url,
        "MODEL": "" if attached else entry.model(models), "MODEL_REVISION": entry.revision,
        "SERVED_MODEL_NAME": entry.name, "MAX_MODEL_LEN": entry.max_tokens or "", "MAX_NUM_SEQS": entry.sequences or "",
        "MAX_LORAS": "" if entry.adapters and entry.task == "chat" else 0, "ENGINE_ARGS": entry.arguments,
    }
    if place.gpus:
        found |= {"GPU_MEMORY_UTILIZATION": place.share, "TENSOR_PARALLEL_SIZE": len(place.gpus)} | visible(place.gpus)
    elif entry.kv_cache_gib is not None:
        found["KV_CACHE_GIB"] = entry.kv_cache_gib
    if entry.start == "on_demand":
        found |= {"ON_DEMAND": "true", "AWAKE_AT_ONCE": awake}
    if (entry.start == "on_demand" or place.gpus) and not attached:
        found["PLACE"] = place.name
    # An empty revision is said, too: else that of another model would be taken over from the environment.
    return {name: str(value) for name, value in found.items() if value != "" or name == "MODEL_REVISION"}


def visible(gpus: Sequence[int]) -> dict[str, str]:
    """What shows a program these GPUs alone, numbered as the driver does: CUDA's own order is the fastest first."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def deal(catalog: Catalog, gpus: int) -> dict[str, list[Place]]:
    """Where each entry's replicas run, by name; without GPUs all on the CPU. Raises UserError when there are too few.

    The emptiest GPUs. `on_demand` models of one GPU take turns: they need `awake` times the largest share.
    """
    dealt: dict[str, list[Place]] = {entry.name: [Place()] * entry.replicas for entry in catalog.models}
    ours = [entry for entry in catalog.models if entry.engine == "vllm"]
    if not gpus or not ours:
        return dealt
    usual = _usual_share(catalog, ours, gpus)
    free = [MOST_SHARE + 1e-9] * gpus
    turns: Turns = {}
    for entry in sorted(ours, key=lambda entry: (entry.start != "always", -entry.gpus)):  # the sort is stable
        share, dealt[entry.name] = entry.gpu_memory or usual, []
        for _ in range(entry.replicas):
            mine = {place.gpus for place in dealt[entry.name]}
            fit, more = _place(entry, share, free, turns, catalog.awake, mine)
            for gpu in fit:
                free[gpu] -= more
            if entry.start == "on_demand":
                turns.setdefault(fit, []).append(share)
            dealt[entry.name].append(Place(fit, share))
    whole = _hang_together(place.gpus for entry in ours for place in dealt[entry.name])
    for entry in ours:
        dealt[entry.name] = [place._replace(shared=whole[place.gpus[0]]) for place in dealt[entry.name]]
    return dealt


Turns = dict[tuple[int, ...], list[float]]
"""Shares of the on_demand workers that take turns, by their GPUs."""


def _place(
    entry: Entry, share: float, free: Sequence[float], turns: Turns, awake: int, mine: Collection[tuple[int, ...]]
) -> tuple[tuple[int, ...], float]:
    """(GPUs for a worker, what it takes of each): the emptiest; else one's turn at GPUs that others share.

    `mine`: where replicas of it are, with whom it takes turns only where there is no other place.
    """
    on_demand = entry.start == "on_demand"
    needed = share * awake if on_demand else share
    able = [gpu for gpu, left in enumerate(free) if left >= needed]
    found = tuple(sorted(sorted(able, key=lambda gpu: (-free[gpu], gpu))[: entry.gpus]))  # the emptiest: replicas apart
    if len(found) == entry.gpus:
        return found, needed
    if on_demand:
        for fit, shares in sorted(turns.items(), key=lambda item: (item[0][: entry.gpus] in mine, len(item[1]))):
            part, more = fit[: entry.gpus], max(0.0, share - max(shares)) * awake
            if len(part) == entry.gpus and all(free[gpu] >= more for gpu in part):
                return part, more
    left = ", ".join(f"GPU {gpu} has {left:.0%} left" for gpu, left in enumerate(free))
    raise UserError(f"models.yaml: {entry.name} needs {share:.0%} of {entry.gpus} GPU(s), and {left}. "
                    "Lower gpu_memory or replicas, or let models start on_demand.")


def _hang_together(sets: Iterable[tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """Of each GPU all those that it hangs together with: a worker on 0 and 1 shares memory with one on 0, one on 1."""
    whole: dict[int, tuple[int, ...]] = {}
    for gpus in sets:
        joined = tuple(sorted({other for gpu in gpus for other in whole.get(gpu, (gpu,))}))
        whole |= dict.fromkeys(joined, joined)
    return whole


def _usual_share(catalog: Catalog, ours: Sequence[Entry], gpus: int) -> float:
    """What an entry without `gpu_memory` takes: USUAL_SHARE, divided by the engines that a GPU must hold at once."""
    always = sum(entry.replicas * entry.gpus for entry in ours if entry.start == "always")
    turning = catalog.awake if any(entry.start == "on_demand" for entry in ours) else 0
    return round(USUAL_SHARE / max(1, -(-(always + turning) // gpus)), 3)


def schema() -> str:
    """The file's JSON schema."""
    made = msgspec.json.schema(Catalog)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "OwnGPT's models.yaml"}
    return json.dumps(head | made, indent=1) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema())
