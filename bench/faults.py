"""The figures of what goes wrong: killed, full, slow, in any order. Real processes; scripted workers where a fault needs one.

    make bench-faults       (batch: root, for a small disk of its own; else its disk is never full)
"""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
from hypothesis.stateful import run_state_machine_as_test
from loguru import logger

from bench import fuzz as fuzzing
from bench.features import first_and_second
from bench.lifecycle import DATA
from bench.stack import Figures, real_stack, workshop
from services.jobs.checks import run_check
from services.local.plan import ROOT
from tests.containers import composed
from tests.harness import Stack, body, running, wait_for
from tests.life_cycle import STEPS, BatchLife, JobLife, profile
from tests.up import MODEL, started

BOUNDS = {
    "lifecycle_steps": ">= 20000",
    "lifecycle_broken": "0",
    "batch_results": "1000",
    "batch_duplicates": "0",
    "redis_full_answered": "1.0",
    "redis_slow_failed": "0",
    "redis_slow_p99_ms": "<= 150",
    "slow_reader_added_s": "<= 0.1",
    "jobs_peak_mb": "<= 400",
    "first_logprobs_ratio": "<= 2",
    "feature_deaths": "0",
    "feature_first_ratio": "<= 5",
    "restore_equal": "1",
    "fuzz_cases": ">= 20000",
    "fuzz_5xx": "0",
    "fuzz_authz": "0",
}
WANTED_STEPS = 20_000
STEPS_AN_EXAMPLE = 60
SLOW_S = 60.0
DELAY_S = 0.1
RATE = 10.0
FUZZ_EXAMPLES = 180
"""Of each operation that should be taken; each is asked with a key and without, and half as many that should not."""
CHAT = "/v1/chat/completions"


def lifecycle() -> Figures:
    """Batches and jobs as state machines until so many steps were tried."""
    logger.remove()
    broken = 0
    with workshop() as folder, running(folder) as floor:
        BatchLife.floor = floor
        while STEPS.total() < WANTED_STEPS and not broken:
            for machine in (BatchLife, JobLife):
                try:
                    run_state_machine_as_test(machine, settings=profile(50, STEPS_AN_EXAMPLE))
                except (Exception, BaseExceptionGroup) as error:
                    print(error)
                    broken += 1
            print(dict(STEPS), flush=True)
    return {"lifecycle_steps": float(STEPS.total()), "lifecycle_broken": float(broken)}


def seconds(stack: Stack, count: int, every_s: float) -> tuple[list[float], int]:
    """(seconds of each answered request, how many failed), asked one after the other at a rate."""
    took, failed = [], 0
    with stack.client() as client:
        for number in range(count):
            began = time.perf_counter()
            try:
                answer = client.post(CHAT, json=body("say 1", seed=number))
                failed += answer.status_code != 200
                took.append(time.perf_counter() - began)
            except httpx.HTTPError:
                failed += 1
            time.sleep(max(0.0, every_s - (time.perf_counter() - began)))
    return took, failed


def redis_full() -> Figures:
    """The share of requests that are answered while the state redis takes nothing any more."""
    with workshop() as folder, running(folder, redis_maxmemory="12mb") as stack:
        for name in ("w1", "w2"):
            stack.add_worker(name)
        seconds(stack, 10, 0.0)
        redis, number = stack.redis(), 0
        with contextlib.suppress(Exception):
            while True:
                redis.set(f"key:fill{number}", "x" * 20_000)
                number += 1
        time.sleep(5)  # longer than any heartbeat lives
        took, failed = seconds(stack, 200, 0.02)
        print(f"{number} keys of 20 kB; {len(took)} answers, {failed} failed", flush=True)
        return {"redis_full_answered": (200 - failed) / 200}


@contextlib.contextmanager
def slow_redis(stack: Stack) -> Iterator[None]:
    """Every message to the state redis takes DELAY_S longer."""
    real, shown = stack.dials.run_dir / "real.sock", stack.dials.run_dir / "redis.sock"
    shown.rename(real)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await asyncio.sleep(delay_s)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(str(real))
        await asyncio.gather(carry(reader, back, DELAY_S), carry(there, writer, 0.0))

    async def serve() -> None:
        async with await asyncio.start_unix_server(accept, str(shown)) as server:
            up.set()
            with contextlib.suppress(asyncio.CancelledError):
                await server.serve_forever()

    up, loop = threading.Event(), asyncio.new_event_loop()
    task = loop.create_task(serve())
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.gather(task, return_exceptions=True)))
    thread.start()
    up.wait()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(5)


def redis_slow() -> Figures:
    """Failures and the added 99th percentile while each command to the state redis takes 100 ms, for a minute."""
    with workshop() as folder, running(folder) as stack:
        stack.add_worker("w1")
        seconds(stack, 20, 0.0)
        direct, _ = seconds(stack, int(SLOW_S * RATE), 1 / RATE)
        with slow_redis(stack):
            stack.kill("w1")
            stack.kill("gateway")
            stack.start_gateway()
            wait_for(lambda: httpx.get(stack.base + "/health").status_code == 200, "the gateway", 30)
            stack.add_worker("w2")
            slow, failed = seconds(stack, int(SLOW_S * RATE), 1 / RATE)
        p99s = [statistics.quantiles(found, n=100)[-1] * 1e3 for found in (direct, slow)]
        print(f"p99 {p99s[0]:.1f} ms, with a slow redis {p99s[1]:.1f} ms; {failed} failed", flush=True)
        return {"redis_slow_failed": float(failed), "redis_slow_p99_ms": p99s[1] - p99s[0]}


def slow_reader() -> Figures:
    """How much longer others wait for the answer to a question whose first asker reads nothing."""
    added = []
    with workshop() as folder, running(folder) as stack:
        stack.add_worker("w1")

        def ask(script: str) -> float:
            began = time.perf_counter()
            assert stack.chat(script, temperature=0, stream=True).status_code == 200
            return time.perf_counter() - began

        for turn in range(5):
            took = {}
            for kind in ("read", "unread"):
                script = f"say 2000 {kind} {turn}"
                with stack.client() as client, client.stream("POST", CHAT, json=body(script, temperature=0, stream=True)) as first:
                    reading = threading.Thread(target=first.read) if kind == "read" else None
                    if reading:
                        reading.start()
                    with concurrent.futures.ThreadPoolExecutor(3) as pool:
                        took[kind] = statistics.median(pool.map(ask, [script] * 3))
                    if reading:
                        reading.join()
                    else:
                        first.read()
            added.append(took["unread"] - took["read"])
            print({kind: round(value, 3) for kind, value in took.items()}, flush=True)
    return {"slow_reader_added_s": statistics.median(added)}


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own, where that is allowed."""
    place = folder / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=False, capture_output=True)
    if mounted.returncode:
        print("no small disk here: its being full is left out", flush=True)
    try:
        yield place
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "-l", str(place)], check=True)


def batch() -> Figures:
    """1,000 lines; a slow worker, one that dies in the middle of a body, a disk that is full for a while, two kills of the jobs service."""
    os.environ["HOLD_BACK_S"] = "60"  # the default; tests have no time for it
    with workshop() as folder, small_disk(folder, "6m") as disk, running(folder) as stack:
        def start() -> None:
            stack.spawn("jobs", [sys.executable, "-m", "services.jobs", "--port", str(stack.ports.jobs)], stack.env("jobs") | {
                "GATEWAY_URL": f"http://127.0.0.1:{stack.ports.inner}", "FILES_DIR": str(disk / "files"),
                "DATABASE_URL": f"sqlite:///{disk}/jobs.db", "MIN_FREE_BYTES": "0"})
            wait_for(lambda: httpx.get(f"http://127.0.0.1:{stack.ports.jobs}/health").status_code == 200, "the jobs service", 30)

        for name in ("w1", "w2", "w3"):
            stack.add_worker(name)
        start()
        sdk = openai.OpenAI(base_url=stack.base + "/v1", api_key=stack.key, max_retries=8)
        scripts = ["die" if n == 300 else f"slow 0.2 {n}" if n % 5 == 0 else f"say {n % 7 + 1}" for n in range(1000)]
        rows = [{"custom_id": f"c{n}", "method": "POST", "url": CHAT, "body": body(script)} for n, script in enumerate(scripts)]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file = sdk.files.create(file=("in.jsonl", content), purpose="batch")
        made = sdk.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")  # type: ignore[arg-type]
        dead: set[str] = set()
        left, began = {150: "kill", 350: "kill", 600: "full"}, time.monotonic()
        while (now := sdk.batches.retrieve(made.id)).status not in ("completed", "failed", "expired", "cancelled"):
            counts = now.request_counts
            done = counts.completed + counts.failed if counts else 0
            for at in [at for at in left if done >= at]:
                what = left.pop(at)
                print(f"{done} done: {what}", flush=True)
                if what == "kill":
                    stack.kill("jobs")
                    start()
                else:
                    with contextlib.suppress(OSError):
                        (disk / "ballast").write_bytes(b"x" * min(shutil.disk_usage(disk).free, 8_000_000))
                    time.sleep(3)
                    (disk / "ballast").unlink()
            for name in [n for n, p in stack.running.items() if n.startswith("w") and p.poll() is not None and n not in dead]:
                dead.add(name)  # its supervisor starts it again
                stack.add_worker(f"w{3 + len(dead)}")
            assert time.monotonic() - began < 600, now
            time.sleep(0.1)
        assert not left, left
        lines = [json.loads(line)["custom_id"] for each in (now.output_file_id, now.error_file_id) if each
                 for line in sdk.files.content(each).text.splitlines()]
        billed = Counter(record["request_id"] for record in stack.records() if record["batch"] and record["outcome"] == "ok"
                         and record["key"] == stack.record.id)
        print(f"{now.status}: {now.request_counts}, {time.monotonic() - began:.0f} s", flush=True)
        return {"batch_results": float(len(set(lines))), "batch_duplicates": float(len(lines) - len(set(lines))),
                "batch_billed_twice": float(sum(count - 1 for count in billed.values())), "batch_s": time.monotonic() - began}


def jobs_peak() -> Figures:
    """The most memory that checking a file takes, in a process of its own: the worst that are accepted, and refused."""
    peaks = {}
    with workshop() as folder:
        for name, line, count in (
            ("a million rows", '{{"question": "{n} is what?", "answer": "{n}"}}\n', 999_999),
            ("half a gigabyte of mistakes", "{{}}\n", 170_000_000),
            ("half a gigabyte of rows", '{{"question": "{n}?", "answer": "{n}"}}\n', 12_000_000),
        ):
            path = folder / "rows.jsonl"
            with open(path, "w", buffering=1 << 20) as file:
                for start in range(0, count, 100_000):
                    file.write("".join(line.format(n=n) for n in range(start, min(count, start + 100_000))))
                    if file.tell() > 512 * 1024 * 1024:
                        break
            seen: list[float] = []
            stop = threading.Event()

            def watch(seen: list[float] = seen, stop: threading.Event = stop) -> None:
                while not stop.wait(0.05):
                    for pid in subprocess.run(["pgrep", "-f", "services.jobs.check"], capture_output=True, text=True, check=False).stdout.split():
                        with contextlib.suppress(OSError, ValueError):
                            status = Path(f"/proc/{pid}/status").read_text()
                            seen.append(int(status.split("VmHWM:")[1].split()[0]) / 1024)

            watching = threading.Thread(target=watch)
            watching.start()
            report = asyncio.run(run_check([path]))
            stop.set()
            watching.join()
            peaks[name] = max(seen)
            print(f"{name}: {path.stat().st_size / 1e6:.0f} MB, {peaks[name]:.0f} MB of memory, {len(report['problems'])} problems", flush=True)
    return {"jobs_peak_mb": max(peaks.values())}


def first_logprobs() -> Figures:
    """The first request with logprobs on a fresh engine ÷ the second."""
    with real_stack(1, KV_TIER="off") as up:
        up.ask("Warm up.")
        took = []
        for number in range(2):
            began = time.perf_counter()
            up.sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": f"Say {number}."}], max_tokens=8,
                                           logprobs=True, top_logprobs=3, extra_headers={"cache-control": "no-store"})
            took.append(time.perf_counter() - began)
        print([round(value, 3) for value in took], flush=True)
        return {"first_logprobs_ratio": took[0] / took[1]}


def fuzz() -> Figures:
    """Every public route out of the OpenAPI document, before a real engine."""
    with real_stack(1) as up:
        made = fuzzing.make_things(up.base, up.key, MODEL)
        found = fuzzing.trespass(up.base, up.key, up.add_key("other"), made)
        found.add(fuzzing.fuzz(up.base, up.key, MODEL, FUZZ_EXAMPLES))
        print(dict(found.statuses), *found.server_errors[:20], *found.holes[:20], sep="\n", flush=True)
        return {"fuzz_cases": float(found.cases), "fuzz_5xx": float(len(found.server_errors)), "fuzz_authz": float(len(found.holes))}


def container() -> Figures:
    """Every feature, asked twice of a fresh container without a compiler; an adapter that is trained there among them."""
    with composed() as sdk:
        rows = b"".join(DATA.read_bytes().splitlines(keepends=True)[:20])
        file = sdk.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
        job = sdk.fine_tuning.jobs.create(model=MODEL, training_file=file.id, suffix="boxed", hyperparameters={"n_epochs": 1})
        wait_for(lambda: sdk.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"), "the job's end", 400)
        adapter = sdk.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
        assert adapter, "no adapter to ask"
        before = worker_of(sdk)
        took = first_and_second(sdk, MODEL, adapter)
        return {"feature_deaths": float(worker_of(sdk) != before),
                "feature_first_ratio": max(first / second for first, second in took.values())}


def worker_of(sdk: openai.OpenAI) -> str:
    """The life of the worker that answers."""
    raw = sdk.completions.with_raw_response.create(model=MODEL, prompt="x", max_tokens=1)
    return raw.headers["x-owngpt-worker"]


def restore() -> Figures:
    """Whether what clients see is the same after backup and restore into an empty place, the tuned model answering."""
    with workshop() as folder:
        (folder / "first").mkdir()
        archive = folder / "backup.tar.gz"
        with started(folder / "first", 1) as up:
            made = fuzzing.make_things(up.base, up.key, MODEL)
            for number in range(20):
                up.ask(f"Say {number}.", max_tokens=2)
            wait_for(lambda: up.sdk.fine_tuning.jobs.retrieve(made["job_id"]).status == "succeeded", "the job's end", 400)
            wait_for(lambda: up.sdk.batches.retrieve(made["batch_id"]).status == "completed", "the batch's end", 60)
            time.sleep(3)  # usage is added up
            before, state = up.kept(), up.state
            subprocess.run([sys.executable, "-m", "services.local", "backup", str(archive)], cwd=ROOT, check=True,
                           env=os.environ | {"STATE_DIR": str(state)})
        again = folder / "again/state"
        subprocess.run([sys.executable, "-m", "services.local", "restore", str(archive)], cwd=ROOT, check=True,
                       env=os.environ | {"STATE_DIR": str(again)})
        with started(folder / "again", 1) as up:
            model = before["jobs"][0]["fine_tuned_model"]
            wait_for(lambda: model in [one.id for one in up.sdk.models.list()], "the tuned model", 60)
            same = up.kept() == before
            up.ask("?", model=model)
            print({kind: len(things) for kind, things in before.items()}, "equal" if same else "NOT EQUAL", flush=True)
        return {"restore_equal": float(same)}


GROUPS = {
    "lifecycle": lifecycle, "redis_full": redis_full, "redis_slow": redis_slow, "slow_reader": slow_reader, "batch": batch,
    "jobs_peak": jobs_peak, "first_logprobs": first_logprobs, "fuzz": fuzz,
    "container": container,
    "restore": restore,
}
