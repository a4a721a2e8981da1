"""`make bench-engines`: engines beside vLLM behind the same gateway, and how an engine starts on a CPU."""

import contextlib
import json
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
import msgspec

from common import checkpoint
from services.local import model as bundled
from services.local.plan import ROOT
from services.tools.profile import trace
from services.tools.quantize import engine
from services.tools.quantize.source import METHODS
from tests import contract
from tests.engines import ENGINES, HERE, beside, client, failover
from tests.harness import free_ports, wait_for
from tests.up import Up, started

ROUNDS = 3
TURNS = 9
MODELS = ROOT / ".state/models"
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


def quantised() -> dict[str, float]:
    """The bundled model by each method, made and measured by `make quantize`, and the fastest beside the original."""
    found: dict[str, float] = {"quantised_served": 0}
    for method in METHODS:
        folder = MODELS / f"{bundled.NAME}-{method}"
        with tempfile.TemporaryDirectory() as temporary:
            env = os.environ | {"METHOD": method, "MAX_PERPLEXITY_LOSS": "9", "MODELS_FILE": f"{temporary}/models.yaml"}
            Path(env["MODELS_FILE"]).write_text("models: [{name: smollm2-135m-instruct}]\n")
            subprocess.run(["make", "quantize"], cwd=ROOT, env=env, check=True)
        said = json.loads((folder / checkpoint.MADE).read_text())["gate"]
        found["quantised_served"] += 1
        found[f"ppl_{method}"] = round(said["quantised"]["perplexity"] / said["original"]["perplexity"], 3)
        found[f"kl_{method}"] = said["kl_nats"]
    sides: dict[str, tuple[Path, dict[str, str]]] = {"original": (MODELS / bundled.NAME, {}), "w8a8": (MODELS / f"{bundled.NAME}-w8a8", {})}
    ratios = in_turns(sides, (1, 16))
    return found | {f"quant_speed_{at}": ratio for at, ratio in ratios.items()}


def default() -> dict[str, float]:
    """What `make up` starts, beside what it started before (bench/before.py), tuned models possible."""
    with tempfile.TemporaryDirectory() as adapters:
        before = {"ADAPTERS_DIR": adapters, "ENGINE_ARGS": "--worker-cls bench.before.Worker --distributed-executor-backend mp"}
        model = MODELS / bundled.NAME
        ratios = in_turns({"before": (model, before), "now": (model, {"ADAPTERS_DIR": adapters})}, (1, 32))
    return {f"default_speed_{at}": ratio for at, ratio in ratios.items()}


def in_turns(sides: dict[str, tuple[Path, dict[str, str]]], concurrent: tuple[int, ...]) -> dict[int, float]:
    """Tokens/s of the second side ÷ the first's, by how many ask at once: medians of rounds that take turns."""
    found = {}
    with contextlib.ExitStack() as running, tempfile.TemporaryDirectory() as logs:
        up = {name: running.enter_context(engine.alone({"MODEL": str(model), "MODEL_REVISION": "", **told}, cuda=False, log=Path(logs) / name))
              for name, (model, told) in sides.items()}
        for at in concurrent:
            rates: dict[str, list[float]] = {name: [] for name in up}
            for number in range(TURNS + 1):
                for name in sorted(up, reverse=number % 2 == 1):
                    rates[name].append(round(engine.one_round(up[name], at), 1))
            print(f"  tokens/s at {at}: {rates}", flush=True)
            first, second = (statistics.median(rates[name][1:]) for name in sides)
            found[at] = round(second / first, 3)
    return found


def tools() -> dict[str, float]:
    """`make compare` of one model against itself, and what a profile explains."""
    with tempfile.TemporaryDirectory() as temporary, started(Path(temporary), 1) as up:
        env = os.environ | {"STATE_DIR": str(up.state), "RECIPE": "self"}
        subprocess.run(["make", "compare"], cwd=ROOT, env=env, check=True)
        [said] = (up.state / "compared").glob("*/report.json")
        one, same = (found["tokens_per_s"] for found in json.loads(said.read_text())["figures"])
        subprocess.run(["make", "profile"], cwd=ROOT, env=env | {"FORCE": "1", "N": "4"}, check=True)
        summary = msgspec.json.decode((up.state / "profiles/worker-1/summary.json").read_bytes(), type=trace.Summary)
        return {"compare_self": round(abs(same / one - 1), 4), "profile_explained": round(summary.explained, 4)}


GROUPS: dict[str, Callable[[], dict[str, float]]] = {
    "default": default, "quantised": quantised, "tools": tools, "starts": starts, "side": side_by_side,
}
BOUNDS = {
    "quantised_served": "3", "ppl_w8a8": "≤ 1.05", "ppl_gptq": "reported", "ppl_awq": "reported", "kl_w8a8": "reported",
    "kl_gptq": "reported", "kl_awq": "reported", "quant_speed_1": "> 1", "quant_speed_16": "reported", "default_speed_1": "≥ 1.2",
    "default_speed_32": "≥ 1.1", "compare_self": "≤ 0.03", "profile_explained": "≥ 0.95",
    "contract_failed": "0", "contract_failed_doubles": "0", "cross_engine_failed": "0", "llamacpp_speed_1": "reported",
    "llamacpp_speed_16": "reported", "start_forked_s": "-", "start_spawned_s": "-", "start_ratio": "≤ 0.6",
}
