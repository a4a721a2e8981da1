"""The figures of the life cycle: from questions to a model of one's own, and batches. Real vLLM, real training, real SDK."""

import concurrent.futures
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai

from bench.kv import question, random_prompt, workers_of
from bench.stack import Figures, real_stack, workshop
from services.local.finetune import Heldout, Kind, pairs, read_heldout, retrieve, score, watch
from services.local.plan import ROOT
from services.trainer.plan import Plan
from tests.harness import wait_for
from tests.up import MODEL, Up

BOUNDS = {
    "heldout_tuned": ">= 0.8",
    "heldout_base": "reported",
    "heldout_retrieval": "reported",
    "untaught_base": "reported",
    "untaught_tuned": "reported",
    "general_base": "reported",
    "general_tuned": "reported",
    "publish_s": "<= 10",
    "failed_while_loading": "0",
    "resume_loss_diff": "<= 0.001",
    "batch_results": "1000",
    "batch_duplicates": "0",
    "interactive_ttft_ratio": "<= 1.3",
    "base_speed_with_adapters_possible": ">= 0.97",
    "training_speed_vs_bare": ">= 0.95",
}
DATA = ROOT / "examples/owngpt-qa.jsonl"
HELDOUT = ROOT / "examples/owngpt-heldout.jsonl"
KILLS = 5
BATCH_LINES = 1000
TURNS = 10


def answers(up: Up, model: str, held: list[Heldout]) -> dict[Kind, float]:
    """Share of held-out questions answered right, greedily, by kind."""
    def ask(row: Heldout) -> str:
        said = up.sdk.chat.completions.create(
            model=model, messages=[{"role": "user", "content": row.question}], temperature=0, max_tokens=64)
        return said.choices[0].message.content or ""

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return score(held, list(pool.map(ask, held)), DATA.read_bytes())


@contextlib.contextmanager
def asking(up: Up) -> Iterator[Counter[str]]:
    """Requests to the base model, one after another, counted."""
    stop, counts = threading.Event(), Counter[str]()

    def client(number: int) -> None:
        while not stop.is_set():
            counts["asked"] += 1
            try:
                up.ask(f"{number} {counts['asked']}?", max_tokens=8)
            except openai.APIError:
                counts["failed"] += 1

    clients = [threading.Thread(target=client, args=(n,)) for n in range(2)]
    for thread in clients:
        thread.start()
    try:
        yield counts
    finally:
        stop.set()
        for thread in clients:
            thread.join()


def tuning() -> Figures:
    """The example data, from upload to answers on both workers; the base model is asked while adapters come and go."""
    held = read_heldout(HELDOUT)
    known = pairs(DATA.read_bytes())
    retrieved = score(held, [retrieve(row.question, known) for row in held], DATA.read_bytes())
    with real_stack(2) as up:
        base = answers(up, MODEL, held)
        print("base:", base, flush=True)
        file = up.sdk.files.create(file=DATA, purpose="fine-tune")
        job = up.sdk.fine_tuning.jobs.create(model=MODEL, training_file=file.id, suffix="bench", seed=7)
        began = time.monotonic()
        job = watch(up.sdk, job.id)
        assert job.status == "succeeded", job.error
        succeeded = time.monotonic()
        name = job.fine_tuned_model
        ask_everywhere(up, name)
        publish_s = time.monotonic() - succeeded
        trained_s = succeeded - began
        tuned = answers(up, name, held)
        print(f"tuned, after {trained_s:.0f} s:", tuned, flush=True)
        # Another name for the same weights, loaded and unloaded again and again while the base model is asked.
        with asking(up) as counts:
            for _ in range(5):
                again = register_copy(up, name)
                wait_for(lambda n=again: listed(up, n), "loaded", 60)
                ask_everywhere(up, again)
                up.sdk.models.delete(again)
                wait_for(lambda n=again: not listed(up, n), "unloaded", 60)
        print(dict(counts), flush=True)
        return {
            "heldout_base": base["taught"], "heldout_tuned": tuned["taught"], "heldout_retrieval": retrieved["taught"],
            "untaught_base": base["untaught"], "untaught_tuned": tuned["untaught"], "general_base": base["general"],
            "general_tuned": tuned["general"], "publish_s": publish_s, "training_s": trained_s,
            "failed_while_loading": float(counts["failed"]), "asked_while_loading": float(counts["asked"]),
        }


def listed(up: Up, name: str) -> bool:
    """Whether a model is in /v1/models."""
    return name in {model.id for model in up.sdk.models.list()}


def ask_everywhere(up: Up, name: str) -> None:
    """An answer of this model from every worker, asked directly."""
    for worker in workers_of(up):
        def answered(worker: Any = worker) -> bool:
            return bool(worker.http.post("/v1/completions", json=question([1, 2, 3]) | {"model": name}).status_code == 200)
        wait_for(answered, f"{name} everywhere", 60)


def register_copy(up: Up, name: str) -> str:
    """The same adapter under a new name, as a second job with the same result would register it."""
    redis = up.redis_as("trainer")
    entry = json.loads(redis.hget("adapters", name))
    entry["name"] = f"{name}-{random.randrange(10**9)}"
    redis.hsetnx("adapters", entry["name"], json.dumps(entry))
    return str(entry["name"])


def resume() -> Figures:
    """Final validation loss of a run that was killed five times at random steps, and of one that was not."""
    rng = random.Random(time.time_ns())
    with workshop() as folder:
        data = folder / "rows.jsonl"
        data.write_text("".join(DATA.read_text().splitlines(keepends=True)[:120]))
        whole, steps = run_training(folder / "whole", data, [])
        broken, _ = run_training(folder / "broken", data, sorted(rng.sample(range(2, steps), KILLS)))
        print(f"unbroken {whole:.6f}, killed {KILLS} times {broken:.6f}", flush=True)
        return {"resume_loss_diff": abs(whole - broken), "resume_loss_unbroken": whole}


def run_training(folder: Path, data: Path, kill_at: list[int]) -> tuple[float, int]:
    """(validation loss, steps) of one run that is killed, and started again, when it says that it is at these steps."""
    folder.mkdir()
    write_plan(folder, data, n_epochs=4, batch_size=4)
    while True:
        with subprocess.Popen([sys.executable, "-m", "services.trainer.run", str(folder)], cwd=ROOT, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(folder / "log.txt", "ab")) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            for event in map(json.loads, process.stdout):
                if kill_at and event["kind"] == "metrics" and event["step"] >= kill_at[0]:
                    process.kill()
                    there = sorted(path.name for path in (folder / "checkpoints").glob("*"))
                    print(f"killed at step {event['step']} of {event['total_steps']}; there is {there}", flush=True)
                    kill_at = kill_at[1:]
                    break
            else:
                assert process.wait() == 0, (folder / "log.txt").read_text()[-2000:]
                assert not kill_at, "the run ended before it was killed often enough"
                result = json.loads((folder / "run.json").read_text())["result"]
                return float(result["valid_loss"]), int(result["steps"])


def write_plan(folder: Path, data: Path, **fields: Any) -> None:
    """plan.json for a run outside a stack."""
    base = str(ROOT / ".state/models" / MODEL)
    plan = {"job": "bench", "base": base, "training_file": str(data), "seed": 11} | fields
    (folder / "plan.json").write_text(json.dumps(plan))
    assert set(plan) <= set(Plan.__struct_fields__)


def training_speed() -> Figures:
    """Tokens per second of the Trainer inside a run ÷ a bare PEFT and Trainer script, in turns."""
    ratios = []
    with workshop() as folder:
        data = folder / "rows.jsonl"
        data.write_text("".join(DATA.read_text().splitlines(keepends=True)[:120]))
        for turn in range(6):
            speed: dict[str, float] = {}
            for kind in sorted(("ours", "bare"), reverse=bool(turn % 2)):
                place = folder / f"{kind}{turn}"
                place.mkdir()
                write_plan(place, data, n_epochs=1, batch_size=8)
                module = "services.trainer.run" if kind == "ours" else "bench.bare_training"
                out = subprocess.run([sys.executable, "-m", module, str(place)], cwd=ROOT, capture_output=True, text=True, check=True,
                                     input="go\n").stdout
                events = [json.loads(line) for line in out.splitlines() if line.startswith('{"')]
                speed[kind] = [event["tokens_per_s"] for event in events if "tokens_per_s" in event][-1]
            if turn:
                ratios.append(speed["ours"] / speed["bare"])
            print({kind: round(value, 1) for kind, value in speed.items()}, flush=True)
    return {"training_speed_vs_bare": statistics.median(ratios), "training_tokens_s": speed["ours"]}


def base_speed() -> Figures:
    """Tokens per second of the base model at 16 concurrent: a stack that can serve adapters ÷ one that cannot."""
    rng = random.Random(time.time_ns())
    speed: dict[str, list[float]] = {"possible": [], "off": []}
    dials = {"possible": {}, "off": {"ADAPTERS_DIR": ""}}
    with contextlib.ExitStack() as stacked:
        ups = {kind: stacked.enter_context(real_stack(1, KV_TIER="off", **dials[kind])) for kind in speed}
        workers = {kind: workers_of(up)[0] for kind, up in ups.items()}
        for turn in range(2 * TURNS + 1):
            for kind in sorted(speed, reverse=bool(turn % 2)):
                prompts = [random_prompt(100, rng) for _ in range(16)]
                began = time.perf_counter()
                with concurrent.futures.ThreadPoolExecutor(16) as pool:
                    for answer in pool.map(lambda p, w=workers[kind]: w.http.post(
                            "/v1/completions", json=question(p, max_tokens=64)), prompts):
                        answer.raise_for_status()
                if turn:
                    speed[kind].append(16 * 64 / (time.perf_counter() - began))
                    print(f"adapters {kind:8s} {speed[kind][-1]:6.1f} tokens/s", flush=True)
    ratios = [on / off for on, off in zip(speed["possible"], speed["off"], strict=True)]
    return {
        "base_speed_with_adapters_possible": statistics.median(ratios),
        "base_tokens_s": statistics.median(speed["possible"]),
    }


def batch() -> Figures:
    """A batch of a thousand requests while two workers, one gateway and the jobs service are killed."""
    rows = [{"custom_id": f"line-{n}", "method": "POST", "url": "/v1/chat/completions", "body": {
        "model": MODEL, "messages": [{"role": "user", "content": f"Say the number {n}."}], "max_tokens": 8}}
        for n in range(BATCH_LINES)]
    with real_stack(2) as up:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file = up.sdk.files.create(file=("batch.jsonl", content), purpose="batch")
        made = up.sdk.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        victims = {150: "worker", 300: "gateway", 450: "jobs", 600: "worker"}
        began = time.monotonic()
        while True:
            now = up.sdk.with_options(max_retries=10).batches.retrieve(made.id)
            done = now.request_counts.completed
            for at in [at for at in victims if done >= at]:
                pid = up.engine_pids()[0] if victims[at] == "worker" else up.program_pid(victims[at])
                print(f"{done} done: kill -9 {victims.pop(at)}", flush=True)
                os.kill(pid, signal.SIGKILL)
            if now.status in ("completed", "failed", "expired", "cancelled"):
                break
            assert time.monotonic() - began < 1200, now
            time.sleep(0.5)
        assert not victims, victims
        lines = [json.loads(line) for line in up.sdk.files.content(now.output_file_id).text.splitlines()]
        ids = Counter(line["custom_id"] for line in lines)
        time.sleep(1)
        billed = Counter(record["request_id"] for record in map(json.loads, up.records())
                         if record["batch"] and record["outcome"] == "ok")
        print(f"{len(lines)} results, {time.monotonic() - began:.0f} s, {now.request_counts}", flush=True)
        return {
            "batch_results": float(len(ids)), "batch_duplicates": float(sum(ids.values()) - len(ids)),
            "batch_billed_twice": float(sum(count - 1 for count in billed.values())), "batch_s": time.monotonic() - began,
        }


def interactive() -> Figures:
    """The 95th percentile of interactive TTFT while a batch runs ÷ without one, in alternating minutes."""
    rng = random.Random(time.time_ns())
    ttft: dict[str, list[float]] = {"alone": [], "beside": []}
    with real_stack(1) as up:
        rows = [{"custom_id": f"l{n}", "method": "POST", "url": "/v1/chat/completions", "body": {
            "model": MODEL, "messages": [{"role": "user", "content": f"Tell me a story about the number {n}."}], "max_tokens": 32}}
            for n in range(5000)]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file = up.sdk.files.create(file=("batch.jsonl", content), purpose="batch")
        for turn in range(6):
            kind = ("alone", "beside")[turn % 2]
            made = None
            if kind == "beside":
                made = up.sdk.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
                wait_for(lambda m=made: up.sdk.batches.retrieve(m.id).request_counts.completed > 5, "a batch at work", 60)
            for number in range(45):
                began = time.perf_counter()
                stream = up.sdk.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": f"{rng.random()} What is the sea?"}], max_tokens=16,
                    stream=True, extra_headers={"cache-control": "no-store"})
                first = None
                for part in stream:
                    if first is None and part.choices and part.choices[0].delta.content:
                        first = time.perf_counter() - began
                if number >= 5 and first is not None:
                    ttft[kind].append(first)
                time.sleep(rng.expovariate(2.0))
            if made is not None:
                done = up.sdk.batches.cancel(made.id)
                wait_for(lambda m=made: up.sdk.batches.retrieve(m.id).status == "cancelled", "cancelled", 60)
                print(f"batch: {done.request_counts.completed} done", flush=True)
            p95 = statistics.quantiles(ttft[kind], n=20)[-1]
            print(f"{kind}: p50 {statistics.median(ttft[kind]) * 1e3:.0f} ms, p95 {p95 * 1e3:.0f} ms", flush=True)
    p95s = {kind: statistics.quantiles(values, n=20)[-1] for kind, values in ttft.items()}
    return {
        "interactive_ttft_ratio": p95s["beside"] / p95s["alone"], "interactive_ttft_p95_alone_ms": p95s["alone"] * 1e3,
        "interactive_ttft_p50_ratio": statistics.median(ttft["beside"]) / statistics.median(ttft["alone"]),
    }


GROUPS = {
    "tuning": tuning, "resume": resume, "training_speed": training_speed, "base_speed": base_speed, "batch": batch,
    "interactive": interactive,
}
