"""The real stack under load, a real Prometheus that scrapes it: every panel has data, alerts come, lines are whole."""

import asyncio
import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client import CollectorRegistry, generate_latest

from common.records import Record
from monitoring.boards import BOARDS
from services.ledger.metrics import MAX_KEYS, LedgerMetrics
from services.local.plan import ROOT
from tests.harness import free_ports, wait_for
from tests.load import Load, start_batch
from tests.prometheus import Prometheus, empty_queries, running
from tests.up import MODEL, Up

missing = [name for name in ("prometheus", "prometheus-redis-exporter", "prometheus-nginx-exporter", "gcc") if not shutil.which(name)]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not on PATH: {', '.join(missing)}")
LOAD_S = 70.0
NEEDS_GPU = [board for board in BOARDS if board.needs == "an NVIDIA GPU"]
NEEDS_NOTHING = [board for board in BOARDS if not board.needs]


class Watched:
    """A `make up` with a price and traces, its Prometheus, and one that sees a GPU that is none."""

    def __init__(self, up: Up, prometheus: Prometheus, gpus: Prometheus, load: Load, spans: list[dict]) -> None:
        self.up, self.prometheus, self.gpus, self.load, self.spans = up, prometheus, gpus, load, spans


@contextlib.contextmanager
def span_collector() -> Iterator[tuple[str, list[dict]]]:
    """A server that takes OTLP over HTTP: its address, and the spans it was sent."""
    spans: list[dict] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            for resource in sent.resource_spans:
                service = {a.key: a.value.string_value for a in resource.resource.attributes}.get("service.name")
                for scope in resource.scope_spans:
                    spans.extend({
                        "service": service, "name": span.name, "trace": span.trace_id.hex(), "id": span.span_id.hex(),
                        "parent": span.parent_span_id.hex(), "attributes": {a.key: str(a.value) for a in span.attributes},
                    } for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", free_ports(1)[0]), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("observability")
    state = folder / "state"
    state.mkdir()
    if (ROOT / ".state/models").exists():  # spares unpacking it again
        (state / "models").symlink_to(ROOT / ".state/models")
    print("\nstarting the stack", flush=True)
    stacked = contextlib.ExitStack()
    collector, spans = stacked.enter_context(span_collector())
    up = Up(state, workers=1, HOURLY_USD="1.5", BUDGET_USD="5000", OTLP_TRACES_ENDPOINT=collector)
    exporter = None
    try:
        config = up.scraped()
        prometheus = Prometheus(f"http://{up.target('prometheus')}")
        port = free_ports(1)[0]
        exporter = fake_gpus(folder, port)
        for job in config["scrape_configs"]:
            if job["job_name"] == "gpu_exporter":
                job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
        gpu_folder = folder / "gpus"
        gpu_folder.mkdir()
        with running(gpu_folder, config) as gpus:
            load = Load(up.base, up.key, MODEL)
            start_batch(up.sdk, MODEL)
            print(f"{LOAD_S:g} s of load", flush=True)
            asyncio.run(load.run(LOAD_S))
            time.sleep(6)  # the last scrape
            yield Watched(up, prometheus, gpus, load, spans)
    finally:
        if exporter is not None:
            exporter.terminate()
        up.launcher.send_signal(signal.SIGINT)
        up.launcher.wait(60)
        stacked.close()


def fake_gpus(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """The real exporter with a driver that is none: two GPUs, one of them divided, energy that grows."""
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(ROOT / "tests/fake_nvml.c")], check=True)
    (folder / "nvml").write_text("devices 2\nmig1 2\nreasons0 4\nviolation_1_0 5000000000\nxid0 79\n")
    env = os.environ | {"FAKE_NVML": str(folder / "nvml"), "LD_LIBRARY_PATH": str(folder)}
    return subprocess.Popen([sys.executable, "-m", "services.gpu_exporter", "--port", str(port)], cwd=ROOT, env=env,
                            stdout=open(folder / "gpu.log", "w"), stderr=subprocess.STDOUT)


def test_everything_is_scraped(watched: Watched) -> None:
    targets = watched.prometheus.get("targets")["activeTargets"]
    assert {target["labels"]["job"] for target in targets} == {
        "gateway", "worker", "jobs", "ledger", "trainer", "gpu_exporter", "nginx", "redis", "prometheus"}
    assert [target["scrapeUrl"] for target in targets if target["health"] != "up"] == []
    assert watched.load.failed == 0


def test_every_panel_has_data(watched: Watched) -> None:
    wait_for(lambda: not empty_queries(watched.prometheus, NEEDS_NOTHING), "data in every panel", 90) \
        if empty_queries(watched.prometheus, NEEDS_NOTHING) else None
    assert empty_queries(watched.prometheus, NEEDS_NOTHING) == []


def test_every_gpu_panel_has_data_from_the_exporter(watched: Watched) -> None:
    assert NEEDS_GPU
    assert empty_queries(watched.gpus, NEEDS_GPU) == []


def test_the_numbers_are_those_of_the_load(watched: Watched) -> None:
    decided = watched.prometheus.value("sum(gateway_decisions_total)")
    assert decided == pytest.approx(watched.load.asked, rel=0.02)
    key = watched.up.key.split("_")[1]
    tokens = watched.prometheus.value(f'sum(owngpt_key_tokens_total{{key="{key}",kind="completion"}})')
    engine = watched.prometheus.value("sum(vllm:generation_tokens_total)")
    memory = watched.prometheus.value('sum(owngpt_tokens_total{job="gateway",kind="completion"})')
    assert memory > 0
    assert tokens == pytest.approx(engine + memory, rel=0.05)  # of cancelled streams an estimate
    status = httpx.get(watched.up.base + "/v1/status", headers={"authorization": f"Bearer {watched.up.key}"}).json()
    assert status["cost"]["usd_per_hour"] == 1.5
    assert 0 < status["cost"]["month_usd"] < 1
    assert status["cost"]["budget_left_usd"] == pytest.approx(5000, abs=1)


def test_a_request_leads_from_a_metric_to_its_line(watched: Watched) -> None:
    name = "gen_ai_server_time_to_first_token_seconds_bucket"
    found = watched.prometheus.get("query_exemplars", query=name, start=time.time() - 300, end=time.time())
    ids = {exemplar["labels"]["request_id"] for series in found for exemplar in series["exemplars"]}
    lines = [json.loads(line) for line in (watched.up.state / "logs/worker-1.log").read_text().splitlines() if line.startswith("{")]
    by_id = {line.get("request_id"): line for line in lines if line.get("event") == "request"}
    assert ids
    assert ids <= set(by_id)
    finished = [by_id[request_id] for request_id in ids if by_id[request_id]["outcome"] == "ok"]
    line = finished[0]
    # What the engine finished, it says the times of.
    assert [entry for entry in by_id.values() if entry["outcome"] == "ok" and entry["queue_s"] is None] == []
    for field in ("ts", "level", "service", "key", "worker", "model", "decision_s", "ttft_s", "queue_s", "prefill_s", "decode_s",
                  "duration_s", "prompt_tokens", "cached_tokens", "completion_tokens", "outcome"):
        assert line[field] not in (None, ""), (field, line)
    assert line["queue_s"] + line["prefill_s"] <= line["ttft_s"] + 0.1
    assert line["ttft_s"] + line["decode_s"] == pytest.approx(line["duration_s"], abs=0.2)


def test_a_request_is_one_trace_from_gateway_to_engine(watched: Watched) -> None:
    mine = "a" * 31 + "b"
    answer = httpx.post(watched.up.base + "/v1/chat/completions", timeout=60, headers={
        "authorization": f"Bearer {watched.up.key}", "traceparent": f"00-{mine}-{'c' * 16}-01", "cache-control": "no-store",
    }, json={"model": MODEL, "messages": [{"role": "user", "content": "Trace me."}], "max_tokens": 4})
    assert answer.status_code == 200

    def own() -> list[dict]:
        return [span for span in watched.spans if span["trace"] == mine]

    wait_for(lambda: {span["service"] for span in own()} == {"gateway", "worker"}, "both spans", 20)
    gateway = next(span for span in own() if span["service"] == "gateway")
    engine = next(span for span in own() if span["name"] == "llm_request")
    assert gateway["parent"] == "c" * 16  # the client's own trace goes on
    assert engine["parent"] == gateway["id"]
    assert answer.headers["x-request-id"] in gateway["attributes"]["owngpt.request_id"]
    assert "gen_ai.latency.time_in_queue" in engine["attributes"]
    assert "Trace me" not in json.dumps(watched.spans)
    line = next(json.loads(text) for text in (watched.up.state / "logs/worker-1.log").read_text().splitlines()
                if answer.headers["x-request-id"] in text)
    assert line["trace_id"] == mine


def test_top_shows_it_in_the_terminal(watched: Watched) -> None:
    shown = subprocess.run([sys.executable, "-m", "services.local", "top", "--once"], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"STATE_DIR": str(watched.up.state), "COLUMNS": "160"}, check=True).stdout
    for expected in ("1 ready", "tokens/s", "last minute", "worker-1-", "KV blocks", "CPU", "$1.50/h", "budget left"):
        assert expected in shown, shown
    quiet = subprocess.run([sys.executable, "-m", "services.local", "top", "--once"], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"STATE_DIR": "/nonexistent"}, check=False)
    assert quiet.returncode == 1
    assert "make up" in quiet.stderr
    assert "Traceback" not in quiet.stderr


def test_no_line_holds_a_prompt_or_an_answer(watched: Watched) -> None:
    for log in (watched.up.state / "logs").glob("*.log"):
        text = log.read_text(errors="replace")
        for secret in ("patient assistant", "Question 0.", "Once upon", "Count to", watched.up.key):
            assert secret not in text, (log.name, secret)


def test_every_line_of_our_services_is_json(watched: Watched) -> None:
    for name in ("gateway", "jobs", "ledger", "gpu_exporter", "trainer", "worker-1"):
        lines = (watched.up.state / f"logs/{name}.log").read_text().splitlines()
        plain = [line for line in lines if line.strip() and not line.startswith("{")]
        # What Python's warnings and torch print on their own is not ours to shape.
        assert [line for line in plain if re.match(r"(\(\w+ pid=\d+\) )?(DEBUG|INFO|WARNING|ERROR)", line)] == [], name
        assert len(plain) <= 0.1 * len(lines) + 10, (name, plain[:5])


def test_series_are_bounded(watched: Watched) -> None:
    """What one worker costs Prometheus, and what a hundred keys do (docs/observability.md states both)."""
    worker = watched.prometheus.value('count({job="worker"})')
    assert worker <= 1500, worker
    for job, most in (("gateway", 120), ("jobs", 60), ("ledger", 60), ("trainer", 80), ("gpu_exporter", 60)):
        assert watched.prometheus.value(f'count({{job="{job}"}})') <= most, job

    def series(keys: int) -> int:
        registry = CollectorRegistry()
        metrics = LedgerMetrics(registry)
        metrics.count(Record(id="x", request_id="r", key=f"k{n}", model="m", route="chat", worker="w", started_at=0) for n in range(keys))
        return sum(not line.startswith(b"#") for line in generate_latest(registry).splitlines())

    assert series(100) - series(0) == 400
    assert series(10 * MAX_KEYS) == series(MAX_KEYS + 1)


def test_a_killed_worker_is_told_of(watched: Watched) -> None:
    os.kill(watched.up.engine_pids()[0], signal.SIGKILL)
    killed = time.monotonic()
    wait_for(lambda: watched.prometheus.alerts().get("WorkerLost") == "firing", "WorkerLost firing", 30)
    print(f"firing {time.monotonic() - killed:.1f} s after the kill", flush=True)
    wait_for(lambda: "NoWorkerReady" in watched.prometheus.alerts(), "NoWorkerReady pending", 30)

    def alerts() -> list:
        headers = {"authorization": f"Bearer {watched.up.key}"}
        return httpx.get(watched.up.base + "/v1/status", headers=headers).json()["alerts"]

    wait_for(lambda: "WorkerLost" in [alert["name"] for alert in alerts()], "the alert in the status", 10)
    wait_for(lambda: watched.up.ready() == 1, "the worker back", 120)
