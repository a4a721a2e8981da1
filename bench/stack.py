"""The figures of the stack: CPU per streamed chunk, requests per second, added latency, failover.

Servers under test are pinned to core 0, mock and client to core 1; what is compared runs in turns within one run,
and the median of the rounds counts; of what drifts with the machine, the median of each round's ratio. CPU is the
time the servers' threads ran, from /proc.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import openai
from loguru import logger

from bench import peers
from bench.mock_upstream import CHUNK
from common.aliases import Alias
from common.metering.metered import Metering
from common.redis.names import ALIASES, CHANNEL_ALIASES, CHANNEL_WORKERS, HEARTBEAT_TTL_MS, WORKERS, worker_key
from common.workers import Heartbeat, Model
from gateway.arrival import Arrival
from gateway.steps import start
from services.local.configs import find_nginx
from services.local.plan import ROOT
from tests.harness import Stack, free_ports, running, wait_for
from tests.test_decision import Bench
from tests.up import MODEL, Up, started

BOUNDS = {
    "stream_cpu_vs_nginx_64": "<= 1.05",
    "stream_cpu_vs_nginx_400": "<= 1.10",
    "stream_cpu_deterministic_vs_nginx_64": "<= 1.15",
    "stream_cpu_alias_vs_nginx_64": "<= 1.15",
    "stream_cpu_vs_vllm_router": "< 1.0",
    "decision_1000_vs_2": "<= 1.5",
    "metering_us_per_chunk": "<= 2",
    "rps_vs_litellm": ">= 100",
    "rps_vs_vllm_router": ">= 1.0",
    "ttfb_added_p50_ms": "<= 0.6",
    "ttfb_added_p99_ms": "<= 3",
    "tokens_vs_direct": ">= 0.98",
    "kill9_failed": "0",
}
ROUNDS = 3
STREAM_ROUNDS = 7
STREAM_S = 8.0
IDLE_S = 6.0
CHUNKS = 200
CLIENT = ["taskset", "-c", "1"]

Figures = dict[str, float]


# --- what runs ------------------------------------------------------------------------------------

def cpu_s(pids: list[int]) -> float:
    """CPU seconds used so far by the threads of processes and of their children, to the nanosecond."""
    total_ns, waiting = 0, list(pids)
    while waiting:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{waiting.pop()}/task").iterdir():
                total_ns += int((task / "schedstat").read_text().split()[0])
                waiting += map(int, (task / "children").read_text().split())
    return total_ns / 1e9


@contextlib.contextmanager
def process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is gone afterwards."""
    with open(log, "ab") as out:
        running_ = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    try:
        yield running_
    finally:
        running_.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            running_.wait(5)


@contextlib.contextmanager
def stack_with_mock(folder: Path, upstream: int) -> Iterator[Stack]:
    """The stack pinned to core 0, with the mock registered as its worker."""
    with running(folder, prefix=peers.PIN, worker_ports=[upstream]) as stack:
        stopped = threading.Event()
        beat = msgspec.json.encode(Heartbeat(
            "mock", f"127.0.0.1:{upstream}", "ready", [Model("mock", 8192, revision="r")], slots=64, keeps=True)).decode()
        alias = msgspec.json.encode(Alias("alias", "bench", "mock", "")).decode()
        stack.redis("jobs").hset(ALIASES, "alias", alias)
        stack.redis("jobs").publish(CHANNEL_ALIASES, alias)

        def announce() -> None:
            redis = stack.redis("worker")
            while not stopped.wait(0.5):
                redis.set(worker_key("mock"), beat, px=HEARTBEAT_TTL_MS)
                redis.sadd(WORKERS, "mock")
                redis.publish(CHANNEL_WORKERS, beat)

        thread = threading.Thread(target=announce)
        thread.start()
        try:
            wait_for(lambda: stack.ready_count() == 1, "mock known")
            yield stack
        finally:
            stopped.set()
            thread.join()


NGINX_HEAD = """\
worker_processes 1; daemon off; pid {folder}/{name}.pid; error_log stderr warn;
events {{ worker_connections 8192; }}
http {{ access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; keepalive_requests 100000000;
"""
PLAIN_PROXY = NGINX_HEAD + """\
upstream mock {{ server 127.0.0.1:{upstream}; keepalive 64; }}
server {{ listen 127.0.0.1:{port}; location / {{ proxy_http_version 1.1; proxy_set_header Connection "";
proxy_buffering off; proxy_pass http://mock; }} }} }}
"""
STATIC_MOCK = NGINX_HEAD + """\
server {{ listen 127.0.0.1:{port}; location / {{ default_type application/json; return 200 '{answer}'; }} }} }}
"""
ANSWER = json.dumps({
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "mock",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello world"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
})


@contextlib.contextmanager
def nginx(name: str, template: str, folder: Path, pin: list[str], **values: object) -> Iterator[subprocess.Popen[bytes]]:
    """A bare nginx with one of the two configurations above."""
    config = folder / f"{name}.conf"
    config.write_text(template.format(folder=folder, name=name, **values))
    command = [*pin, find_nginx(), "-p", str(folder), "-e", "stderr", "-c", str(config)]
    with process(command, folder / f"{name}.log") as running_:
        time.sleep(0.5)
        yield running_


@contextlib.contextmanager
def workshop() -> Iterator[Path]:
    """A folder for one group."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        yield Path(folder)


# --- the figures ----------------------------------------------------------------------------------

def metering() -> Figures:
    """CPU the middleware adds per chunk: the same chunks through the same app, with it and without it."""
    count = 20_000

    async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for _ in range(count):
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    class Silent:
        def begin(self, _: object) -> None: ...
        def end(self, _: object) -> None: ...

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b'{"model":"m","stream":true}'}

    async def send(_: object) -> None: ...

    scope = {"type": "http", "path": "/v1/chat/completions", "method": "POST", "headers": []}
    wrapped = Metering(app, Silent(), "w")  # type: ignore[arg-type]

    def timed(target: object) -> float:
        began = time.process_time()
        asyncio.run(target(scope, receive, send))  # type: ignore[operator]
        return (time.process_time() - began) / count * 1e6

    added = [timed(wrapped) - timed(app) for _ in range(7)]
    return {"metering_us_per_chunk": statistics.median(added)}


def decision() -> Figures:
    """Microseconds of one decision, alone: 2 workers with one model, 1,000 workers with 50 models each."""
    def path(workers: int, models: int) -> Callable[[], float]:
        names = tuple(f"m{i}" for i in range(models))
        bench = Bench(Path(tempfile.mkdtemp(prefix="bench-")), workers=workers, models=names)
        headers = {b"authorization": f"Bearer {bench.key}".encode(), b"x-request-id": b"0123456789abcdef"}
        body = json.dumps({"model": names[-1], "messages": [{"role": "user", "content": "hello there, how are you?"}]}).encode()

        def timed(count: int = 20_000) -> float:
            began = time.process_time()
            for _ in range(count):
                start(bench.path.decide(Arrival("POST", "/v1/chat/completions", headers, body, from_nginx=True)))
            return (time.process_time() - began) / count * 1e6

        return timed

    logger.disable("common")  # a line for each worker that joins
    small, large = path(2, 1), path(1000, 50)
    few, many = zip(*((small(), large()) for _ in range(7)), strict=True)
    print(f"2 workers {statistics.median(few):.2f} us, 1,000 workers of 50 models {statistics.median(many):.2f} us", flush=True)
    return {"decision_1000_vs_2": statistics.median(many) / statistics.median(few), "decision_us": statistics.median(few)}


def streams() -> Figures:
    """CPU microseconds per chunk: nginx alone, the stack, vllm-router; 64 and 400 streams.

    Marginal: without what the stack's processes take when nobody asks (heartbeats heard, workers tended), which does not
    grow with the chunks; on a virtual machine whose core is busy elsewhere a wake-up of an idle process is dear.
    """
    found: dict[tuple[str, int], list[float]] = {}
    idle: list[float] = []
    with workshop() as folder:
        mock, plain, router = free_ports(3)
        for count, interval_s in ((64, 0.01), (400, 0.05)):
            mock_command = [*CLIENT, sys.executable, "-m", "bench.mock_upstream", str(mock), str(CHUNKS), str(interval_s)]
            with contextlib.ExitStack() as stacked:
                stacked.enter_context(process(mock_command, folder / "mock.log"))
                time.sleep(1)
                alone = stacked.enter_context(nginx("plain", PLAIN_PROXY, folder, peers.PIN, upstream=mock, port=plain))
                state = folder / f"stack-{count}"
                state.mkdir()
                ours = stacked.enter_context(stack_with_mock(state, mock))
                rival = peers.vllm_router(router, f"http://127.0.0.1:{mock}", folder / "router.log")
                stacked.callback(rival.terminate)
                own = [ours.running[n].pid for n in ("nginx", "gateway")]
                targets: dict[str, tuple[str, list[int], dict[str, object]]] = {
                    "nginx": (f"http://127.0.0.1:{plain}", [alone.pid], {}),
                    "stack": (ours.base, own, {}),
                    "router": (f"http://127.0.0.1:{router}", [rival.pid], {}),
                }
                before = cpu_s(own)
                time.sleep(IDLE_S)
                idle.append((cpu_s(own) - before) / IDLE_S)
                if count == 64:
                    targets["deterministic"] = (ours.base, own, {"temperature": 0})
                    targets["alias"] = (ours.base, own, {"model": "alias"})
                for _ in range(STREAM_ROUNDS):
                    for name, (url, pids, fields) in targets.items():
                        before = cpu_s(pids)
                        done = subprocess.run(
                            [*CLIENT, sys.executable, "-m", "bench.streams", url, ours.key, "mock", str(count), str(STREAM_S),
                             json.dumps(fields)],
                            cwd=ROOT, capture_output=True, text=True, check=True)
                        result = json.loads(done.stdout)
                        assert result["failed"] == 0, f"{name}: {result} {done.stderr[:300]}"
                        used_s = cpu_s(pids) - before
                        cost_us = used_s / result["chunks"] * 1e6
                        found.setdefault((name, count), []).append(cost_us)
                        if pids == own:
                            marginal_us = (used_s - idle[-1] * result["seconds"]) / result["chunks"] * 1e6
                            found.setdefault((f"{name}, marginal", count), []).append(marginal_us)
                        print(f"{count:4d} streams  {name:7s} {cost_us:6.2f} us/chunk  {result['chunks']} chunks", flush=True)
    def ratio(name: str, count: int, to: str = "nginx") -> float:
        return statistics.median(a / b for a, b in zip(found[name, count], found[to, count], strict=True))

    medians = {key: statistics.median(values) for key, values in found.items()}
    return {
        "stream_cpu_vs_nginx_64": ratio("stack", 64),
        "stream_cpu_vs_nginx_400": ratio("stack", 400),
        "stack_idle_ms_per_s": statistics.mean(idle) * 1e3,
        **{f"stream_cpu_marginal_{name}_vs_nginx_{count}": ratio(f"{name}, marginal", count)
           for name, count in (("stack", 64), ("stack", 400), ("deterministic", 64), ("alias", 64))},
        "stream_cpu_deterministic_vs_nginx_64": ratio("deterministic", 64),
        "stream_cpu_alias_vs_nginx_64": ratio("alias", 64),
        "stream_cpu_vs_vllm_router": max(ratio("stack", n, "router") for n in (64, 400)),
        "stream_cpu_nginx_64_us": medians["nginx", 64], "stream_cpu_stack_64_us": medians["stack", 64],
        "stream_cpu_router_64_us": medians["router", 64], "stream_cpu_nginx_400_us": medians["nginx", 400],
        "stream_cpu_stack_400_us": medians["stack", 400], "stream_cpu_router_400_us": medians["router", 400],
    }


WRK = """\
wrk.method = "POST"
wrk.body = '{"model":"mock","messages":[{"role":"user","content":"hello there, how are you today?"}],"max_tokens":16}'
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer KEY"
"""


def rps() -> Figures:
    """Requests per second of servers confined to one core, non-stream, keys checked (vllm-router has none)."""
    found: dict[str, list[float]] = {}
    with workshop() as folder, contextlib.ExitStack() as stacked:
        mock, router, lite = free_ports(3)
        stacked.enter_context(nginx("mock", STATIC_MOCK, folder, CLIENT, port=mock, answer=ANSWER))
        (folder / "stack").mkdir()
        ours = stacked.enter_context(stack_with_mock(folder / "stack", mock))
        rival = peers.vllm_router(router, f"http://127.0.0.1:{mock}", folder / "router.log")
        stacked.callback(rival.terminate)
        proxy = peers.litellm(lite, f"http://127.0.0.1:{mock}", "sk-bench", folder)
        stacked.callback(proxy.terminate)
        targets = {"stack": (ours.base, ours.key), "router": (f"http://127.0.0.1:{router}", "x"),
                   "litellm": (f"http://127.0.0.1:{lite}", "sk-bench")}
        for _ in range(ROUNDS):
            for name, (url, key) in targets.items():
                script = folder / f"{name}.lua"
                script.write_text(WRK.replace("KEY", key))
                out = subprocess.run([*CLIENT, "wrk", "-t1", "-c50", "-d8s", "--timeout", "30s", "-s", str(script),
                                      url + "/v1/chat/completions"], capture_output=True, text=True, check=True).stdout
                assert "Non-2xx" not in out, f"{name}: {out}"
                rate = float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1])  # type: ignore[index]
                found.setdefault(name, []).append(rate)
                print(f"{name:8s} {rate:9.0f} requests/s", flush=True)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "rps_vs_litellm": medians["stack"] / medians["litellm"],
        "rps_vs_vllm_router": medians["stack"] / medians["router"],
        "rps_stack": medians["stack"], "rps_vllm_router": medians["router"], "rps_litellm": medians["litellm"],
    }


def ttfb() -> Figures:
    """Time to first byte added at 50 requests per second, open loop: through the stack minus to the mock."""
    async def first_byte_ms(port: int, key: str) -> float:
        body = b'{"model":"mock","messages":[{"role":"user","content":"hi"}]}'
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.perf_counter()
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n"
                     b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (key.encode(), len(body), body))
        first = await reader.read(65536)
        took = (time.perf_counter() - began) * 1e3
        writer.close()
        assert b" 200 " in first.split(b"\r\n")[0], first
        return took

    async def load(port: int, key: str, seconds: float) -> list[float]:
        began, tasks = time.perf_counter(), []
        for number in range(int(50 * seconds)):
            await asyncio.sleep(max(0.0, began + number / 50 - time.perf_counter()))
            tasks.append(asyncio.create_task(first_byte_ms(port, key)))
        return list(await asyncio.gather(*tasks))

    found: dict[str, list[float]] = {"stack": [], "direct": []}
    with workshop() as folder, contextlib.ExitStack() as stacked:
        mock, = free_ports(1)
        stacked.enter_context(nginx("mock", STATIC_MOCK, folder, CLIENT, port=mock, answer=ANSWER))
        (folder / "stack").mkdir()
        ours = stacked.enter_context(stack_with_mock(folder / "stack", mock))
        for _ in range(ROUNDS):
            for name, port in (("direct", mock), ("stack", ours.port)):
                found[name] += asyncio.run(load(port, ours.key, 8))
    p50 = {name: statistics.median(values) for name, values in found.items()}
    p99 = {name: statistics.quantiles(values, n=100)[98] for name, values in found.items()}
    print(f"p50 {p50}  p99 {p99} ms", flush=True)
    return {"ttfb_added_p50_ms": p50["stack"] - p50["direct"], "ttfb_added_p99_ms": p99["stack"] - p99["direct"]}


@contextlib.contextmanager
def real_stack(workers: int, **dials: str) -> Iterator[Up]:
    """`make up` with real vLLM; `dials` are its environment variables."""
    with workshop() as folder, started(folder, workers, **dials) as up:
        yield up


def tokens() -> Figures:
    """Tokens per second of real vLLM at 32 concurrent streams: through the stack ÷ the same worker directly."""
    async def once(base: str, key: str, salt: int) -> float:
        async with openai.AsyncOpenAI(base_url=base, api_key=key, timeout=300, max_retries=0) as client:
            async def one(number: int) -> int:
                stream = await client.completions.create(
                    model=MODEL, prompt=f"{salt} {number} Once upon a time", max_tokens=64, temperature=0, stream=True,
                    stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
                    extra_headers={"cache-control": "no-store"})  # the fast path: answers to keep go through the relay
                return sum([part.usage.completion_tokens async for part in stream if part.usage])

            began = time.perf_counter()
            made = await asyncio.gather(*[one(number) for number in range(32)])
            return sum(made) / (time.perf_counter() - began)

    found: dict[str, list[float]] = {"stack": [], "direct": []}
    with real_stack(1) as up:
        pid = up.engine_pids()[0]
        port = re.search(r"--port\0(\d+)", Path(f"/proc/{pid}/cmdline").read_text())[1]  # type: ignore[index]
        token = (up.state / "secrets/worker/worker_token").read_text().strip()
        targets = {"direct": (f"http://127.0.0.1:{port}/v1", token), "stack": (up.base + "/v1", up.key)}
        asyncio.run(once(*targets["direct"], salt=0))
        for salt in range(1, 16):
            for name in sorted(targets, reverse=bool(salt % 2)):
                found[name].append(asyncio.run(once(*targets[name], salt=salt * 2 + (name == "stack"))))
    print({name: [round(value) for value in values] for name, values in found.items()}, flush=True)
    return {"tokens_vs_direct": statistics.median(found["stack"]) / statistics.median(found["direct"]),
            "tokens_per_s_stack": statistics.median(found["stack"])}


def kill9() -> Figures:
    """Requests failed when one of two real workers is killed under load, non-stream."""
    with real_stack(2) as up, concurrent.futures.ThreadPoolExecutor(16) as pool:
        def ask(number: int) -> bool:
            with contextlib.suppress(openai.OpenAIError):
                return bool(up.ask(f"{number} Tell me a story.", max_tokens=32).choices)
            return False

        futures = [pool.submit(ask, number) for number in range(160)]
        time.sleep(4)
        os.kill(up.engine_pids()[0], signal.SIGKILL)
        outcomes = [future.result() for future in futures]
    print(f"{len(outcomes)} requests, {outcomes.count(False)} failed", flush=True)
    return {"kill9_failed": float(outcomes.count(False)), "kill9_requests": float(len(outcomes))}


GROUPS: dict[str, Callable[[], Figures]] = {
    "metering": metering, "decision": decision, "streams": streams, "rps": rps, "ttfb": ttfb, "tokens": tokens, "kill9": kill9,
}
