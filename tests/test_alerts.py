"""Every alert fires when it should and stays quiet when it should not, in Prometheus's own rule engine (promtool)."""

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from monitoring.__main__ import generated
from monitoring.slo import BURNS, SLOS
from services.local.plan import ROOT

RULES = sorted((ROOT / "monitoring/prometheus/rules").glob("*.yml"))
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH (Debian: prometheus)")


@dataclass
class Case:
    """Series that make an alert fire at a time, and series that do not (`interval` apart, promtool's notation)."""

    alert: str
    at: str
    fires: dict[str, str]
    quiet: dict[str, str]
    interval: str = "15s"
    labels: dict[str, str] = field(default_factory=dict)
    """Further labels of the alert, where several rules have its name."""


def burns() -> list[Case]:
    """Each window of each service level: a budget that burns twice as fast as the alert allows, and one at half."""
    found = []
    for slo in SLOS:
        for burn in BURNS:
            long_m = {"1h": 60, "6h": 360, "1d": 1440, "3d": 4320}[burn.long]
            wait_m = {"2m": 2, "15m": 15, "1h": 60, "3h": 180}[burn.for_]
            step_m = 1 if long_m <= 360 else 10
            count, end_m = (long_m + wait_m) // step_m + 20, long_m + wait_m + 10 * step_m

            def series(times: float, slo=slo, burn=burn, count=count) -> dict[str, str]:
                bad = min(1000 * burn.factor * (1 - slo.objective) * times, 999)
                if slo.name == "availability":
                    return {'gateway_decisions_total{result="fast"}': f"0+{1000 - bad:g}x{count}",
                            'gateway_decisions_total{result="503"}': f"0+{bad:g}x{count}",
                            'gateway_decisions_total{result="400"}': f"0+5000x{count}"}
                name = {"ttft": "gen_ai_server_time_to_first_token_seconds",
                        "tpot": "gen_ai_server_time_per_output_token_seconds"}[slo.name]
                le = {"ttft": "1.0", "tpot": "0.1"}[slo.name]
                return {f"{name}_count": f"0+1000x{count}", f'{name}_bucket{{le="{le}"}}': f"0+{1000 - bad:g}x{count}"}

            found.append(Case(slo.alert, f"{end_m}m", series(1.3), series(0.5), f"{step_m}m", {"window": burn.long}))
    return found


CASES = [
    *burns(),
    Case("NoWorkerReady", "3m", {'gateway_workers{state="ready"}': "1x4 0x20"}, {'gateway_workers{state="ready"}': "1x4 0x2 1x20"}),
    Case("WorkerLost", "6m", {"gateway_workers_lost_total": "0x20 1x20"}, {"gateway_workers_lost_total": "3x40"}),
    Case("EngineStalled", "5m",
         {'vllm:num_requests_running{instance="a",engine="0"}': "4x40",
          'vllm:iteration_tokens_total_count{instance="a",engine="0"}': "0+50x8 400x40"},
         {'vllm:num_requests_running{instance="a",engine="0"}': "4x40",
          'vllm:iteration_tokens_total_count{instance="a",engine="0"}': "0+50x40",
          'vllm:num_requests_running{instance="idle",engine="0"}': "0x40",
          'vllm:iteration_tokens_total_count{instance="idle",engine="0"}': "500x40"}),
    Case("QueueGrowing", "14m", {"vllm:num_requests_waiting": "0+1x80"}, {"vllm:num_requests_waiting": "40-0.5x80"}),
    Case("KvCachePressure", "8m", {"vllm:kv_cache_usage_perc": "0.97x40"}, {"vllm:kv_cache_usage_perc": "0.9x40"}),
    Case("Preemptions", "15m", {"vllm:num_preemptions_total": "0+3x80"}, {"vllm:num_preemptions_total": "0+3x10 30x70"}),
    Case("PrefixHitCollapse", "30h",
         {"vllm:prefix_cache_hits_total": "0+4000x290 1160000+100x100", "vllm:prefix_cache_queries_total": "0+60000x400"},
         {"vllm:prefix_cache_hits_total": "0+4000x400", "vllm:prefix_cache_queries_total": "0+60000x400"}, "5m"),
    Case("GpuUnreachable", "10m", {"gpu_nvml_up": "1x20 0x40"}, {"gpu_nvml_up": "0x60"}),
    Case("GpuDriverHangs", "5m", {"gpu_sample_age_seconds": "0+15x40"}, {"gpu_sample_age_seconds": "2x40"}),
    Case("GpuThrottled", "12m",
         {'gpu_throttle_seconds_total{gpu="0",reason="thermal"}': "0+3x60"},
         {'gpu_throttle_seconds_total{gpu="0",reason="power"}': "0+15x60", 'gpu_throttle_seconds_total{gpu="0",reason="thermal"}': "0+0.1x60"}),
    Case("GpuEccUncorrected", "6m", {'gpu_ecc_errors_total{gpu="0",type="uncorrected"}': "0x8 1x40"},
         {'gpu_ecc_errors_total{gpu="0",type="uncorrected"}': "7x40", 'gpu_ecc_errors_total{gpu="0",type="corrected"}': "0+1x40"}),
    Case("GpuRowRemapFailed", "1m", {'gpu_row_remap_failed{gpu="0"}': "1x10"}, {'gpu_row_remap_failed{gpu="0"}': "0x10"}),
    Case("GpuXid", "15m", {'gpu_xid_errors_total{gpu="0",xid="79"}': "_x40 1x40"}, {'gpu_xid_errors_total{gpu="0",xid="79"}': "1x80"}),
    Case("RedisDown", "5m", {'redis_up{instance="redis"}': "1x4 0x40"}, {'redis_up{instance="redis"}': "1x4 0x2 1x40"}),
    Case("RedisMemory", "8m",
         {'redis_memory_used_bytes{instance="redis"}': "95x40", 'redis_memory_max_bytes{instance="redis"}': "100x40"},
         {'redis_memory_used_bytes{instance="redis"}': "50x40", 'redis_memory_max_bytes{instance="redis"}': "100x40",
          'redis_memory_used_bytes{instance="redis-cache"}': "99x40", 'redis_memory_max_bytes{instance="redis-cache"}': "100x40"}),
    Case("RedisNotPersisting", "3m", {'redis_aof_last_write_status{instance="redis"}': "0x40"},
         {'redis_aof_last_write_status{instance="redis"}': "1x40", 'redis_aof_last_write_status{instance="redis-cache"}': "0x40"}),
    Case("DiskFilling", "7h", {'host_disk_free_bytes{folder="/"}': "250-2x100", 'host_disk_total_bytes{folder="/"}': "1000x100"},
         {'host_disk_free_bytes{folder="/"}': "250-0.1x100", 'host_disk_total_bytes{folder="/"}': "1000x100"}, "5m"),
    Case("HostMemory", "8m", {"host_memory_used_bytes": "97x40", "host_memory_total_bytes": "100x40"},
         {"host_memory_used_bytes": "90x40", "host_memory_total_bytes": "100x40"}),
    Case("UsageBehind", "6m", {"owngpt_ledger_last_read_timestamp_seconds": "0x40"},
         {"owngpt_ledger_last_read_timestamp_seconds": "0+15x40"}),
    Case("UsageRecordsDropped", "6m", {"owngpt_usage_records_dropped": "0x8 5x40"}, {"owngpt_usage_records_dropped": "5x40"}),
    Case("UsageRecordsDropped", "6m", {"owngpt_ledger_lost_records": "0x8 30x40"}, {"owngpt_ledger_lost_records": "0x40"}),
    Case("BudgetBurn", "15m", {"owngpt_cost_month_forecast_usd": "6000x80", "owngpt_budget_month_usd": "5000x80"},
         {"owngpt_cost_month_forecast_usd": "6000x80", "owngpt_budget_month_usd": "0x80"}),
    Case("BudgetSpent", "1m", {"owngpt_cost_month_usd": "4600x20", "owngpt_budget_month_usd": "5000x20"},
         {"owngpt_cost_month_usd": "4400x20", "owngpt_budget_month_usd": "5000x20"}),
    Case("FineTuningFailed", "70m", {'owngpt_training_jobs_total{status="failed"}': "_x200 1x100"},
         {'owngpt_training_jobs_total{status="failed"}': "1x300", 'owngpt_training_jobs_total{status="succeeded"}': "_x200 1x100"}),
    Case("BackgroundWorkFailing", "20m", {'owngpt_background_failures_total{what="tending"}': "0+1x120"},
         {'owngpt_background_failures_total{what="tending"}': "0x30 1x90"}),
    Case("FineTuningStalled", "25m", {"owngpt_training_running": "1x120", "owngpt_training_step": "7x120"},
         {"owngpt_training_running": "1x120", "owngpt_training_step": "0+1x120"}),
    Case("BatchesFailing", "10m",
         {'owngpt_batch_lines_total{result="failed"}': "0+1x60", 'owngpt_batch_lines_total{result="completed"}': "0+2x60"},
         {'owngpt_batch_lines_total{result="failed"}': "0+1x60", 'owngpt_batch_lines_total{result="completed"}': "0+20x60"}),
    Case("BatchesStalled", "50m",
         {'owngpt_batch_lines_waiting{instance="j"}': "9x250", 'owngpt_batch_lines_total{instance="j",result="completed"}': "4x250"},
         {'owngpt_batch_lines_waiting{instance="j"}': "9x250", 'owngpt_batch_lines_total{instance="j",result="completed"}': "0+1x250"}),
    Case("TargetDown", "4m", {'up{job="jobs"}': "1x4 0x40"}, {'up{job="jobs"}': "1x40", 'up{job="worker"}': "0x40"}),
    Case("WorkerUnscraped", "6m", {'up{job="worker"}': "1x4 0x40"}, {'up{job="worker"}': "1x4 0x8 1x40"}),
    Case("GatewayMissing", "3m", {'up{job="jobs"}': "1x40"}, {'up{job="gateway"}': "0x40"}),
    Case("TooManySeries", "8m", {"scrape_samples_scraped": "30000x40"}, {"scrape_samples_scraped": "900x40"}),
]  # fmt: skip
ALWAYS = "Watchdog"


def alerts() -> dict[str, list[dict]]:
    """Every alerting rule by name."""
    found: dict[str, list[dict]] = {}
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    found.setdefault(rule["alert"], []).append(rule)
    return found


def promtool(folder: Path, case: Case, series: dict[str, str], expected: int) -> None:
    labels = "".join(f',{name}="{value}"' for name, value in case.labels.items())
    firing = f'count(ALERTS{{alertname="{case.alert}",alertstate="firing"{labels}}}) > bool 0 or vector(0)'
    document = {
        "rule_files": [str(path) for path in RULES],
        "evaluation_interval": case.interval,
        "group_eval_order": ["slo-fast", "slo-slow", "slo-burn"],
        "tests": [{
            "interval": case.interval,
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {"expr": firing, "eval_time": case.at, "exp_samples": [{"labels": "{}", "value": expected}]}
            ],
        }],
    }  # fmt: skip
    path = folder / "test.yml"
    path.write_text(yaml.safe_dump(document))
    done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert + case.labels.get("window", ""))
def test_it_fires_and_it_does_not(case: Case, tmp_path: Path) -> None:
    promtool(tmp_path, case, case.fires, 1)
    promtool(tmp_path, case, case.quiet, 0)


@needs_promtool
def test_the_dead_mans_switch_always_fires(tmp_path: Path) -> None:
    promtool(tmp_path, Case(ALWAYS, "1m", {}, {}), {'up{job="x"}': "1x8"}, 1)


def test_every_alert_has_a_case_and_a_runbook() -> None:
    rules = alerts()
    tested = {(case.alert, case.labels.get("window")) for case in CASES} | {(ALWAYS, None)}
    there = {(name, rule["labels"].get("window")) for name, found in rules.items() for rule in found}
    assert there == tested
    for name, found in rules.items():
        page = ROOT / "docs/runbooks" / f"{name}.md"
        assert page.exists(), page
        for part in ("## What it means", "## What users notice", "## Look", "## Do"):
            assert part in page.read_text(), (page, part)
        for rule in found:
            assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{name}.md"
            assert rule["labels"]["severity"] in ("page", "ticket", "none")


def test_no_runbook_is_left_over() -> None:
    pages = {path.stem for path in (ROOT / "docs/runbooks").glob("*.md")} - {"README"}
    assert pages == set(alerts())


def test_counters_are_only_used_through_their_growth() -> None:
    for name, found in alerts().items():
        for rule in found:
            bare = re.sub(r"\b(rate|increase)\([\w:]+_total(_count)?(\{[^}]*\})?\[\w+\]( offset \w+)?\)", "", rule["expr"])
            bare = re.sub(r"\(([\w:]+_total(?:\{[^}]*\})?) unless [\w:]+ offset \w+\)", "", bare)  # a first sample
            assert not re.search(r"_total\b", bare), (name, bare)


def test_generated_files_are_as_generated() -> None:
    for path, text in generated().items():
        assert path.read_text() == text, f"{path}: run `python -m monitoring`"
