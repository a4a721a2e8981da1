"""The ledger: every record once, each key its own, money by the clock, a status without a single neighbour."""

import asyncio
import json
import os
import signal
import sys
import threading
from datetime import UTC, date, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.records import Record
from common.redis.connect import connect
from common.redis.names import LEDGER_CURSOR, cost_key, used_key
from common.redis.scripts import APPLY
from common.workers import Heartbeat, Worker
from services.ledger import neighbours
from services.ledger import usage as books
from services.ledger.costs import MAX_GAP_S, Costs
from services.ledger.live import LastMinute, Speeds
from services.ledger.settings import LedgerSettings
from services.ledger.usage import ALL, KINDS, add_up, by_model
from tests.harness import Stack, wait_for

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()


def record(**fields: object) -> Record:
    return Record(**{"id": "i", "request_id": "r", "key": "k", "model": "m", "route": "chat", "worker": "w",
                     "started_at": NOON, "outcome": "ok"} | fields)


def start(stack: Stack, **env: str) -> None:
    stack.spawn("ledger", [sys.executable, "-m", "services.ledger", "--port", str(stack.ports.ledger)], env={
        **stack.env("ledger"), "GPU_EXPORTER_URL": "http://127.0.0.1:9", "PROMETHEUS_URL": "http://127.0.0.1:9", **env})
    wait_for(lambda: httpx.get(f"http://127.0.0.1:{stack.ports.ledger}/health").status_code == 200, "ledger healthy")


def settings(stack: Stack) -> LedgerSettings:
    return LedgerSettings(redis_url=stack.dials.redis_url, redis_password_file=stack.dials.secrets / "ledger/redis_password")


def usage(stack: Stack, key: str) -> dict[str, int]:
    """What /v1/usage says of today, through nginx."""
    answer = httpx.get(stack.base + "/v1/usage", headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    days = answer.json()["days"]
    return days[0]["total"] if days else dict.fromkeys(KINDS, 0)


class TestAddingUp:
    @given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy|"), st.integers(0, 9), st.integers(0, 2))))
    def test_nothing_is_lost_or_counted_twice(self, asked: list[tuple[str, str, int, int]]) -> None:
        records = [record(key=key, model=model, completion_tokens=tokens, started_at=NOON + day * 86400)
                   for key, model, tokens, day in asked]
        sums = add_up(records)
        for key in "ab":
            mine = [r for r in records if r.key == key]
            counted = [by_model({f: str(n) for f, n in bag.items()}) for name, bag in sums.items() if name.endswith(":" + key)]
            assert sum(m["requests"] for models in counted for m in models.values()) == len(mine)
            assert sum(m["completion_tokens"] for models in counted for m in models.values()) == sum(r.completion_tokens for r in mine)
        everybody = [bag for name, bag in sums.items() if name.endswith(f":{ALL}")]
        assert sum(n for bag in everybody for field, n in bag.items() if field.endswith("|requests")) == len(records)

    def test_a_request_belongs_to_the_day_it_ended(self) -> None:
        late = record(started_at=datetime(2026, 11, 25, 23, 59, 50, tzinfo=UTC).timestamp(), duration_s=20.0)
        assert used_key(date(2026, 11, 26), "k") in add_up([late])

    def test_failures_are_those_of_ours(self) -> None:
        bag = add_up([record(outcome="stream_error"), record(outcome="cancelled"), record(outcome="client_error")])[used_key(date(2026, 11, 25), "k")]
        assert bag["m|failed"] == 1

    def test_junk_in_the_stream_is_left_out(self) -> None:
        assert books.records_in([("1-0", {"r": "{nonsense"}), ("2-0", {"x": ""})]) == []


def test_every_record_is_counted_once_whatever_is_killed(stack: Stack) -> None:
    stack.add_worker("w1")
    start(stack)
    for round_ in range(4):
        for _ in range(10):
            assert stack.chat("ok").status_code == 200
        if round_ % 2:
            stack.kill("ledger")
            start(stack)
        else:
            stack.kill("ledger", signal.SIGSTOP)
            stack.kill("ledger", signal.SIGCONT)
    records = stack.records(40)
    wait_for(lambda: usage(stack, stack.key)["requests"] == len(records) == 40, "all counted")
    assert usage(stack, stack.key)["completion_tokens"] == sum(r["completion_tokens"] for r in records)

    async def again() -> int:
        # A second reader that still believes in the old cursor changes nothing.
        redis = connect(settings(stack))
        done = await redis.eval(APPLY, 2, LEDGER_CURSOR, used_key(books.today(), "x"), "0-0", "9-0", "60", "2", "m|requests", "5")
        await redis.aclose()
        return int(done)

    assert asyncio.run(again()) == 0


def test_a_key_sees_its_own_usage_only_and_none_sees_nothing(stack: Stack) -> None:
    stack.add_worker("w1")
    start(stack)
    other, _ = stack.add_key("other")
    assert stack.chat("ok").status_code == 200
    wait_for(lambda: usage(stack, stack.key)["requests"] == 1, "counted")
    assert usage(stack, other)["requests"] == 0
    for path in ("/v1/usage", "/v1/status"):
        assert httpx.get(stack.base + path).status_code == 401
    for path in ("/alerts", "/metrics"):
        assert httpx.post(stack.base + path, json={}).status_code == 404
    bad = httpx.get(stack.base + "/v1/usage?days=x", headers={"authorization": f"Bearer {stack.key}"})
    assert bad.status_code == 400
    assert bad.json()["error"]["param"] == "days"


def test_the_status_lives_through_a_redis_that_is_away(stack: Stack) -> None:
    stack.add_worker("w1")
    start(stack, HOURLY_USD="2")
    headers = {"authorization": f"Bearer {stack.key}"}

    def status() -> dict:
        return httpx.get(stack.base + "/v1/status", headers=headers, timeout=10).json()

    wait_for(lambda: status()["total"]["ready"] == 1, "the worker in the status")
    assert status()["gpus"] is None
    assert status()["alerts"] is None
    stack.kill("redis")
    answer = status()
    assert answer["workers"][0]["id"] == "w1"
    assert answer["cost"]["usd_per_hour"] == 2
    stack.start_redis()
    assert stack.chat("ok").status_code == 200
    wait_for(lambda: usage(stack, stack.key)["requests"] >= 1, "counted after redis came back", 20)


def test_a_neighbour_that_answers_rubbish_hides_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer that could not be read ended the looking: the status showed its last GPUs and alerts for ever (B14)."""
    alert = {"labels": {"alertname": "A"}, "annotations": {}, "state": "firing", "activeAt": "now"}
    good = {"/metrics": 'gpu_info{gpu="0",name="A100"} 1\n', "/api/v1/alerts": json.dumps({"data": {"alerts": [alert]}})}
    said = dict(good)

    class Neighbour(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(said[self.path].encode())

    async def look() -> None:
        monkeypatch.setattr(neighbours, "SILENT_FOR_S", 0.0)
        asked = neighbours.Neighbours(url, url)
        for path, gone in (("/metrics", "gpus"), ("/api/v1/alerts", "alerts")):
            for rubbish in ("<html>", "gpu_info{gpu=", '{"data": []}', "[]", '{"data": {"alerts": [{}]}}'):
                said.update(good)
                await asked.look()
                assert asked.gpus
                assert asked.alerts
                said[path] = rubbish
                await asked.look()
                assert not getattr(asked, gone)
                assert asked.alerts if path == "/metrics" else asked.gpus
        await asked.close()

    with HTTPServer(("127.0.0.1", 0), Neighbour) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        asyncio.run(look())
        server.shutdown()


def test_alerts_nobody_else_gets_are_log_lines(stack: Stack) -> None:
    start(stack)
    sent = {"alerts": [{"status": "firing", "labels": {"alertname": "WorkerLost", "severity": "ticket"},
                        "annotations": {"summary": "1 worker", "runbook_url": "docs/runbooks/WorkerLost.md"}}]}
    assert httpx.post(f"http://127.0.0.1:{stack.ports.ledger}/alerts", json=sent).status_code == 204
    line = next(entry for entry in stack.log("ledger") if entry["event"] == "alert")
    assert (line["alert"], line["level"], line["runbook"]) == ("WorkerLost", "warning", "docs/runbooks/WorkerLost.md")


def test_money_by_the_clock(stack: Stack) -> None:
    async def spend() -> None:
        redis, now = connect(settings(stack)), [NOON]
        costs = Costs(redis, 3600.0, 10_000.0, lambda: now[0])  # a dollar a second
        await costs.tick()
        assert costs.spent.month == 0
        now[0] += 10
        await costs.tick()
        assert costs.spent.today == pytest.approx(10)
        now[0] += MAX_GAP_S + 1  # switched off
        await costs.tick()
        assert costs.spent.today == pytest.approx(10)
        now[0] += 43_200  # tomorrow, and again too long
        await costs.tick()
        now[0] += 5
        await costs.tick()
        assert (costs.spent.today, costs.spent.month) == (pytest.approx(5), pytest.approx(15))
        again = Costs(redis, 3600.0, 10_000.0, lambda: now[0])  # a new process
        await again.tick()
        assert again.spent.month == pytest.approx(15)
        public = again.public(1_000_000)
        assert public is not None
        assert public["usd_per_1m_tokens_today"] == pytest.approx(5)
        assert public["budget_left_usd"] == pytest.approx(9985)
        assert Costs(redis, 0.0, 0.0).public(5) is None
        now[0] = datetime(2026, 12, 1, 0, 0, 3, tzinfo=UTC).timestamp()
        await again.tick()
        assert again.spent.month == 0
        assert await redis.get(cost_key(date(2026, 11, 25))) is not None
        await redis.aclose()

    asyncio.run(spend())


def test_the_forecast_ends_with_the_month() -> None:
    costs = Costs(None, 1.0, 0.0, lambda: datetime(2026, 11, 30, 22, tzinfo=UTC).timestamp())  # type: ignore[arg-type]
    assert costs.month_forecast_usd() == pytest.approx(2.0)


def test_the_last_minute_forgets() -> None:
    now = [NOON + 30]
    minute = LastMinute(lambda: now[0])
    minute.add([record(ttft_s=0.5, stream=True, prompt_tokens=100, cached_tokens=25, request_id="r1"),
                record(ttft_s=9.0, stream=True, batch=True), record(outcome="stream_error")])
    shown = minute.public()
    assert (shown["requests"], shown["failed"], shown["ttft_p50_s"], shown["cached_share"]) == (3, 1, 0.5, 0.25)
    now[0] += 60
    assert minute.public()["requests"] == 0


def test_speed_survives_an_engine_that_starts_again() -> None:
    now = [0.0]
    speeds = Speeds(lambda: now[0])
    for at, generated in ((0, 100), (1, 150), (2, 10)):
        now[0] = at
        speeds.take([Worker(Heartbeat("w", "a:1", "ready", [], generated_tokens=generated), 0.0)])
        assert speeds.of("w")[0] >= 0
    assert speeds.of("nobody") == (0.0, 0.0)


def test_gpus_out_of_an_exporters_text() -> None:
    text = ('gpu_info{gpu="0",name="A100",uuid="u",driver="d"} 1\ngpu_utilization_ratio{gpu="0"} 0.5\n'
            'gpu_memory_used_bytes{gpu="0",mig=""} 7\ngpu_throttle_active{gpu="0",reason="sw_power_cap"} 1\n'
            'gpu_throttle_active{gpu="0",reason="idle"} 1\nhost_cpu_utilization_ratio 0.25\n')
    samples = neighbours.read_samples(text)
    gpu = neighbours.gpus(samples)[0]
    assert (gpu["name"], gpu["utilization"], gpu["memory_used_bytes"], gpu["power_watts"], gpu["throttled"]) == (
        "A100", 0.5, 7, None, ["sw_power_cap"])
    assert neighbours.host(samples) == {"cpu_utilization": 0.25, "memory_used_bytes": None, "memory_total_bytes": None}


def test_a_bad_setting_is_named() -> None:
    with pytest.raises(ValueError, match="hourly_usd"):
        LedgerSettings(redis_url="redis://x", redis_password_file=os.devnull, hourly_usd=-1)
