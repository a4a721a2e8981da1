"""`make bench-scale`: the routing policy in a simulation of many workers, and the simulation beside a real stack."""

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from bench import traces
from bench.kv import BLOCK_TOKENS, RAW_BYTES_PER_TOKEN
from bench.simulate import POLICIES, Fleet, Outcome, p95, run
from bench.simulated_engine import Speed
from bench.traces import Session, Shape
from services.worker.vllm.command import CPU_SEQUENCES
from tests.up import MODEL, Up, started

A100 = Speed(
    base_s=0.012, decode_s=5e-5, prefill_s=8e-5, attention_s=1e-9, remote_s=0.0, step_tokens=4096, slots=256,
    block_tokens=64, blocks=4000,
)  # fmt: skip
"""Of an 8B model in 16 bits: 16 GB of weights at 1.3 TB/s a step, 2 · 8e9 operations a token at 200 TFLOP/s, KV memory
for 256,000 tokens. Not measured: no such card was there."""
MANY = Shape(
    applications=2000, system_tokens=800, turns=4, question_tokens=100, answer_tokens=150, pause_s=8, burst=1.5
)
PER_WORKER_S = 1.2
LENGTH_S = 60.0
FEW = Shape(applications=6, system_tokens=300, turns=3, question_tokens=40, answer_tokens=30, pause_s=4)
REAL_PER_S, REAL_LENGTH_S, REAL_RUNS = 0.16, 150.0, 2
REAL_GIB = 1
STEP_TOKENS = 2048
"""Of vLLM on a CPU, with KV_TIER=off."""
LENGTHS = (100, 400, 800, 1600)
SEEDS = 5


def simulated() -> dict[str, float]:
    """All policies on a hundred workers, then the two that matter on a thousand; four gateways, no tier."""
    found: dict[str, float] = {}
    hundred = traces.sessions(MANY, PER_WORKER_S * 100, LENGTH_S, seed=1)
    for name in POLICIES:
        out = one_run(f"100 workers, {name}", hundred, Fleet(100, 4, tier=False), name)
        slug = name.replace(" ", "_")
        found |= {f"sim_p95_{slug}_s": round(out.p95_s, 3), f"sim_hits_{slug}": round(out.hit_rate, 3),
                  f"sim_hottest_{slug}": round(out.hottest, 2)}
    for title, fleet in (
        ("each session one gateway", Fleet(100, 4, by_session=True, tier=False)),
        ("one gateway", Fleet(100, 1, tier=False)),
        ("a tenth of the workers slow", Fleet(100, 4, tier=False, slow=0.1)),
        ("two workers die", Fleet(100, 4, tier=False, deaths=((20.0, 3), (40.0, 7)))),
    ):
        out = one_run(f"100 workers, prefix, {title}", hundred, fleet, "prefix")
        slug = title.replace(" ", "_")
        found |= {f"sim_p95_{slug}_s": round(out.p95_s, 3), f"sim_hits_{slug}": round(out.hit_rate, 3)}
    thousand = traces.sessions(MANY, PER_WORKER_S * 1000, LENGTH_S, seed=1)
    best, least = (
        one_run(f"1,000 workers, {name}", thousand, Fleet(1000, 4, tier=False), name) for name in ("prefix", "least in flight")
    )
    return found | {"sim_prefix_gain": round(best.p95_s / least.p95_s, 3), "sim_hotspot": round(best.hottest, 3),
                    "sim_hits_1000": round(best.hit_rate, 3)}


def one_run(title: str, trace: Sequence[Session], fleet: Fleet, policy: str) -> Outcome:
    """One, and its line."""
    began = time.monotonic()
    out = run(trace, fleet, A100, POLICIES[policy])
    print(f"  {title:50} {shown(out)}  ({time.monotonic() - began:.0f} s)", flush=True)
    return out


def shown(out: Outcome) -> str:
    """One line."""
    return (f"TTFT p50 {statistics.median(out.ttft_s):.3f} p95 {out.p95_s:.3f} s, hits {out.hit_rate:.1%}, "
            f"hottest {out.hottest:.2f}, busy {out.busy:.0%}, failed {out.failed}")


def against_reality() -> dict[str, float]:
    """The same traces to two real workers, each on a core, and to two simulated ones as fast as those were alone."""
    with tempfile.TemporaryDirectory() as temporary, started(Path(temporary), 2, KV_TIER="off", KV_CACHE_GIB=str(REAL_GIB)) as up:
        speed = asyncio.run(calibrated(up))
        print(f"  {speed}", flush=True)
        runs = [traces.sessions(FEW, REAL_PER_S, REAL_LENGTH_S, seed) for seed in range(1, REAL_RUNS + 1)]
        real = [asyncio.run(replay(up, trace)) for trace in runs]
    simulated_ = [run(trace, Fleet(2, 1, tier=False), speed, POLICIES["prefix"], seed) for trace in runs for seed in range(SEEDS)]
    ttft = {name: p95([t for one in every for t in one.ttft_s]) for name, every in (("real", real), ("simulated", simulated_))}
    hits = {name: statistics.mean(one.hit_rate for one in every) for name, every in (("real", real), ("simulated", simulated_))}
    print(f"  TTFT p95 {ttft}, hit rate {hits}, {sum(len(one.ttft_s) for one in real)} requests", flush=True)
    return {"sim_hit_rate_error_points": round(100 * abs(hits["simulated"] - hits["real"]), 2),
            "sim_ttft_error": round(abs(ttft["simulated"] / ttft["real"] - 1), 3)}


class Seen(NamedTuple):
    """What a real run gave."""

    ttft_s: tuple[float, ...]
    hit_rate: float


class Answer(NamedTuple):
    """One real answer."""

    text: str
    ttft_s: float
    itl_s: float
    cached: int
    prompt_tokens: int


async def ask(http: httpx.AsyncClient, prompt: str, answer_tokens: int) -> Answer:
    """Stream one completion of exactly so many tokens."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": answer_tokens, "ignore_eos": True, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}}
    began = time.monotonic()
    first = last = 0.0
    text = ""
    usage: dict[str, Any] = {}
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("choices"):
                last = time.monotonic()
                first = first or last
                text += event["choices"][0]["text"]
            usage = event.get("usage") or usage
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answer(text, first - began, (last - first) / max(1, answer_tokens - 1), cached, usage["prompt_tokens"])


def client(up: Up) -> httpx.AsyncClient:
    """With the stack's key; answers come from engines, not from memory."""
    headers = {"authorization": f"Bearer {up.key}", "cache-control": "no-store"}
    return httpx.AsyncClient(base_url=up.base, headers=headers, timeout=120)


async def calibrated(up: Up) -> Speed:
    """What a worker takes: both of them asked at once, as both are in the trace."""
    source = random.Random(7)
    async with client(up) as http:
        await asyncio.gather(*(ask(http, traces.words(source, 50), 8) for _ in range(4)))
        steps = {}
        for each in (1, 8):
            both = await asyncio.gather(*(ask(http, traces.words(source, 20), 48) for _ in range(2 * each)))
            steps[each] = statistics.median(one.itl_s for one in both)
        decode = (steps[8] - steps[1]) / 7
        base = steps[1] - decode
        took = {}
        for length in LENGTHS:
            pairs = [await asyncio.gather(*(ask(http, traces.words(source, length), 1) for _ in range(2))) for _ in range(3)]
            took[length] = statistics.median(one.ttft_s for pair in pairs for one in pair)
    print(f"  a step of one and of eight: {steps}; TTFT by prompt: {took}", flush=True)
    rows = np.array([[length, length**2 / 2] for length in LENGTHS])
    read, attend = np.linalg.lstsq(rows, np.array([took[length] - base for length in LENGTHS]), rcond=None)[0]
    blocks = REAL_GIB * 2**30 // RAW_BYTES_PER_TOKEN // BLOCK_TOKENS
    return Speed(base, max(0.0, decode), float(read), max(0.0, float(attend)), 0.0, STEP_TOKENS, CPU_SEQUENCES, BLOCK_TOKENS, blocks)


async def replay(up: Up, trace: Sequence[Session]) -> Seen:
    """The trace, at its own pace."""
    answers: list[Answer] = []

    async def converse(session: Session) -> None:
        await asyncio.sleep(session.at_s)
        said = session.system
        for turn in session.turns:
            await asyncio.sleep(turn.pause_s)
            said = f"{said} {turn.words}"
            answers.append(await ask(http, said, turn.answer_tokens))
            said += answers[-1].text

    async with client(up) as http:
        await asyncio.gather(*(converse(session) for session in trace))
    cached = sum(one.cached for one in answers) / sum(one.prompt_tokens for one in answers)
    return Seen(tuple(one.ttft_s for one in answers), cached)


GROUPS: dict[str, Callable[[], dict[str, float]]] = {"simulated": simulated, "reality": against_reality}
BOUNDS = {
    "sim_hit_rate_error_points": "≤ 5", "sim_ttft_error": "≤ 0.15", "sim_prefix_gain": "< 1", "sim_hotspot": "≤ 1.5",
}
