"""The figures of the caches: KV blocks in redis between two real workers, and answers from memory.

Requests whose worker matters go to that worker directly; everything else through nginx. What is compared takes turns
within one run, and medians count. Prompts are random tokens, so nothing is shared by chance.
"""

import concurrent.futures
import contextlib
import os
import random
import re
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import httpx
from redis import Redis
from redis.exceptions import RedisError

from bench.stack import ANSWER, CLIENT, STATIC_MOCK, WRK, Figures, cpu_s, nginx, real_stack, stack_with_mock, workshop
from services.local.plan import Dials
from tests.harness import free_ports, wait_for
from tests.up import MODEL, Up

BOUNDS = {
    "ttft_remote_vs_recompute": "<= 0.125",
    "ttft_remote_vs_local": "<= 1.5 aimed at",
    "ttft_restart_vs_recompute": "<= 0.125",
    "texts_differ": "0",
    "throughput_on_vs_off": ">= 0.95",
    "cache_loss_failed": "0",
    "cache_loss_wrong": "0",
    "bytes_vs_raw": "<= 1.02",
    "answer_hit_vs_real": "<= 0.02",
    "uncacheable_cpu_on_vs_off": "<= 1.05",
}
RAW_BYTES_PER_TOKEN = 2 * 30 * 3 * 64 * 2
"""K and V, layers, KV heads, head size, bytes of bfloat16: SmolLM2-135M."""
BLOCK_TOKENS = 128
ROUNDS = 10
SETTLE_S = 1.5
"""After a prompt was read, before anybody fetches it: its last blocks are on their way, and the kernel tidies up."""


class Worker:
    """One worker of a stack, asked directly."""

    def __init__(self, up: Up, pid: int) -> None:
        self.pid = pid
        port = Path(f"/proc/{pid}/cmdline").read_text().split("--port\0")[1].split("\0")[0]
        token = (up.state / "secrets/gateway/worker_token").read_text().strip()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120,
                                 headers={"authorization": f"Bearer {token}"})

    def ttft_s(self, prompt: list[int]) -> float:
        """Seconds to the first byte of a one-token answer."""
        began, first = time.perf_counter(), 0.0
        with self.http.stream("POST", "/v1/completions", json=question(prompt, max_tokens=1, stream=True)) as response:
            for _ in response.iter_raw():
                first = first or time.perf_counter() - began
        assert response.status_code == 200
        return first

    def text(self, prompt: list[int], **more: object) -> str:
        """A greedy answer."""
        answer = self.http.post("/v1/completions", json=question(prompt, **more))
        return str(answer.raise_for_status().json()["choices"][0]["text"])

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        found = re.findall(rf"^{re.escape(name)}\{{([^}}]*)\}} (\S+)$", self.http.get("/metrics").text, re.M)
        return sum(float(value) for text, value in found if all(f'{k}="{v}"' in text for k, v in labels.items()))


def question(prompt: list[int], **more: object) -> dict[str, object]:
    """A greedy completion of token ids."""
    return {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 16, "ignore_eos": True, **more}


def random_prompt(tokens: int, rng: random.Random) -> list[int]:
    """Tokens nobody has read."""
    return [rng.randrange(1000, 40000) for _ in range(tokens)]


def workers_of(up: Up) -> list[Worker]:
    """Its workers, by port."""
    return sorted((Worker(up, pid) for pid in up.engine_pids()), key=lambda worker: worker.http.base_url.port or 0)


def sharing() -> Figures:
    """TTFT by where the blocks are, before and after a restart: one stack of two workers."""
    rng = random.Random(time.time_ns())
    with real_stack(2, CACHE_MAXMEMORY="4gb") as up:
        found, prompts, recompute_a = ttft(up, rng)
        return found | restart(up, prompts, recompute_a)


def ttft(up: Up, rng: random.Random) -> tuple[Figures, list[list[int]], list[float]]:
    """Recompute on B, read on A, fetch on B, hit on B's own cache: in turns, for three lengths."""
    a, b = workers_of(up)
    found: Figures = {}
    kept: list[list[int]] = []
    recompute_a: list[float] = []
    for tokens, rounds in ((800, 3), (1600, 3), (3200, ROUNDS)):
        seconds: dict[str, list[float]] = {"recompute": [], "remote": [], "local": []}
        for _ in range(rounds):
            prompt = random_prompt(tokens, rng)
            seconds["recompute"].append(b.ttft_s(random_prompt(tokens, rng)))
            read = a.ttft_s(prompt)
            time.sleep(SETTLE_S)
            loaded = kv_blocks([b], "loaded")
            seconds["remote"].append(b.ttft_s(prompt))
            seconds["local"].append(b.ttft_s(prompt))
            fetched = kv_blocks([b], "loaded") - loaded
            print(f"{tokens} tokens  recompute {seconds['recompute'][-1]:.3f} s  remote {seconds['remote'][-1]:.3f} "
                  f"({fetched:.0f} blocks)  local {seconds['local'][-1]:.3f}", flush=True)
            assert fetched == (tokens - 1) // BLOCK_TOKENS, "the prompt did not come from redis"
            if tokens == 3200:
                kept.append(prompt)
                recompute_a.append(read)
        for name, values in seconds.items():
            found[f"ttft_{name}_{tokens}_s"] = statistics.median(values)
    remote = found["ttft_remote_3200_s"]
    return found | {
        "ttft_remote_vs_recompute": remote / found["ttft_recompute_3200_s"],
        "ttft_remote_vs_local": remote / found["ttft_local_3200_s"],
    }, kept, recompute_a


def texts() -> Figures:
    """200 prompts of mixed lengths whose blocks A has computed and B has not: eight texts, each cut at 25 places.

    vLLM on a CPU is not batch invariant: which requests share a step can change a greedy text. So they are asked twice:
    16 at a time on both workers, with A asked a second time to know how many texts differ without any redis; and one at
    a time on each worker, where every difference counts. Lengths are 512 k + r with r up to a block: then a hit and a
    recomputation end in steps of the same shape (--max-num-batched-tokens 512), and must say the same.
    """
    rng = random.Random(time.time_ns())
    with real_stack(2, CACHE_MAXMEMORY="4gb", VLLM_SERVER_DEV_MODE="1") as up:  # /reset_prefix_cache
        a, b = workers_of(up)
        documents = [random_prompt(3200, rng) for _ in range(8)]
        for number, document in enumerate(documents, 1):
            a.ttft_s(document)
            print(f"A has read {number} of {len(documents)} texts", flush=True)
        time.sleep(SETTLE_S)
        prompts = [document[: 512 * steps + rng.randrange(1, BLOCK_TOKENS + 1)]
                   for document in documents for steps in (2, 3, 4, 5, 6) for _ in range(5)]
        rng.shuffle(prompts)
        here, there = at_once({a: 16, b: 16}, prompts)
        loaded, stored = kv_blocks([b], "loaded"), kv_blocks((a, b), "stored")
        stored_bytes = sum(w.metric("owngpt_kv_bytes_total", direction="stored") for w in (a, b))
        again, = at_once({a: 16}, prompts)
        alone_here, alone_there = at_once({a: 1, b: 1}, prompts)
        found = {
            "texts_compared": float(len(prompts)),
            "texts_differ": differing(alone_here, alone_there),
            "texts_differ_16_at_once": differing(here, there),
            "texts_differ_16_at_once_locally": differing(here, again),
            "texts_blocks_loaded": loaded,
            "bytes_vs_raw": stored_bytes / (stored * BLOCK_TOKENS * RAW_BYTES_PER_TOKEN),
        }
        print(found, flush=True)
        return found


def at_once(load: dict[Worker, int], prompts: list[list[int]]) -> list[list[str]]:
    """The texts of each worker, each asked so many at a time, all workers at once."""
    with contextlib.ExitStack() as stacked:
        pools = [(w, stacked.enter_context(concurrent.futures.ThreadPoolExecutor(n))) for w, n in load.items()]
        futures = [[pool.submit(worker.text, prompt) for prompt in prompts] for worker, pool in pools]
        return [[future.result() for future in each] for each in futures]


def differing(ones: list[str], others: list[str]) -> float:
    """How many texts differ."""
    return float(sum(one != other for one, other in zip(ones, others, strict=True)))


FAULTS = ("kill", "garbage", "freeze", "kill", "garbage", "flush")
BETWEEN_FAULTS_S = 14.0


def faults() -> Figures:
    """Failed requests and wrong texts while redis-cache comes and goes, one request at a time on each worker.

    Prompts are short, so that many are asked, and before every second one a worker forgets what it holds itself, so that
    redis is asked. A fault may leave any part of a prompt to be computed, so only prompts count whose text does not
    depend on that (`steady`): vLLM on a CPU is not batch invariant.
    """
    with real_stack(2, VLLM_SERVER_DEV_MODE="1") as up:  # /reset_prefix_cache
        return cache_loss(up)


def cache_loss(up: Up) -> Figures:
    """The figures of a running stack."""
    rng = random.Random(time.time_ns())
    a, b = workers_of(up)
    candidates = [copying_prompt(BLOCK_TOKENS * rng.randrange(4, 9) + rng.randrange(1, BLOCK_TOKENS + 1), rng)
                  for _ in range(24)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found_steady = pool.map(steady, [a, b] * 12, candidates)
        steady_texts = [(prompt, text) for prompt, text in zip(candidates, found_steady, strict=True) if text is not None]
    prompts, expected = [list(each) for each in zip(*steady_texts, strict=True)]
    print(f"{len(prompts)} of {len(candidates)} prompts have one text however they are computed", flush=True)
    stop = threading.Event()
    counts = {"asked": 0, "failed": 0, "wrong": 0}
    lock = threading.Lock()

    def client(worker: Worker, rng: random.Random) -> None:
        while not stop.is_set():
            at, fresh = rng.randrange(len(prompts)), rng.random() < 0.1
            failed = wrong = False
            try:
                if rng.random() < 0.5:
                    worker.http.post("/reset_prefix_cache?reset_external=true").raise_for_status()
                said = worker.text(random_prompt(300, rng) if fresh else prompts[at])
                wrong = not fresh and said != expected[at]
            except httpx.HTTPError:
                failed = True
            with lock:
                counts["asked"] += 1
                counts["failed"] += failed
                counts["wrong"] += wrong

    before = {result: kv_blocks((a, b), result) for result in ("loaded", "foreign")}
    clients = [threading.Thread(target=client, args=(worker, random.Random(n))) for n, worker in enumerate((a, b))]
    for thread in clients:
        thread.start()
    try:
        acl = up.state / "secrets/redis/cache.acl"
        acl.write_text(acl.read_text() + "user admin on nopass ~* &* +@all\n")  # gone with the next start
        for fault in (*FAULTS, ""):
            time.sleep(BETWEEN_FAULTS_S)
            if fault:
                print(f"redis-cache: {fault}  {counts}, {kv_blocks((a, b), 'loaded') - before['loaded']:.0f} blocks "
                      "fetched", flush=True)
                inflict(up, fault)
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    found = counts | {result: int(kv_blocks((a, b), result) - count) for result, count in before.items()}
    print(found, flush=True)
    return {f"cache_loss_{name}": float(value) for name, value in found.items()}


def copying_prompt(tokens: int, rng: random.Random) -> list[int]:
    """Random tokens whose last 48 repeat an earlier place: what follows there, in one block of many, is the answer."""
    body = random_prompt(tokens - 48, rng)
    at = rng.randrange(len(body) - 64)
    return body + body[at : at + 48]


def steady(worker: Worker, prompt: list[int]) -> str | None:
    """The prompt's greedy text, if it is the same computed whole and after one, two and three blocks; else None."""
    said = set()
    for blocks in range(4):
        salt = {"cache_salt": f"{random.random()}"}
        if blocks:
            worker.text(prompt[: BLOCK_TOKENS * blocks + 1], max_tokens=1, **salt)
        said.add(worker.text(prompt, **salt))
    return said.pop() if len(said) == 1 else None


def kv_blocks(workers: Iterable[Worker], result: str) -> float:
    """Blocks with this fate, on all workers."""
    return sum(worker.metric("owngpt_kv_blocks_total", result=result) for worker in workers)


def inflict(up: Up, fault: str) -> None:
    """One fault of redis-cache; whoever supervises it brings it back."""
    sock = Dials(up.state).cache_redis_url
    pid = int(subprocess.run(["pgrep", "-f", f"redis-server.*{sock[7:-5]}|redis-server unixsocket:{sock[7:-5]}"],
                             capture_output=True, text=True, check=True).stdout.split()[0])
    if fault == "kill":
        os.kill(pid, signal.SIGKILL)
    elif fault == "freeze":
        os.kill(pid, signal.SIGSTOP)
        time.sleep(4)
        os.kill(pid, signal.SIGCONT)
    else:
        admin = Redis.from_url(sock, username="admin", password="x")
        wait_for(lambda: admin.ping(), "redis-cache back")
        if fault == "flush":
            admin.flushall()
            return
        names = list(admin.scan_iter(match="*", count=1000))
        for name in names:
            with contextlib.suppress(RedisError):
                admin.set(name, os.urandom(admin.strlen(name)), keepttl=True)
        print(f"{len(names)} values overwritten", flush=True)


def restart(up: Up, prompts: list[list[int]], recompute_s: list[float]) -> Figures:
    """TTFT on A, restarted, of prompts that its former life has read."""
    a = workers_of(up)[0]
    fields = Path(f"/proc/{a.pid}/stat").read_text().rsplit(")", 1)[1].split()
    os.kill(int(fields[1]), signal.SIGTERM)  # its agent
    wait_for(lambda: up.ready() == 1, "worker A gone", 40)
    print("waiting for worker A to come back", flush=True)
    wait_for(lambda: up.ready() == 2, "worker A back", 200)
    seconds = []
    for prompt in prompts:
        time.sleep(SETTLE_S)
        before = kv_blocks([a], "loaded")
        seconds.append(a.ttft_s(prompt))
        fetched = kv_blocks([a], "loaded") - before
        print(f"restarted A: {seconds[-1]:.3f} s ({fetched:.0f} blocks)", flush=True)
        assert fetched == (len(prompt) - 1) // BLOCK_TOKENS, "the prompt did not come from redis"
    return {
        "ttft_restart_3200_s": statistics.median(seconds),
        "ttft_restart_vs_recompute": statistics.median(seconds) / statistics.median(recompute_s),
    }


def throughput() -> Figures:
    """Tokens per second at 16 concurrent without shared prefixes: two stacks of one worker, in turns."""
    rng = random.Random(time.time_ns())
    speed: dict[str, list[float]] = {"redis": [], "off": []}
    with contextlib.ExitStack() as stacked:
        ups = {tier: stacked.enter_context(real_stack(1, KV_TIER=tier)) for tier in speed}
        workers = {tier: workers_of(up)[0] for tier, up in ups.items()}
        for turn in range(2 * ROUNDS + 1):
            for tier in sorted(speed, reverse=bool(turn % 2)):
                prompts = [random_prompt(300, rng) for _ in range(16)]
                began = time.perf_counter()
                with concurrent.futures.ThreadPoolExecutor(16) as pool:
                    for answer in pool.map(lambda p, w=workers[tier]: w.http.post(
                            "/v1/completions", json=question(p, max_tokens=64)), prompts):
                        answer.raise_for_status()
                rate = 16 * 64 / (time.perf_counter() - began)
                if turn:  # the first turn warms up
                    speed[tier].append(rate)
                    print(f"tier {tier:5s} {rate:6.1f} tokens/s", flush=True)
    ratios = [on / off for on, off in zip(speed["redis"], speed["off"], strict=True)]
    return {
        "throughput_on_vs_off": statistics.median(ratios),
        "throughput_on_tokens_s": statistics.median(speed["redis"]),
        "throughput_off_tokens_s": statistics.median(speed["off"]),
    }


def answers() -> Figures:
    """An answer from memory against the real one of 64 tokens, through nginx."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me about the sea."}],
            "temperature": 0, "max_tokens": 64, "ignore_eos": True}
    seconds: dict[str, list[float]] = {"hit": [], "bypass": []}
    with real_stack(1) as up, httpx.Client(
        base_url=up.base, headers={"authorization": f"Bearer {up.key}"}, timeout=120
    ) as http:
        http.post("/v1/chat/completions", json=body).raise_for_status()
        time.sleep(0.5)
        for _ in range(2 * ROUNDS):
            for wanted, headers in (("hit", {}), ("bypass", {"cache-control": "no-store"})):
                began = time.perf_counter()
                answer = http.post("/v1/chat/completions", json=body, headers=headers)
                seconds[wanted].append(time.perf_counter() - began)
                assert answer.headers["x-owngpt-cache"] == wanted
    hit, real = (statistics.median(seconds[name]) for name in ("hit", "bypass"))
    print(f"hit {hit * 1e3:.2f} ms, real {real * 1e3:.0f} ms", flush=True)
    return {"answer_hit_vs_real": hit / real, "answer_hit_ms": hit * 1e3, "answer_real_ms": real * 1e3}


def uncacheable() -> Figures:
    """CPU of nginx and gateway for a request that may not be answered from memory, answer cache on and off."""
    cost: dict[str, list[float]] = {"on": [], "off": []}
    before = os.environ.get("ANSWER_CACHE")
    with workshop() as folder, contextlib.ExitStack() as stacked:
        mock = free_ports(1)[0]
        stacked.enter_context(nginx("mock", STATIC_MOCK, folder, CLIENT, port=mock, answer=ANSWER))
        stacks = {}
        for state in cost:
            (folder / state).mkdir()
            os.environ["ANSWER_CACHE"] = state
            stacks[state] = stacked.enter_context(stack_with_mock(folder / state, mock))
        os.environ.pop("ANSWER_CACHE")
        if before is not None:
            os.environ["ANSWER_CACHE"] = before
        for turn in range(ROUNDS):
            for state in sorted(cost, reverse=bool(turn % 2)):
                ours = stacks[state]
                script = folder / f"{state}.lua"
                script.write_text(WRK.replace("KEY", ours.key))
                pids = [ours.running[name].pid for name in ("nginx", "gateway")]
                used = cpu_s(pids)
                out = subprocess.run([*CLIENT, "wrk", "-t1", "-c50", "-d3s", "-s", str(script),
                                      ours.base + "/v1/chat/completions"], capture_output=True, text=True, check=True).stdout
                assert "Non-2xx" not in out, out
                requests = int(re.search(r"(\d+) requests in", out)[1])  # type: ignore[index]
                cost[state].append((cpu_s(pids) - used) / requests * 1e6)
                print(f"answer cache {state:3s} {cost[state][-1]:.1f} us of CPU a request", flush=True)
    ratios = [on / off for on, off in zip(cost["on"], cost["off"], strict=True)]
    return {"uncacheable_cpu_on_vs_off": statistics.median(ratios), "uncacheable_cpu_on_us": statistics.median(cost["on"])}


GROUPS = {"sharing": sharing, "texts": texts, "faults": faults, "throughput": throughput, "answers": answers, "uncacheable": uncacheable}
