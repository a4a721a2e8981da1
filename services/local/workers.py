"""The workers of `make up`: one program each. A name is used for one worker only, so that an old and a new one of the
same model can run side by side while one takes over from the other (`apply.py`).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from common.files import write_whole
from services.local import places
from services.local.catalog import Entry
from services.local.plan import Dials


class Worker(msgspec.Struct, frozen=True):
    """One worker, as it was started."""

    name: str
    """Of its program: worker-1, worker-chat-2."""
    model: str
    """Its entry's."""
    port: int
    env: dict[str, str]
    """What its entry and its place make it."""
    always: bool


class Wanted(NamedTuple):
    """A worker that there is to be."""

    prefix: str
    entry: Entry
    env: dict[str, str]


def wanted(dials: Dials) -> list[Wanted]:
    """What models.yaml, or MODEL and WORKERS, ask for. Raises UserError when the GPUs are too few."""
    found, dealt = [], places.deal(dials.catalog, dials.gpus)
    cores = cpu_slices(dials.always) if dials.models_file is None and not dials.gpus else []
    for entry in dials.catalog.models:
        for number, place in enumerate(dealt[entry.slug]):
            env = places.environment(entry, dials.models, place, dials.catalog.awake)
            if cores and cores[number]:
                env["CPU_THREADS_BIND"] = cores[number]
            found.append(Wanted("worker" if dials.models_file is None else f"worker-{entry.slug}", entry, env))
    return found


def cpu_slices(workers: int) -> list[str]:
    """VLLM_CPU_OMP_THREADS_BIND for each of several workers: the cores dealt out. Empty: the worker decides."""
    cores = sorted(os.sched_getaffinity(0))
    if workers == 1 or len(cores) < workers:
        return [""] * workers
    return [",".join(map(str, cores[i::workers])) for i in range(workers)]


class Change(NamedTuple):
    """From the workers there are to those that are wanted."""

    kept: list[Worker]
    new: list[Worker]
    old: list[Worker]


def change(running: list[Worker], asked: list[Wanted], ports: Iterator[int], *, anew: bool = False) -> Change:
    """What is to start and to stop; what is as it was stays, unless all are wanted `anew`."""
    left, kept, new = list(running), [], []
    numbers: dict[str, int] = {}
    for worker in running:
        prefix, _, number = worker.name.rpartition("-")
        numbers[prefix] = max(numbers.get(prefix, 0), int(number))
    for prefix, entry, env in asked:
        same = next((w for w in left if w.env == env and w.name.rpartition("-")[0] == prefix), None)
        if same is not None and not anew:
            left.remove(same)
            kept.append(same)
            continue
        numbers[prefix] = numbers.get(prefix, 0) + 1
        new.append(Worker(f"{prefix}-{numbers[prefix]}", entry.name, next(ports), env, entry.start == "always"))
    return Change(kept, new, left)


def written(dials: Dials) -> Path:
    """Where a running stack says which workers it has."""
    return dials.run_dir / "workers.json"


def write(dials: Dials, workers: list[Worker]) -> None:
    """Say which there are, to `apply.py` and to Prometheus."""
    targets = [{"targets": [f"127.0.0.1:{worker.port}" for worker in workers]}]
    for path, data in (
        (written(dials), msgspec.json.encode(workers)),
        (dials.run_dir / "targets.json", msgspec.json.encode(targets)),
    ):
        write_whole([data], path)


def read(dials: Dials) -> list[Worker]:
    """Those of a running stack. Raises OSError where none was started."""
    return msgspec.json.decode(written(dials).read_bytes(), type=list[Worker])
