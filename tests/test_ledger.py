"""The ledger: every record once, each key its own, money by the clock, a status without a single neighbour."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import msgspec
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis
from sqlalchemy import select

from common.database import Database
from common.records import Record
from common.redis.connect import connect
from common.redis.names import USAGE
from common.workers import Heartbeat, Worker
from services.ledger import legacy, neighbours, tables
from services.ledger import usage as books
from services.ledger.app import MIGRATIONS
from services.ledger.costs import MAX_GAP_S, Costs
from services.ledger.live import LastMinute, Speeds
from services.ledger.settings import LedgerSettings
from services.ledger.tables import ALL, KINDS
from services.ledger.usage import add_up
from tests.harness import Cache, Stack, wait_for
from tests.jobs_service import find_postgres, postgres

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()


def record(**fields: object) -> Record:
    return Record(**{"id": "i", "request_id": "r", "key": "k", "model": "m", "route": "chat", "worker": "w",
                     "started_at": NOON, "outcome": "ok"} | fields)


def start(stack: Stack, **env: str) -> None:
    stack.spawn("ledger", [sys.executable, "-m", "services.ledger", "--port", str(stack.ports.ledger)], env={
        **stack.env("ledger"), "GPU_EXPORTER_URL": "http://127.0.0.1:9", "PROMETHEUS_URL": "http://127.0.0.1:9", **env})
    wait_for(lambda: httpx.get(f"http://127.0.0.1:{stack.ports.ledger}/health").status_code == 200, "ledger healthy")


def settings(stack: Stack) -> LedgerSettings:
    return LedgerSettings(redis_url=stack.dials.redis_url, redis_password_file=stack.dials.secrets / "ledger/redis_password",
                          database_url="sqlite:///:memory:")


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
        for key, mine in [*((k, [r for r in records if r.key == k]) for k in "ab"), (ALL, records)]:
            counted = [bag for (_, who, _), bag in sums.items() if who == key]
            assert sum(bag["requests"] for bag in counted) == len(mine)
            assert sum(bag["completion_tokens"] for bag in counted) == sum(r.completion_tokens for r in mine)

    def test_a_request_belongs_to_the_day_it_ended(self) -> None:
        late = record(started_at=datetime(2026, 11, 25, 23, 59, 50, tzinfo=UTC).timestamp(), duration_s=20.0)
        assert (date(2026, 11, 26), "k", "m") in add_up([late])

    def test_failures_are_those_of_ours(self) -> None:
        bag = add_up([record(outcome="stream_error"), record(outcome="cancelled"), record(outcome="client_error")])[date(2026, 11, 25), "k", "m"]
        assert bag["failed"] == 1

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


@pytest.fixture(params=["sqlite", "postgres"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    with contextlib.ExitStack() as stacked:
        if request.param == "postgres" and find_postgres() is None:
            pytest.skip("no Postgres here (on Debian: apt install postgresql)")
        url = stacked.enter_context(postgres()) if request.param == "postgres" else f"sqlite:///{tmp_path}/ledger.db"
        made = Database(url, MIGRATIONS)
        made.migrate()
        yield made
        made.close()


def test_the_migrations_make_the_tables_of_the_code(kept: Database) -> None:
    assert kept.transact(lambda c: compare_metadata(MigrationContext.configure(c), tables.metadata)) == []


def test_two_ledgers_count_each_record_once(stack: Stack, kept: Database) -> None:
    async def count() -> int:
        clients = [connect(settings(stack), timeout_s=5.0) for _ in range(2)]
        both = [books.Books(client, kept) for client in clients]
        writer = stack.redis("worker")
        for n in range(700):
            writer.xadd(USAGE, {"r": msgspec.json.encode(record(completion_tokens=n))})
        for _ in range(6):
            await asyncio.gather(*(each.next_records() for each in both))
        days = await both[0].days("k", 400)
        for client in clients:
            await client.aclose()
        assert days[0][1]["m"]["requests"] == 700
        return days[0][1]["m"]["completion_tokens"]

    assert asyncio.run(count()) == sum(range(700))


def test_what_was_trimmed_while_it_was_away_is_said(stack: Stack, kept: Database) -> None:
    """Two thirds of the records were gone without a word (A11)."""
    writer = stack.redis("worker")

    def write(count: int, keep: int = 10**6) -> None:
        for _ in range(count):
            writer.xadd(USAGE, {"r": msgspec.json.encode(record())}, maxlen=keep, approximate=False)

    async def read() -> tuple[int, int]:
        client = connect(settings(stack), timeout_s=5.0)
        ledger = books.Books(client, kept)  # a new process
        while await ledger.next_records():
            pass
        await client.aclose()
        days = await ledger.days("k", 400)
        return ledger.lost, days[0][1]["m"]["requests"]

    write(30, keep=20)
    assert asyncio.run(read()) == (0, 20), "what was before its time"
    write(10, keep=20)
    assert asyncio.run(read()) == (0, 30), "trimmed, but read before"
    write(50, keep=20)
    assert asyncio.run(read()) == (30, 50)
    write(5, keep=20)
    assert asyncio.run(read()) == (0, 55), "said once"


def test_what_an_older_release_left_in_redis_moves_in(stack: Stack, kept: Database) -> None:
    """Its keys as it wrote them; a crash in between and a second start count nothing twice."""
    folder = Path(tempfile.mkdtemp(prefix="old-", dir="/tmp"))
    cache = Cache(folder)
    redis = Redis.from_url(cache.url, username="admin", decode_responses=True)

    def write() -> None:
        redis.hset("used:2026-11-25:k", mapping={"m|requests": 3, "m|completion_tokens": 9, "a|b|requests": 1})
        redis.set("ledger:cursor", "5-1")
        redis.set("ledger:cost:2026-11-25", "1.5")
        redis.set("ledger:tick", "1000.5")

    try:
        for _ in range(2):
            write()
            legacy.move_in(redis, kept)
            assert redis.keys("*") == []
        assert legacy.move_in(redis, kept) == 0
    finally:
        cache.kill()
        shutil.rmtree(folder)
    found = kept.transact(lambda c: c.execute(select(tables.usage).order_by(tables.usage.c.model)).all())
    assert [(row.key, row.model, row.requests, row.completion_tokens) for row in found] == [("k", "a|b", 1, 0), ("k", "m", 3, 9)]
    assert kept.transact(lambda c: [tables.read_mark(c, name) for name in ("cursor", "tick")]) == ["5-1", "1000.5"]
    assert kept.transact(lambda c: c.execute(select(tables.costs.c.usd)).scalar()) == 1.5


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


def test_money_by_the_clock(kept: Database) -> None:
    async def spend() -> None:
        now = [NOON]
        costs = Costs(kept, 3600.0, 10_000.0, lambda: now[0])  # a dollar a second
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
        again = Costs(kept, 3600.0, 10_000.0, lambda: now[0])  # a new process
        await again.tick()
        assert again.spent.month == pytest.approx(15)
        public = again.public(1_000_000)
        assert public is not None
        assert public["usd_per_1m_tokens_today"] == pytest.approx(5)
        assert public["budget_left_usd"] == pytest.approx(9985)
        assert Costs(kept, 0.0, 0.0).public(5) is None
        now[0] = datetime(2026, 12, 1, 0, 0, 3, tzinfo=UTC).timestamp()
        await again.tick()
        assert again.spent.month == 0
        assert kept.transact(lambda c: c.execute(select(tables.costs.c.usd).where(tables.costs.c.day == date(2026, 11, 25))).scalar())

    asyncio.run(spend())


def test_a_clock_that_is_set_back_counts_no_second_twice(kept: Database) -> None:
    """90 s back counted 90 s twice (A11); a day back is another clock."""
    async def spend() -> list[float]:
        now, found = [NOON], []
        costs = Costs(kept, 3600.0, 0.0, lambda: now[0])
        for now[0] in (NOON, NOON + 100, NOON + 10, NOON + 60, NOON + 110, NOON - 80_000, NOON - 79_990):
            await costs.tick()
            found.append(costs.spent.month)
        return found

    assert asyncio.run(spend()) == pytest.approx([0, 100, 100, 100, 110, 0, 10]), "a day back, only its own day is this month's"


def test_old_days_are_forgotten(stack: Stack, kept: Database) -> None:
    async def read() -> None:
        client = connect(settings(stack), timeout_s=5.0)
        old, young = date.today() - timedelta(days=401), date.today() - timedelta(days=399)
        for day in (old, young):
            kept.transact(lambda c, day=day: tables.put(c, tables.costs, {"day": day}, {"usd": 1.0}))
        stack.redis("worker").xadd(USAGE, {"r": msgspec.json.encode(record())})
        await books.Books(client, kept).next_records()
        await client.aclose()
        assert kept.transact(lambda c: list(c.execute(select(tables.costs.c.day)).scalars())) == [young]

    asyncio.run(read())


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
        LedgerSettings(redis_url="redis://x", redis_password_file=os.devnull, database_url="sqlite:///x", hourly_usd=-1)
