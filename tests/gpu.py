"""`make check-gpu`: what only a machine with an NVIDIA GPU can show, in some minutes; writes bench/results/gpu.json.

The exporter beside nvidia-smi; `make up` with the bundled model on the CUDA build; an engine that sleeps and wakes; one training on the same
card; the KV tier on. Where there is no GPU it says so and ends with 2: nothing of this has been shown then.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import yaml

from bench.hosts import EXAMPLES, engine_s
from common import gpus
from services.local.plan import ROOT, installed_for_cuda
from tests.harness import free_ports, wait_for
from tests.up import Up, started

RESULTS = ROOT / "bench/results/gpu.json"
PROMPT = "The quick brown fox jumps over the lazy dog. " * 120


def exporter() -> dict[str, object]:
    """Used memory and power as the exporter says, beside nvidia-smi."""
    port = free_ports(1)[0]
    process = subprocess.Popen([sys.executable, "-m", "services.gpu_exporter", "--port", str(port)], cwd=ROOT, env=os.environ)
    try:
        wait_for(lambda: "gpu_info" in httpx.get(f"http://127.0.0.1:{port}/metrics").text, "the exporter", 20)
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    finally:
        process.terminate()
    used = next(float(line.split()[-1]) for line in text.splitlines() if line.startswith("gpu_memory_used_bytes"))
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    said = float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]) * 2**20
    return {"exporter_memory_difference_mib": round(abs(used - said) / 2**20, 1)}


def served(up: Up) -> dict[str, object]:
    """Tokens per second alone, and that the answer is the one the CPU gives (greedy)."""
    up.ask("Warm up.", max_tokens=16)
    began = time.monotonic()
    answer = up.sdk.chat.completions.create(model="smollm2-135m-instruct", messages=[{"role": "user", "content": "Tell me a story."}],
                                            max_tokens=256, temperature=0, extra_body={"ignore_eos": True}, extra_headers={"cache-control": "no-store"})
    took = time.monotonic() - began
    assert answer.usage is not None
    return {"up_s": round(up.took_s, 1), "engine_s": engine_s(up, "worker-1"), "tokens_per_s": round(answer.usage.completion_tokens / took, 1)}


def trained(up: Up) -> dict[str, object]:
    """One small job on the card that serves: the engine sleeps, wakes, and serves the tuned model."""
    rows = "".join(EXAMPLES.read_text().splitlines(keepends=True)[:24]).encode()
    file = up.sdk.files.create(file=("t.jsonl", rows), purpose="fine-tune")
    job = up.sdk.fine_tuning.jobs.create(model="smollm2-135m-instruct", training_file=file.id,
                                         method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}})
    began = time.monotonic()
    wait_for(lambda: up.sdk.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed", "cancelled"), "the training's end", 600)
    found = up.sdk.fine_tuning.jobs.retrieve(job.id)
    log = (up.state / "logs/worker-1.log").read_text()
    return {"training_status": found.status, "training_s": round(time.monotonic() - began, 1), "engine_slept": '"process":"kept"' in log,
            "tuned_answers": bool(found.fine_tuned_model and up.ask("Hello", model=found.fine_tuned_model))}


def on_demand(folder: Path) -> dict[str, object]:
    """Two models that take turns on one card: what a wake takes, first and later."""
    (folder / "models.yaml").write_text(yaml.safe_dump({"models": [
        {"name": name, "source": "bundled", "start": "on_demand", "adapters": False} for name in ("one", "two")]}))
    waits = []
    with started(folder, 0, MODELS_FILE=str(folder / "models.yaml")) as up:
        for model in ("one", "two", "one", "two"):
            began = time.monotonic()
            up.ask("Hello", model=model)
            waits.append(round(time.monotonic() - began, 1))
            time.sleep(11)
    return {"wake_first_s": waits[:2], "wake_again_s": waits[2:]}


def tiered(folder: Path) -> dict[str, object]:
    """The KV tier: a prompt that one engine has read is loaded by the next one."""
    def ttft(up: Up) -> float:
        began = time.monotonic()
        next(iter(up.sdk.chat.completions.create(model="smollm2-135m-instruct", messages=[{"role": "user", "content": PROMPT}], max_tokens=2, stream=True)))
        return round(time.monotonic() - began, 3)

    with started(folder, 1, KV_TIER="redis", KV_HOST_GIB="4", TRAIN_WHEN="now") as up:
        cold = ttft(up)
        time.sleep(2)
        os.kill(up.engine_pids()[0], 9)
        wait_for(lambda: up.ready() == 1, "back", 300)
        up.ask("Warm up.")
        warm = ttft(up)
        log = (up.state / "logs/worker-1.log").read_text()
    return {"tier_cold_ttft_s": cold, "tier_loaded_ttft_s": warm, "tier_on": "RedisTier" in log}


def main() -> int:
    """Each part by itself: one that fails is told, and the others still run."""
    try:
        found = gpus.look()
    except gpus.GpusAway as error:
        print(f"check-gpu: no GPU here ({error}). Not run: exporter, make up, sleep and wake, training, KV tier.", file=sys.stderr)
        return 2
    if not found.gpus or not installed_for_cuda():
        print("check-gpu: there is no GPU, or vLLM's CPU build is installed (rm -rf .venv; make up). Not run.", file=sys.stderr)
        return 2
    results: dict[str, object] = {"gpu": found.gpus[0].name, "driver": found.driver, "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}

    def part(measure: Callable[[], dict[str, object]]) -> None:
        try:
            results.update(measure())
        except Exception as error:
            results[f"failed_{measure.__name__}"] = f"{type(error).__name__}: {error}"[:500]
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results, indent=1), flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folders = [root / name for name in ("one", "two", "three")]
        for folder in folders:
            folder.mkdir()
        part(exporter)

        def up_and_trained() -> dict[str, object]:
            with started(folders[0], 1, TRAIN_WHEN="now") as up:
                return served(up) | trained(up)

        part(up_and_trained)
        part(lambda: on_demand(folders[1]))
        part(lambda: tiered(folders[2]))
    return int(any(name.startswith("failed_") for name in results))


if __name__ == "__main__":
    sys.exit(main())
