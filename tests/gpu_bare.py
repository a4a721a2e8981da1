"""What of `make check-gpu` needs no vLLM: `python -m tests.gpu_bare FOLDER`, on a machine with an NVIDIA GPU, torch, transformers,
peft and llm-compressor. FOLDER: the bundled model's tokenizer, and its GGUF file as model.gguf. Writes bench/results/gpu_bare.json.

The exporter beside nvidia-smi; a LoRA run of the trainer over a model of Mistral-7B's shape (random weights, our tokenizer), its
memory beside what `make plan` says; the reader of profiles on a trace with GPU kernels; the bundled model quantised on the card, its
perplexity by transformers.
"""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import msgspec

from common import gpus
from common.sizing import shape, training
from services.tools.profile import trace
from services.tools.quantize.texts import pieces
from services.trainer.plan import rows_on_gpu

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/gpu_bare.json"
SHAPE = shape.KNOWN["mistralai/Mistral-7B-Instruct-v0.3"]
ROWS = 24


def used_bytes() -> int:
    """Of the first GPU, by its driver."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]) << 20


def exporter() -> dict[str, object]:
    """Its sample of the card beside nvidia-smi's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "services.gpu_exporter", "--port", str(port)], cwd=ROOT)
    try:
        for _ in range(100):
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
                if "gpu_memory_used_bytes{" in text:
                    break
    finally:
        process.terminate()
    samples = {line.partition("{")[0]: float(line.split()[-1]) for line in text.splitlines() if line.startswith("gpu_")}
    return {"exporter_memory_difference_mib": round(abs(samples["gpu_memory_used_bytes"] - used_bytes()) / 2**20, 1), "exporter": samples}


def made(folder: Path, tokenizer: Path) -> Path:
    """A checkpoint of Mistral-7B's shape, weights drawn on the GPU."""
    import torch
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    config = MistralConfig(**{**SHAPE, "vocab_size": len(words)})
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = MistralForCausalLM(config)
    model.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    torch.set_default_dtype(torch.float32)
    del model
    torch.cuda.empty_cache()
    return folder / "model"


def trained(folder: Path, base: Path) -> dict[str, object]:
    """One run as the trainer starts it; the most memory that it took beside the plan's figure."""
    rows = [{"question": f"What is {n} and {n}?", "answer": f"{n} and {n} is {2 * n}. " * 20} for n in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(base)
    longest = max(len(words.apply_chat_template([{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}],
                                                return_dict=False)) for row in rows)
    plan = {"job": "j", "base": str(base), "training_file": str(folder / "rows.jsonl"), "seed": 1, "n_epochs": 1, "batch_size": 4,
            "four_bit": False, "gpu": True}
    (folder / "plan.json").write_text(json.dumps(plan))
    before, most, over = used_bytes(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            most[0] = max(most[0], used_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.monotonic()
    ran = subprocess.run([sys.executable, "-m", "services.trainer.run", str(folder)], cwd=ROOT, input="go\n", text=True, capture_output=True,
                         env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])})
    took = time.monotonic() - began
    over.set()
    watching.join()
    if ran.returncode:
        raise RuntimeError(ran.stderr[-1500:] or ran.stdout[-1500:])
    run = json.loads((folder / "run.json").read_text())
    known = shape.of_config(json.loads((base / "config.json").read_text()), "m")
    most_rows = rows_on_gpu(8, known.vocabulary, longest)
    _, at_once = training.choose(known, gpus.look().gpus[0].memory_bytes, tokens=longest, most=most_rows, four_bit=False)
    planned = training.lora(known, four_bit=False, tokens=longest, rows=at_once)
    return {"longest_row_tokens": longest, "rows_at_once": at_once, "planned_gib": round(planned.total_bytes / 2**30, 2),
            "trained_s": round(took, 1), "seconds": run["seconds"], "trained": run["result"],
            "trained_most_gib": round((most[0] - before) / 2**30, 2)}


def profiled(folder: Path, base: Path) -> dict[str, object]:
    """Twenty decode steps of the model under PyTorch's profiler, each marked as vLLM marks its own."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to("cuda").eval()
    ids = torch.randint(5, 1000, (8, 64), device="cuda")
    with torch.inference_mode():
        said = model(ids, use_cache=True)
        step = said.logits[:, -1:].argmax(-1)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as seen:
            for _ in range(20):
                with record_function("execute_context_0(0)_generation_8(8)"):
                    said = model(step, past_key_values=said.past_key_values, use_cache=True)
                step = said.logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
    path = folder / "trace.json"
    seen.export_chrome_trace(str(path))
    summary = trace.read(path)
    names = sorted({e["name"] for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "kernel"})
    return {"profile": msgspec.to_builtins(summary), "profile_explained": round(summary.explained, 4),
            "unknown_kernels": [name[:120] for name in names if trace.class_of(name) == trace.OTHER]}


def quantised(folder: Path, given: Path) -> dict[str, object]:
    """The bundled model by each method of `make quantize`, on the card."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    texts = [text for path in sorted((ROOT / "docs").glob("*.md")) for text in pieces(path.read_text().split("\n\n"))]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for at, text in enumerate(texts) if at % 3))
    words = AutoTokenizer.from_pretrained(given)
    base = folder / "bundled"
    AutoModelForCausalLM.from_pretrained(given, gguf_file="model.gguf", dtype=torch.bfloat16,
                                         quantization_config=GgufConfig(dequantize=True)).save_pretrained(base)
    words.save_pretrained(base)
    found: dict[str, object] = {"ppl_bf16": perplexity(base, words, texts[::3])}
    for method in ("w8a8", "gptq", "awq"):
        began, out = time.monotonic(), folder / method
        ran = subprocess.run([sys.executable, str(ROOT / "services/tools/quantize/compress.py"), method, str(base), "", str(folder / "texts.jsonl"), str(out)],
                             capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"{method}: {ran.stderr[-1500:]}")
        found[f"{method}_s"] = round(time.monotonic() - began, 1)
        found[f"{method}_mb"] = round(sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6)
        found[f"ppl_{method}"] = perplexity(out, words, texts[::3])
    return found


def perplexity(model: Path, words: Any, texts: list[str]) -> float:
    """By transformers, on the card."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to("cuda").eval()
    nats, count = 0.0, 0
    with torch.inference_mode():
        for text in texts[:40]:
            ids = words(text, return_tensors="pt", truncation=True, max_length=512).input_ids.to("cuda")
            logits = loaded(ids).logits[0, :-1].float()
            nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return round(math.exp(nats / count), 2)


def main() -> int:
    """Each part by itself: one that fails is told, and the others still run."""
    found = gpus.look()
    results: dict[str, object] = {"gpu": found.gpus[0].name, "driver": found.driver, "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base: list[Path] = []
        for name, measure in (("exporter", exporter), ("made", lambda: base.append(made(folder, Path(sys.argv[1]))) or {}),
                              ("trained", lambda: trained(folder, base[0])), ("profiled", lambda: profiled(folder, base[0])), ("quantised", lambda: quantised(folder, Path(sys.argv[1])))):
            began = time.monotonic()
            try:
                results.update(measure())
            except Exception as error:
                results[f"failed_{name}"] = f"{type(error).__name__}: {error}"[:1500]
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return int(any(name.startswith("failed_") for name in results))


if __name__ == "__main__":
    sys.exit(main())
