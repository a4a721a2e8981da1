"""`make bench-engines`: engines beside vLLM behind the same gateway, and how an engine starts on a CPU."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from services.local.plan import ROOT
from tests import contract
from tests.engines import ENGINES, HERE, beside, client, failover
from tests.harness import free_ports, wait_for
from tests.up import Up

ROUNDS = 3
MODULES = {"forked": "services.worker.vllm.serve", "spawned": "vllm.entrypoints.openai.api_server"}
THREADS = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:4])), "VLLM_CPU_KVCACHE_SPACE": "1"}


def side_by_side() -> dict[str, float]:
    """The twenty requests at each engine, their speeds, and one that takes over from another."""
    with tempfile.TemporaryDirectory() as temporary, beside(Path(temporary)) as (up, ports):
        wrong = {}
        for model, engine in ENGINES.items():
            with client(up) as asking:
                wrong[model] = contract.run(asking, model, engine)
            print(f"  {model} ({engine}): {20 - len(wrong[model])} of 20 {wrong[model] or ''}", flush=True)
        found: dict[str, float] = {"contract_failed": sum(len(wrong[model]) for model in HERE),
                 "contract_failed_doubles": sum(len(said) for model, said in wrong.items() if model not in HERE)}
        for concurrent in (1, 16):
            rates: dict[str, list[float]] = {"chat": [], "llama": []}
            for _ in range(ROUNDS):  # side by side
                for model, rate in rates.items():
                    rate.append(tokens_per_s(up, model, concurrent))
            print(f"  tokens/s at {concurrent}: {rates}", flush=True)
            ratio = statistics.median(rates["llama"]) / statistics.median(rates["chat"])
            found[f"llamacpp_speed_{concurrent}"] = round(ratio, 3)
        failed = failover(up, ports)
        return {**found, "cross_engine_failed": len(failed)}


def tokens_per_s(up: Up, model: str, concurrent: int, tokens: int = 64) -> float:
    """Of so many clients, one request each, all of one length."""
    def ask(number: int) -> int:
        body = {"model": model, "prompt": f"{number} {time.monotonic_ns()} Once upon", "max_tokens": tokens, "ignore_eos": True}
        with client(up) as asking:
            return int(asking.post("/v1/completions", json=body, headers=contract.HEADERS).json()["usage"]["completion_tokens"])

    began = time.monotonic()
    with ThreadPoolExecutor(concurrent) as pool:
        made = sum(pool.map(ask, range(concurrent)))
    return round(made / (time.monotonic() - began), 1)


def starts() -> dict[str, float]:
    """Seconds until vLLM answers, forked and spawned in turn, and what they give then."""
    took: dict[str, list[float]] = {how: [] for how in MODULES}
    for _ in range(ROUNDS):
        for how, module in MODULES.items():
            took[how].append(start_s(module))
    print(f"  ready after: {took}", flush=True)
    forked, spawned = (statistics.median(took[how]) for how in ("forked", "spawned"))
    return {"start_forked_s": round(forked, 1), "start_spawned_s": round(spawned, 1), "start_ratio": round(forked / spawned, 3)}


def start_s(module: str) -> float:
    """One start of the bundled model."""
    from services.worker.vllm import serve

    [port] = free_ports(1)
    model = ROOT / ".state/models/smollm2-135m-instruct"
    env = os.environ | THREADS | {"HF_HUB_OFFLINE": "1"}
    if module == MODULES["forked"]:
        env |= serve.environment(THREADS["VLLM_CPU_OMP_THREADS_BIND"])
    command = [sys.executable, "-m", module, "--model", str(model), "--port", str(port), "--host", "127.0.0.1", "--enforce-eager",
               "--worker-cls", "services.worker.vllm.cpu.Worker"]
    began = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as engine:
        try:
            wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200, "ready", 300)
            return round(time.monotonic() - began, 1)
        finally:
            engine.terminate()


GROUPS: dict[str, Callable[[], dict[str, float]]] = {"starts": starts, "side": side_by_side}
BOUNDS = {
    "contract_failed": "0", "contract_failed_doubles": "0", "cross_engine_failed": "0", "llamacpp_speed_1": "reported",
    "llamacpp_speed_16": "reported", "start_forked_s": "-", "start_spawned_s": "-", "start_ratio": "≤ 0.6",
}
