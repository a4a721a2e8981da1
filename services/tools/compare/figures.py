"""Rounds to figures: medians over rounds, their spread, and who agrees with whom."""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from common import gpus

PERCENTILES = (50, 95, 99)
LATENCIES = {"ttft": "first token", "tpot": "each further token", "itl": "between two chunks", "e2el": "whole answer"}


class Figures(msgspec.Struct, frozen=True):
    """One side under one load; medians over its rounds."""

    side: str
    load: str
    rounds: int
    tokens_per_s: float
    tokens_per_s_rounds: list[float]
    requests_per_s: float
    goodput_per_s: float
    """Requests a second that kept the SLO."""
    failed: int
    prompt_tokens: int
    answer_tokens: int
    ms: dict[str, dict[str, float]]
    """ttft, tpot, itl, e2el -> p50, p95, p99, in milliseconds."""


def of(side: str, load: str, rounds: Sequence[Mapping[str, Any]]) -> Figures:
    """The figures of some rounds, each as `vllm bench serve` saves it."""

    def median(name: str) -> float:
        return round(statistics.median(float(one.get(name) or 0.0) for one in rounds), 2)

    return Figures(
        side,
        load,
        len(rounds),
        median("output_throughput"),
        [round(float(one["output_throughput"]), 1) for one in rounds],
        median("request_throughput"),
        median("request_goodput"),
        sum(int(one.get("failed") or 0) for one in rounds),
        round(statistics.mean(int(one["total_input_tokens"]) for one in rounds)),
        round(statistics.mean(int(one["total_output_tokens"]) for one in rounds)),
        {name: {f"p{at}": median(f"p{at}_{name}_ms") for at in PERCENTILES} for name in LATENCIES},
    )


def agreement(first: Sequence[str], other: Sequence[str]) -> tuple[float, float]:
    """(share of answers that are the same, mean share of the first's characters before they differ)."""
    same = sum(a == b for a, b in zip(first, other, strict=True)) / len(first)
    prefix = statistics.mean(_alike(a, b) / max(1, len(a)) for a, b in zip(first, other, strict=True))
    return round(same, 3), round(prefix, 3)


def _alike(one: str, other: str) -> int:
    """How many characters at the beginning are the same."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def machine() -> dict[str, str]:
    """What the load came from, and what the stack's engines run on."""
    found = {"machine": platform.platform(), "cores": str(len(os.sched_getaffinity(0)))}
    with open("/proc/cpuinfo") as file:
        found["processor"] = next(
            (line.partition(":")[2].strip() for line in file if line.startswith("model name")), ""
        )
    try:
        found["GPUs"] = ", ".join(gpu.name for gpu in gpus.look().gpus) or "none"
    except gpus.GpusAway:
        found["GPUs"] = "none"
    return found
