"""The path without a server, a socket or an event loop: what goes in, which decision comes out."""

import asyncio
import json
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from loguru import logger
from prometheus_client import CollectorRegistry

from common import engines
from common.aliases import Alias, AliasTable
from common.answers.store import Stored
from common.auth import HOUSE, Authenticator
from common.errors import Unauthorized
from common.keys import ApiKey, make
from common.metering import context
from common.metering.context import CONTEXT
from common.redis.names import api_key_key
from common.workers import Heartbeat, Model, State, WorkerTable
from gateway.answers import Answers
from gateway.arrival import Arrival
from gateway.attempts import Attempts, HeldBack
from gateway.decision import Accelerate, Decision, Refuse, Relay, Replay
from gateway.metrics import GatewayMetrics
from gateway.path import RequestPath
from gateway.settings import Settings
from gateway.steps import Waiting, start
from gateway.waking import Waking
from tests.test_answers import SAID, FakeStore

CHAT = "/v1/chat/completions"
SERVICE = "s" * 40


class FakeRedis:
    """Keys in memory."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    async def get(self, name: str) -> bytes | None:
        return self.values.get(name)


class FakeMeter:
    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.ended: list[Any] = []

    def begin(self, record: Any) -> None:
        self.begun.append(record)

    def end(self, record: Any) -> None:
        self.ended.append(record)


class Bench:
    """A path and all it stands on."""

    def __init__(self, folder: Path, *, nginx: bool = True, workers: int = 2, models: tuple[str, ...] = ("m",)) -> None:
        self.nginx = nginx
        secret = folder / "secret"
        secret.write_text("x" * 40)
        self.settings = Settings(
            redis_url="redis://r", hold_back_s=60, **{f"{name}_file": secret for name in (
                "redis_password", "worker_token", "service_token", "cache_secret", "answer_secret")})  # type: ignore[arg-type]
        self.redis, self.table, self.meter, self.store = FakeRedis(), WorkerTable(), FakeMeter(), FakeStore()
        for number in range(workers):
            self.beat(f"w{number}", models)
        self.key, record = make("me")
        self.key_id = record.id
        self.redis.values[api_key_key(record.id)] = msgspec.json.encode(record)
        self.authenticator = Authenticator(self.redis, service_token=SERVICE)  # type: ignore[arg-type]
        asyncio.run(self.authenticator.check(f"Bearer {self.key}".encode()))
        self.registry = CollectorRegistry()
        metrics, self.aliases = GatewayMetrics(self.registry), AliasTable()
        self.metrics = metrics
        self.told: list[str] = []
        self.held = HeldBack(60, self.told.append)

        async def is_running(worker_id: str, uid: str) -> bool | None:
            return True

        self.answers = Answers(self.store, is_running, metrics.answers, 60, 10_000, 30.0)  # type: ignore[arg-type]
        self.path = RequestPath(self.settings, self.table, self.authenticator, self.held, self.meter, metrics,  # type: ignore[arg-type]
                                self.answers, self.aliases, Waking(self.redis, self.table, self.settings.wake_patience_s))  # type: ignore[arg-type]

    def beat(self, name: str, models: tuple[str, ...] = ("m",), revision: str = "r1", keeps: bool = True, engine: str = "vllm",
             state: State = "ready") -> None:
        self.table.take(msgspec.json.encode(Heartbeat(
            name, f"{name}:1", state, [Model(m, 1, revision=revision) for m in models], keeps=keeps, engine=engine)))

    def arrival(self, path: str = CHAT, method: str = "POST", headers: dict[bytes, bytes] | None = None, **fields: object) -> Arrival:
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()
        headers = {b"authorization": f"Bearer {self.key}".encode(), **(headers or {})}
        return Arrival(method, path, headers, body, from_nginx=self.nginx)

    def now(self, arrival: Arrival) -> Decision:
        """A decision for which nothing is awaited."""
        decision = start(self.path.decide(arrival))
        assert not isinstance(decision, Waiting)
        return decision

    def later(self, arrival: Arrival) -> Decision:
        """A decision that waits for something."""
        async def decide() -> Decision:
            begun = start(self.path.decide(arrival))
            assert isinstance(begun, Waiting)
            return await begun.finish()

        return asyncio.run(decide())

    def counted(self, result: str, route: str = "chat") -> float:
        self.metrics.count()
        return self.registry.get_sample_value("gateway_decisions_total", {"route": route, "result": result}) or 0.0


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def told(decision: Decision) -> context.Context:
    assert isinstance(decision, Accelerate)
    raw = dict(decision.response().headers)[CONTEXT]
    found = context.decode(raw)
    assert found is not None
    return found


def test_a_known_key_and_a_worker_accelerate_without_waiting(bench: Bench) -> None:
    decision = bench.now(bench.arrival(headers={b"x-request-id": b"mine-0001"}))
    assert isinstance(decision, Accelerate)
    headers = dict(decision.response().headers)
    assert headers[b"x-accel-redirect"] == b"@worker"
    assert headers[b"x-worker"] == decision.worker.beat.address.encode()
    assert b"x-worker-token" not in headers, "nginx has it (C4)"
    said = told(decision)
    assert (said.request_id, said.key, said.attempt, said.model, said.batch) == ("mine-0001", bench.key_id, 1, "", False)
    assert len(said.salt) == 32
    assert decision.worker.sent == 1
    assert bench.counted("fast") == 1


def test_every_request_has_a_uid_of_ours(bench: Bench) -> None:
    uids = {told(bench.now(bench.arrival(headers={b"x-request-id": b"mine-0001"}))).uid for _ in range(500)}
    assert len(uids) == 500


def test_uid_and_label_survive_an_attempt_that_failed(bench: Bench) -> None:
    first = bench.now(bench.arrival(headers={b"x-request-id": b"mine-0001"}))
    assert isinstance(first, Accelerate)
    failed = {CONTEXT: dict(first.response().headers)[CONTEXT], b"x-failed-worker": first.worker.beat.address.encode(),
              b"x-failed-sent": b"300 : 900", b"x-failed-status": b"200 : 502"}
    second = bench.now(bench.arrival(headers=failed))
    assert isinstance(second, Accelerate)
    assert second.worker is not first.worker
    assert (told(second).uid, told(second).request_id, told(second).attempt) == (told(first).uid, "mine-0001", 2)


def test_without_nginx_no_client_can_bring_a_context(tmp_path: Path) -> None:
    bench = Bench(tmp_path, nginx=False)
    forged = context.encode(context.Context("uid", "theirs", "somebody", 3))
    decision = bench.now(bench.arrival(headers={CONTEXT: forged, b"x-failed-worker": b"w0:1", b"x-request-id": b"mine-0001"}))
    assert isinstance(decision, Relay)
    assert (decision.context.request_id, decision.context.key, decision.context.attempt) == ("mine-0001", bench.key_id, 1)


def test_an_alias_takes_the_fast_path(bench: Bench) -> None:
    bench.aliases.take(msgspec.json.encode(Alias("mine", "o", "m", "")))
    arrival = bench.arrival(model="mine")
    body = arrival.body
    decision = bench.now(arrival)
    assert told(decision).model == "m"
    assert arrival.body is body, "nothing is rewritten here: the worker does it"


def test_a_question_asked_before_is_replayed_and_leaves_a_record(bench: Bench) -> None:
    assert isinstance(bench.later(bench.arrival(temperature=0)), Accelerate)
    name = bench.store.reads[0][0]
    document = {"id": "x", "created": 1, "model": "m", "usage": {"prompt_tokens": 3, "completion_tokens": 2}, "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop", "logprobs": None}]}
    bench.store.found[name] = Stored(document)
    for stream in (False, True):
        decision = bench.later(bench.arrival(temperature=0, stream=stream))
        assert isinstance(decision, Replay)
        response = decision.response()
        assert dict(response.headers)[b"content-length"] == str(len(response.body)).encode()
        assert response.body.endswith(b"data: [DONE]\n\n") is stream
    assert [r.worker for r in bench.meter.ended] == ["answer-cache"] * 2
    assert bench.meter.begun == bench.meter.ended
    assert bench.counted("answer") == 2


def test_a_question_says_how_to_keep_its_answer(bench: Bench) -> None:
    decision = bench.later(bench.arrival(temperature=0))
    keep = told(decision).keep
    assert keep is not None
    assert isinstance(decision, Accelerate)
    assert (keep.worker, keep.ttl_s) == (decision.worker.beat.id, 60)
    assert told(bench.now(bench.arrival(temperature=0.5))).keep is None
    name = keep.name
    bench.store.found[name] = Stored(None)
    assert told(bench.later(bench.arrival(temperature=0))).keep is None, "it was found not to be worth keeping"


def test_a_second_attempt_does_not_wait_for_its_own_answer(bench: Bench) -> None:
    first = bench.later(bench.arrival(temperature=0))
    assert isinstance(first, Accelerate)
    failed = {CONTEXT: dict(first.response().headers)[CONTEXT], b"x-failed-worker": first.worker.beat.address.encode(),
              b"x-failed-sent": b"300 : 900", b"x-failed-status": b"200 : 502"}
    second = bench.now(bench.arrival(headers=failed, temperature=0))
    assert isinstance(second, Accelerate)
    keep = told(second).keep
    assert keep is not None
    assert keep.worker == second.worker.beat.id != first.worker.beat.id


def test_a_document_that_cannot_be_said_is_computed(bench: Bench) -> None:
    bench.later(bench.arrival(temperature=0))
    bench.store.found[bench.store.reads[0][0]] = Stored({**SAID, "news": 1})
    assert isinstance(bench.later(bench.arrival(temperature=0, stream=True)), Accelerate)


@pytest.mark.parametrize(("change", "status", "code"), [
    ({"method": "GET"}, 405, "method_not_allowed"), ({"headers": {b"authorization": b"Bearer no"}}, 401, "invalid_api_key"),
    ({"model": "none"}, 404, "model_not_found"), ({"n": 99}, 400, None), ({"messages": None}, 400, None),
])
def test_refusals(bench: Bench, change: dict, status: int, code: str | None) -> None:
    arrival = bench.arrival(**change)
    begun = start(bench.path.decide(arrival))
    decision = begun if not isinstance(begun, Waiting) else asyncio.run(begun.finish())
    assert isinstance(decision, Refuse)
    response = decision.response()
    assert response.status == status
    assert dict(response.headers)[b"x-request-id"] == arrival.request_id.encode()
    if code:
        assert json.loads(response.body)["error"]["code"] == code
    assert bench.counted(str(status)) == 1


def test_any_error_ends_in_the_path_counted_and_logged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug behind any step is a 500 in our words, a line and a number; never an exception at the edge (A2)."""
    lines: list[str] = []
    handle = logger.add(lines.append)  # type: ignore[arg-type]
    try:
        for number, (owner, name) in enumerate((
            (bench.table, "serving"), (bench.held, "refuses"), (bench.aliases, "targets"), (bench.authenticator, "cached"),
            (bench.path, "_tracing"),
        ), 1):
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, object())
                decision = bench.now(bench.arrival())
            assert isinstance(decision, Refuse)
            assert decision.error.status == 500
            assert "secret" not in decision.error.message
            assert decision.request_id
            assert bench.counted("500") == number
    finally:
        logger.remove(handle)
    assert sum("the path failed" in line for line in lines) == 5


def test_an_error_while_waiting_ends_in_the_path_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("x")

    monkeypatch.setattr(bench.authenticator, "check", broken)
    decision = bench.later(bench.arrival(headers={b"authorization": b"Bearer other"}))
    assert isinstance(decision, Refuse)
    assert decision.error.status == 500


def test_whoever_leaves_while_waiting_leaves_nothing_behind(bench: Bench) -> None:
    async def leave() -> None:
        begun = start(bench.path.decide(bench.arrival(temperature=0)))
        assert isinstance(begun, Waiting)
        task = asyncio.create_task(begun.finish())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.01)
        assert bench.answers._flights == {}

    asyncio.run(leave())


def test_a_body_that_is_still_coming_is_read_only_for_a_key(bench: Bench) -> None:
    read: list[int] = []

    def reading(limit: int) -> Awaitable[bytes]:
        read.append(limit)

        async def body() -> bytes:
            return b'{"model":"m","messages":[]}'

        return body()

    def arrive(key: str) -> Decision:
        return bench.later(Arrival("POST", CHAT, {b"authorization": f"Bearer {key}".encode()}, None, reading, from_nginx=True))

    assert isinstance(arrive(bench.key), Accelerate)
    assert isinstance(arrive(make("other")[0]), Refuse)
    assert read == [bench.settings.max_body_bytes]


class TestService:
    """Our own services ask in the name of a key's owner."""

    def ask(self, bench: Bench, owner: str, payer: str = "", **fields: object) -> Decision:
        headers = {b"authorization": f"Bearer {SERVICE}".encode(), b"x-owngpt-owner": owner.encode(),
                   b"x-owngpt-payer": payer.encode()}
        return bench.later(bench.arrival(headers=headers, **fields))

    def test_the_owner_pays_and_it_can_wait(self, bench: Bench) -> None:
        said = told(self.ask(bench, bench.key_id))
        assert (said.key, said.batch) == (bench.key_id, True)
        paid = told(self.ask(bench, bench.key_id, HOUSE))
        assert (paid.key, paid.salt) == (HOUSE, said.salt), "whoever pays, the caches are the owner's"

    def test_a_revoked_owner_asks_nothing_any_more(self, bench: Bench) -> None:
        self.ask(bench, bench.key_id)
        bench.redis.values.clear()
        bench.authenticator.forget(bench.key_id)
        decision = self.ask(bench, bench.key_id)
        assert isinstance(decision, Refuse)
        assert decision.error.status == 401

    def test_nobody_else_can(self, bench: Bench) -> None:
        for token in (bench.key, "s" * 39, "", SERVICE + "s"):
            headers = {b"authorization": f"Bearer {token}".encode(), b"x-owngpt-owner": b"somebody"}
            begun = start(bench.path.decide(bench.arrival(headers=headers)))
            decision = begun if not isinstance(begun, Waiting) else asyncio.run(begun.finish())
            if token == bench.key:
                assert (told(decision).key, told(decision).batch) == (bench.key_id, False)
            else:
                assert isinstance(decision, Refuse)
        with pytest.raises(Unauthorized):
            asyncio.run(Authenticator(bench.redis, service_token="").check(b"Bearer "))  # type: ignore[arg-type]

    def test_a_shared_scope_is_the_owners(self, bench: Bench) -> None:
        record = ApiKey("12345678", "t", "d", 1, "team")
        bench.redis.values[api_key_key(record.id)] = msgspec.json.encode(record)
        other = ApiKey("87654321", "u", "d", 1, "team")
        bench.redis.values[api_key_key(other.id)] = msgspec.json.encode(other)
        assert told(self.ask(bench, record.id)).salt == told(self.ask(bench, other.id)).salt


def test_nobody_who_waits_waits_for_a_batch(bench: Bench) -> None:
    service = TestService()
    assert isinstance(service.ask(bench, bench.key_id, temperature=0), Accelerate)
    assert next(iter(bench.answers._flights.values())).batch
    decision = bench.later(bench.arrival(temperature=0))
    assert isinstance(decision, Accelerate)
    assert not next(iter(bench.answers._flights.values())).batch, "from now on others wait for this one"


def test_a_worker_that_keeps_no_answers_leads_no_question(tmp_path: Path) -> None:
    bench = Bench(tmp_path, workers=0)
    bench.beat("w", keeps=False)
    assert told(bench.later(bench.arrival(temperature=0))).keep is None
    assert bench.answers._flights == {}


def test_an_alias_shadows_no_model(bench: Bench) -> None:
    bench.beat("other", ("n",))
    bench.aliases.take(msgspec.json.encode(Alias("m", "o", "n", "")))
    assert told(bench.now(bench.arrival())).model == ""


class TestRelay:
    def test_another_revision_does_not_answer_the_question(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, nginx=False, workers=1)
        first = bench.later(bench.arrival(temperature=0))
        assert isinstance(first, Relay)
        assert first.context.keep is not None
        bench.beat("new", revision="r2")
        second = bench.path.again(first, CHAT, Attempts(("w0:1",), 0))
        assert isinstance(second, Relay)
        assert second.context.keep is None

    def test_without_nginx_it_is_relayed_and_tried_elsewhere(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, nginx=False, workers=0)
        bench.beat("f0")
        bench.beat("f1")
        first = bench.now(bench.arrival())
        assert isinstance(first, Relay)
        second = bench.path.again(first, CHAT, Attempts((first.worker.beat.address,), 1, reason="died"))
        assert isinstance(second, Relay)
        assert second.worker is not first.worker
        assert (second.context.uid, second.context.attempt) == (first.context.uid, 2)
        third = bench.path.again(second, CHAT, Attempts(("f0:1", "f1:1"), 2, reason="died"))
        assert isinstance(third, Refuse)
        assert third.error.code == "request_held_back"
        assert len(bench.told) == 1
        assert bench.counted("502") == 1

    def test_a_leader_that_fails_lets_the_others_go(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, nginx=False, workers=1)
        relay = bench.later(bench.arrival(temperature=0))
        assert isinstance(relay, Relay)
        assert len(bench.answers._flights) == 1
        bench.path.again(relay, CHAT, Attempts(("w0:1",), 0))
        assert bench.answers._flights == {}


class TestEngines:
    """Engines of one name that do not take the same: what none takes is refused, and nothing is lost on the way."""

    @pytest.fixture
    def both(self, tmp_path: Path) -> Bench:
        bench = Bench(tmp_path, workers=0)
        bench.beat("v")
        bench.beat("l", engine="llamacpp", revision="")
        return bench

    def test_it_goes_to_who_takes_it(self, both: Bench) -> None:
        sent = {told_of.worker.beat.id for told_of in (both.now(both.arrival(prompt_logprobs=1, n=i + 1)) for i in range(8))
                if isinstance(told_of, Accelerate)}
        assert sent == {"v"}
        assert {both.now(both.arrival(n=1)).worker.beat.id for _ in range(40)} == {"v", "l"}  # type: ignore[union-attr]

    def test_what_nobody_takes_is_refused_by_its_name(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, workers=0)
        bench.beat("l", engine="llamacpp")
        refused = bench.now(bench.arrival(temperature=0.5, repetition_penalty=1.1))
        assert isinstance(refused, Refuse)
        assert (refused.error.status, refused.error.param, refused.error.code) == (400, "repetition_penalty", "unsupported_parameter")
        refused = bench.now(bench.arrival("/v1/embeddings", input="x"))
        assert isinstance(refused, Refuse)
        assert refused.error.code == "unsupported_endpoint"

    @pytest.mark.parametrize("fields", [
        {"n": 1, "tools": [], "user": "u", "store": False, "repetition_penalty": 1.0, "min_tokens": 0, "parallel_tool_calls": True},
        {"logprobs": False, "stop": None, "metadata": {"a": "b"}, "top_logprobs": 0, "truncate_prompt_tokens": -1},
    ])
    def test_what_asks_for_nothing_is_no_field(self, tmp_path: Path, fields: dict) -> None:
        bench = Bench(tmp_path, workers=0)
        bench.beat("l", engine="llamacpp")
        assert isinstance(bench.now(bench.arrival(temperature=1, **fields)), Accelerate)
        assert engines.asked(b'{"model": "m", "input": "x", "text": {"format": {"type": "text"}}, "n": true}') == ["input", "n"]

    @pytest.mark.parametrize("raw", [b'"x": "\\ud800"', b'"x": 1e999', b'"\\ud800": 1', b'"x": ' + b"[" * 30 + b"]" * 30])
    def test_what_no_text_can_hold_is_the_clients_mistake(self, tmp_path: Path, raw: bytes) -> None:
        """It was a 500 of the gateway, from anybody with a key."""
        bench = Bench(tmp_path, workers=0)
        bench.beat("l", engine="llamacpp")
        arrival = bench.arrival()
        assert arrival.body is not None
        arrival.body = arrival.body[:-1] + b", " + raw + b"}"
        refused = bench.now(arrival)
        assert isinstance(refused, Refuse)
        assert refused.error.status == 400

    def test_who_is_away_for_a_moment_is_waited_for(self, both: Bench) -> None:
        """It was a 400 while vLLM was started again: a batch's line failed for good."""
        both.beat("v", state="gone")
        refused = both.now(both.arrival(prompt_logprobs=1))
        assert isinstance(refused, Refuse)
        assert (refused.error.status, refused.error.retry_after_s) == (503, 2)
        both.table._engine_seen_at["m"]["vllm"] -= 400  # and never came back
        both.table.tend(connected=True)
        refused = both.now(both.arrival(prompt_logprobs=1))
        assert isinstance(refused, Refuse)
        assert refused.error.status == 400

    def test_a_suspect_that_alone_takes_it_is_the_last_resort(self, both: Bench) -> None:
        """One failure of vLLM was a 503 for everybody who needs it."""
        both.table.suspect("v:1")
        assert both.now(both.arrival()).worker.beat.id == "l"  # type: ignore[union-attr]
        assert both.now(both.arrival(prompt_logprobs=1)).worker.beat.id == "v"  # type: ignore[union-attr]

    def test_one_that_died_while_it_ran_it_is_said(self, both: Bench) -> None:
        refused = both.now(both.arrival(headers={
            b"x-failed-worker": b"v:1", b"x-failed-sent": b"350 : 120", b"x-failed-status": b"200 : 502"}, prompt_logprobs=1))
        assert isinstance(refused, Refuse)
        assert (refused.error.status, refused.error.retry_after_s) == (502, None)

    def test_one_that_sleeps_and_takes_it_is_woken(self, both: Bench) -> None:
        both.beat("v", state="asleep")
        begun = start(both.path.decide(both.arrival(prompt_logprobs=1)))
        assert isinstance(begun, Waiting)
        begun._steps.close()
        begun._awaitable.close()  # type: ignore[attr-defined]
        assert both.now(both.arrival()).worker.beat.id == "l"  # type: ignore[union-attr]

    def test_no_sleeper_is_woken_to_refuse(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, workers=0)
        bench.beat("l", engine="llamacpp", state="asleep")
        assert isinstance(bench.now(bench.arrival(prompt_logprobs=1)), Refuse)
