"""The figures of observability: do panels have data, are alerts tested and quick, what does watching cost.

    make bench-observability        (needs prometheus and its exporters, chromium, gcc on PATH)
"""

import asyncio
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

from bench import peers
from bench.stack import CLIENT, Figures, cpu_s, workshop
from services.local.plan import ROOT
from tests import prometheus as watching
from tests import test_alerts
from tests.harness import Stack, free_ports, running, wait_for
from tests.load import Load, start_batch
from tests.test_observability import LOAD_S, NEEDS_GPU, NEEDS_NOTHING, fake_gpus
from tests.up import MODEL, Up

BOUNDS = {
    "panels": "",
    "panels_with_data": "= panels",
    "alerts": "",
    "alerts_tested": "= alerts",
    "rps_on_vs_off": ">= 0.9",
    "alert_pending_s": "<= 30",
    "console_first_token_extra_s": "<= 1",
}
ROUNDS = 5
COST_ROUNDS = 11
"""Pairs of turns; the median of their ratios counts, for the machine's speed drifts by a tenth within minutes."""
REQUESTS_S = 5


def alerts() -> Figures:
    """Alerting rules, and those that fire and stay quiet in promtool as they should."""
    rules = sum(len(found) for found in test_alerts.alerts().values())
    passed = 0
    with tempfile.TemporaryDirectory() as folder:
        for case in test_alerts.CASES:
            test_alerts.promtool(Path(folder), case, case.fires, 1)
            test_alerts.promtool(Path(folder), case, case.quiet, 0)
            passed += 1
    test_alerts.test_every_alert_has_a_case_and_a_runbook()
    # The dead man's switch cannot stay quiet: it is no alert about anything.
    return {"alerts": rules - 1, "alerts_tested": passed}


def panels() -> Figures:
    """A real stack under load: panels with data, how long a killed worker takes to be told of, the console's share."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        state = folder / "state"
        state.mkdir()
        (state / "models").symlink_to(ROOT / ".state/models")
        up = Up(state, workers=1, HOURLY_USD="1.5", BUDGET_USD="5000")
        exporter = None
        try:
            config = up.scraped()
            jobs = {job["job_name"]: job for job in config["scrape_configs"]}
            prometheus = watching.Prometheus(f"http://{up.target('prometheus')}")
            port = free_ports(1)[0]
            exporter = fake_gpus(folder, port)
            jobs["gpu_exporter"]["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
            (folder / "gpus").mkdir()
            with watching.running(folder / "gpus", config) as gpus:
                start_batch(up.sdk, MODEL)
                asyncio.run(Load(up.base, up.key, MODEL).run(LOAD_S))
                time.sleep(30)
                empty = watching.empty_queries(prometheus, NEEDS_NOTHING) + watching.empty_queries(gpus, NEEDS_GPU)
            for row in empty:
                print("no data:", *row, flush=True)
            shown = [(board.uid, panel.title) for board in (*NEEDS_NOTHING, *NEEDS_GPU) for panel in board.panels()]
            extra = console(up)
            pending = [killed(up, prometheus) for _ in range(3)]
        finally:
            if exporter is not None:
                exporter.terminate()
            up.launcher.send_signal(signal.SIGINT)
            up.launcher.wait(60)
    return {
        "panels": len(shown), "panels_with_data": len(shown) - len({row[:2] for row in empty}),
        "alert_pending_s": statistics.median(pending), "console_first_token_extra_s": extra,
    }


def killed(up: Up, prometheus: watching.Prometheus) -> float:
    """Seconds from kill -9 of the only engine to an alert, pending or firing."""
    # The last one must be over: WorkerLost looks back five minutes.
    wait_for(lambda: up.ready() == 1 and "NoWorkerReady" not in prometheus.alerts(), "ready and quiet", 200)
    before = prometheus.value("sum(gateway_workers_lost_total)")
    os.kill(up.engine_pids()[0], signal.SIGKILL)
    began = time.monotonic()
    wait_for(lambda: prometheus.value("sum(gateway_workers_lost_total)") > before, "the loss counted", 60)
    wait_for(lambda: "NoWorkerReady" in prometheus.alerts(), "an alert", 60)
    took = time.monotonic() - began
    print(f"alert {took:.1f} s after the kill: {prometheus.alerts()}", flush=True)
    wait_for(lambda: up.ready() == 1, "the worker back", 200)
    return took


SENDS_AT_ONCE = """
addEventListener('DOMContentLoaded', () => new MutationObserver((_, seen) => {
  const question = document.getElementById('question');
  if (question?.offsetParent && document.getElementById('model').value && !window.sent) {
    window.sent = true;
    document.getElementById('max-tokens').value = 8;
    question.value = 'Say ' + Math.random();
    document.getElementById('ask').requestSubmit();
  }
  const text = document.querySelector('#messages .assistant .text');
  if (text?.textContent && !window.first) { window.first = performance.now(); seen.disconnect(); }
}).observe(document.documentElement, {subtree: true, childList: true, attributes: true, characterData: true}));
"""


def console(up: Up) -> float:
    """Seconds from first paint to first token of a page that asks as soon as it can, less the engine's TTFT."""
    extra = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for _ in range(ROUNDS + 2):
            context = browser.new_context()
            page = context.new_page()
            page.add_init_script(f"sessionStorage.setItem('api-key', '{up.key}');" + SENDS_AT_ONCE)
            seen = len(up.records())
            page.goto(up.base)
            wait_for(lambda page=page: page.evaluate("window.first ?? 0"), "a first token", 60)
            paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime "
                                  "?? performance.getEntriesByName('first-paint')[0].startTime")
            first = page.evaluate("window.first")
            wait_for(lambda seen=seen: len(up.records()) > seen, "a record")
            ttft_s = json.loads(up.records()[-1])["ttft_s"]
            extra.append((first - paint) / 1000 - ttft_s)
            print(f"console: paint {paint:.0f} ms, first token {first:.0f} ms, engine {ttft_s * 1e3:.0f} ms", flush=True)
            context.close()
        browser.close()
    return float(statistics.median(extra[2:]))  # the first two fill the browser's own caches


class Quiet(Stack):  # type: ignore[misc]
    """A stack without metrics and log lines."""

    def env(self, who: str) -> dict[str, str]:
        return dict(super().env(who)) | {"PYTHONPATH": f"{ROOT / 'bench/silent'}:{ROOT}"}


@contextmanager
def standing(kind: type[Stack], folder: Path) -> Iterator[Stack]:
    """A stack with one scripted worker, all on core 0."""
    folder.mkdir()
    with running(folder, kind, prefix=peers.PIN) as stack:
        stack.add_worker("w1")
        yield stack


WRK = """wrk.method = "POST"; wrk.headers["Authorization"] = "Bearer KEY"; wrk.headers["Content-Type"] = "application/json"
wrk.body = '{"model":"fake","messages":[{"role":"user","content":"say 3"}]}'"""


def cost() -> Figures:
    """Requests per CPU second of nginx, gateway and worker together: everything on, and metrics and lines off."""
    found: dict[str, list[float]] = {"on": [], "off": []}
    with workshop() as folder, standing(Stack, folder / "on") as loud, standing(Quiet, folder / "off") as quiet:
        for turn in range(COST_ROUNDS):
            for name, stack in (("on", loud), ("off", quiet))[:: 1 if turn % 2 else -1]:
                script = folder / f"{name}.lua"
                script.write_text(WRK.replace("KEY", stack.key))
                pids = [stack.running[part].pid for part in ("nginx", "gateway", "w1")]
                before = cpu_s(pids)
                out = subprocess.run([*CLIENT, "wrk", "-t1", "-c32", f"-d{REQUESTS_S}s", "-s", str(script),
                                      stack.base + "/v1/chat/completions"], capture_output=True, text=True, check=True).stdout
                assert "Non-2xx" not in out, out
                count = int(out.split(" requests in ")[0].split()[-1])
                found[name].append(count / (cpu_s(pids) - before))
                print(f"{name:4s} {found[name][-1]:8.0f} requests per CPU second", flush=True)
    ratios = [on / off for on, off in zip(found["on"], found["off"], strict=True)]
    return {"rps_on_vs_off": statistics.median(ratios), "rps_on": statistics.median(found["on"]),
            "rps_off": statistics.median(found["off"])}


GROUPS = {"alerts": alerts, "cost": cost, "panels": panels}
