"""What a trace of PyTorch's profiler says of an engine's steps: where their time went, by class, by operator, by layer.

The trace is Chrome's format (https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU): complete
events with a begin and a length in microseconds, nested by time on their thread. vLLM puts an annotation around each
run of the model (`execute_context…`). An event's own time is its length without that of the events inside it.

Between the first run of the model and the last event everything is one of: an operator, by class; Python between the
operators of a run; the engine's loop outside the model (scheduling, sampling, answering). On a GPU the classes are of
kernels, and "between" is time in which none ran.
"""

import gzip
import itertools
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

STEP = "execute_context"
LOOP = "engine loop outside the model"
BETWEEN = "Python between"
OTHER = "other"
CLASSES: Sequence[tuple[str, re.Pattern[str]]] = [
    (name, re.compile(pattern, re.I))
    for name, pattern in (
        ("attention", r"attention|attn|flash|fmha|reshape_and_cache|kv_cache|scheduler_metadata|sdpa|softmax"),
        (
            "sampling",
            r"argmax|sort|topk|top_k|top_p|multinomial|exponential|sample|logprob|penalt|unique|lt$|cumsum|gumbel",
        ),
        (
            "GEMM",
            r"onednn.*mm|gemm|matmul|::mm|addmm|::bmm|::linear|cutlass|marlin|machete|wgmma|nvjet|cublas|scaled_mm|gemv|_mm_",
        ),
        (
            "norm and elementwise",
            r"norm|silu|gelu|swiglu|act_and_mul|rotary|rope|quant|::add|::mul|::sub|::div|::pow|::mean|::rsqrt"
            r"|::sum|::eq|::ne$|::where|::max|::neg|::exp|::sigmoid|elementwise|triton_|lora|sgmv|bgmv|::sin|::cos|is_nonzero",
        ),
        (
            "memory",
            r"empty|copy|fill|zero|view|slice|split|chunk|narrow|select|index|reshape|strided|squeeze|expand|permute|transpose"
            r"|::to$|clone|cat$|stack|detach|alias|embedding|gather|scatter|arange|resize|resolve|flatten|item|local_scalar|lift|memset"
            r"|memcpy|scalar_tensor|slot_mapping|pin_memory|repeat|full|ones|::t$|unbind|contiguous|convert|::set_",
        ),
    )
]
"""The first that fits counts."""
TOP = 10
LAYER_MARK = re.compile(r"kv_cache_update|reshape_and_cache", re.I)
"""Once in every decoder layer."""


class Operator(msgspec.Struct, frozen=True):
    """One operator with one set of shapes."""

    name: str
    shapes: str
    share: float
    """Of the whole time."""
    calls: int
    each_us: float


class Summary(msgspec.Struct, frozen=True):
    """Where the time went."""

    steps: int
    whole_ms: float
    step_ms: float
    """The median step, from its beginning to that of the next."""
    device: str
    """What the classes are of: CPU operators, GPU kernels."""
    shares: dict[str, float]
    """By class, of the whole; they add up to one."""
    top: list[Operator]
    layers: int
    layer_us: float
    """One decoder layer in one step, its Python included."""

    @property
    def explained(self) -> float:
        """The share that belongs to a class."""
        return 1.0 - self.shares.get(OTHER, 0.0)


class Unreadable(Exception):
    """The file is no trace of an engine's steps."""


def read(path: Path) -> Summary:
    """The summary of a trace, .json or .json.gz. Raises Unreadable."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        found = [event for event in json.loads(data)["traceEvents"] if event.get("ph") == "X"]
        events = [event for event in found if {"name", "tid", "ts", "dur"} <= event.keys()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zlib.error) as error:
        raise Unreadable(f"{path}: no trace of PyTorch's profiler ({type(error).__name__}: {error})") from error
    return summarise(events, str(path))


def summarise(events: Sequence[Mapping[str, Any]], said: str = "the trace") -> Summary:
    """The summary of complete events. Raises Unreadable when there is no step among them."""
    steps = sorted(
        (e for e in events if str(e["name"]).startswith(STEP) and e.get("cat") == "user_annotation"), key=_begin
    )
    if not steps:
        raise Unreadable(f"{said}: there is no engine step in it (no {STEP}…)")
    thread = steps[0]["tid"]
    host = [e for e in events if e["tid"] == thread and e.get("cat") in ("cpu_op", "user_annotation")]
    own = own_times(host)
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    began, ended = _begin(steps[0]), max(map(_end, [*host, *kernels]))
    whole = ended - began
    inside = sum(_end(step) - _begin(step) for step in steps)
    spent: dict[str, float] = defaultdict(float)
    counted = (
        [(e, float(e["dur"])) for e in kernels]
        if kernels
        else [(e, time) for e, time in own if _begin(e) >= began and not str(e["name"]).startswith(STEP)]
    )
    for event, time in counted:
        spent[class_of(str(event["name"]))] += time
    if kernels:
        spent[BETWEEN] = max(0.0, whole - sum(spent.values()))
    else:
        spent[BETWEEN] = sum(time for e, time in own if str(e["name"]).startswith(STEP))
        spent[LOOP] = max(0.0, whole - sum(spent.values()))
    total = sum(spent.values())
    begins = [_begin(step) for step in steps]
    gaps = sorted(after - before for before, after in itertools.pairwise(begins)) or [inside]
    marks = sum(LAYER_MARK.search(str(e["name"])) is not None and not _is_inner(str(e["name"])) for e in host)
    layers = round(marks / len(steps))
    return Summary(
        steps=len(steps),
        whole_ms=round(whole / 1000, 2),
        step_ms=round(gaps[len(gaps) // 2] / 1000, 3),
        device="GPU kernels" if kernels else "CPU operators",
        shares={name: round(time / total, 4) for name, time in sorted(spent.items(), key=lambda item: -item[1])},
        top=_top(counted, total),
        layers=layers,
        layer_us=round(_layer_us(steps, host, layers), 1),
    )


def class_of(name: str) -> str:
    """The class of an operator or a kernel."""
    return next((label for label, pattern in CLASSES if pattern.search(name)), OTHER)


def own_times(events: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float]]:
    """Each event of one thread with its length less that of the events inside it, microseconds."""
    ordered = sorted(events, key=lambda e: (_begin(e), -float(e["dur"])))
    own = [float(e["dur"]) for e in ordered]
    open_: list[int] = []
    for at, event in enumerate(ordered):
        while open_ and _begin(event) >= _end(ordered[open_[-1]]) - 1e-3:
            open_.pop()
        if open_:
            own[open_[-1]] -= float(event["dur"])
        open_.append(at)
    return [(event, max(0.0, time)) for event, time in zip(ordered, own, strict=True)]


def _top(counted: Iterable[tuple[Mapping[str, Any], float]], total: float) -> list[Operator]:
    """The operators that took longest, by name and shapes."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event, time in counted:
        shapes = (event.get("args") or {}).get("Input Dims") or []
        found[str(event["name"]), " × ".join(str(dims) for dims in shapes if dims)[:80]].append(time)
    longest = sorted(found.items(), key=lambda item: -sum(item[1]))[:TOP]
    return [
        Operator(name, shapes, round(sum(times) / total, 4), len(times), round(sum(times) / len(times), 1))
        for (name, shapes), times in longest
    ]


def _layer_us(steps: Sequence[Mapping[str, Any]], host: Sequence[Mapping[str, Any]], layers: int) -> float:
    """The median time from one layer's mark to the next, inside a step."""
    if layers < 2:
        return 0.0
    marks = sorted(_begin(e) for e in host if LAYER_MARK.search(str(e["name"])) and not _is_inner(str(e["name"])))
    spans = [(_begin(step), _end(step)) for step in steps]
    gaps = []
    for begin, end in spans:
        within = [at for at in marks if begin <= at <= end]
        gaps += [after - before for before, after in itertools.pairwise(within)]
    return sorted(gaps)[len(gaps) // 2] if gaps else 0.0


def _is_inner(name: str) -> bool:
    """Whether another mark of the same layer is around it."""
    return "reshape_and_cache" in name


def _begin(event: Mapping[str, Any]) -> float:
    return float(event["ts"])


def _end(event: Mapping[str, Any]) -> float:
    return float(event["ts"]) + float(event["dur"])
