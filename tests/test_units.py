"""Pure functions: decode, routing, attempts, keys, the SSE scan, settings, the engine's command line."""

import asyncio
import contextlib
import json
import os
import re
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loguru import logger
from prometheus_client import CollectorRegistry
from redis.exceptions import RedisError

from common import checkpoint, keys, tasks
from common.errors import ApiError, InvalidRequest, StreamLost, UpstreamFailed
from common.metering import engine_errors, sse
from common.metering.metered import Metering
from common.metering.rewrite import rewrite
from common.records import Record
from common.settings import read_secret
from common.tasks import end_tasks
from common.workers import Heartbeat, Model, Pool, Worker, WorkerTable
from gateway import attempts, routing
from gateway import decode as decoding
from gateway.decode import MAX_PROMPTS, decode
from gateway.settings import Settings
from services.gpu_exporter.settings import ExporterSettings
from services.jobs.settings import JobsSettings
from services.ledger.settings import LedgerSettings
from services.local.plan import ROOT
from services.trainer.settings import TrainerSettings
from services.worker.settings import WorkerSettings
from services.worker.vllm import command as engine


def worker(name: str, load: int = 0, state: str = "ready", models: tuple[str, ...] = ("m",)) -> Worker:
    beat = Heartbeat(name, f"{name}:1", state, [Model(m, 1) for m in models], in_flight=load)  # type: ignore[arg-type]
    return Worker(beat, 0.0)


def choose(workers: list[Worker], prompt: bytes, holders: routing.Holders, scope: str = "s") -> routing.Route:
    return routing.choose(Pool(workers), "m", scope, prompt, holders)


class TestRouting:
    def test_least_in_flight(self) -> None:
        assert choose([worker("a", 3), worker("b", 1)], b"", routing.Holders()).worker.beat.id == "b"

    @given(st.binary(min_size=1024, max_size=6000))
    def test_a_prefix_goes_where_it_was_read(self, prompt: bytes) -> None:
        workers, holders = [worker(name) for name in "abcd"], routing.Holders()
        first = choose(workers, prompt, holders).worker.beat.id
        assert {choose(workers[::-1], prompt, holders).worker.beat.id for _ in range(5)} == {first}

    def test_what_nobody_has_read_goes_to_the_least_loaded(self) -> None:
        workers = [worker("a", 1), worker("b", 0), worker("c", 2)]
        for number in range(50):
            assert choose(workers, b"%04d" % number * 300, routing.Holders()).worker.beat.id == "b"

    def test_the_deepest_shared_prefix_decides(self) -> None:
        workers, holders = [worker("a"), worker("b", 2)], routing.Holders()
        system = b"s" * 1024
        assert choose(workers, system + b"x" * 4000, holders) == (workers[0], "least-in-flight")
        workers[0].sent = 9
        assert choose(workers, system + b"y" * 4000, holders) == (workers[1], "least-in-flight")
        workers[0].sent = 0
        assert choose(workers, system + b"y" * 4000, holders) == (workers[1], "prefix-4096")
        assert choose(workers, system + b"z" * 4000, holders) == (workers[0], "prefix-1024")

    def test_scopes_do_not_share_a_prefix_cache_so_they_do_not_meet_for_it(self) -> None:
        workers, holders = [worker("a"), worker("b")], routing.Holders()
        first = choose(workers, b"x" * 2000, holders).worker
        first.sent = 1
        assert choose(workers, b"x" * 2000, holders).worker is first
        assert choose(workers, b"x" * 2000, holders, "another").worker is not first

    def test_a_restarted_worker_is_not_expected_to_hold_anything(self) -> None:
        holders = routing.Holders()
        choose([worker("a-1"), worker("b-1", 5)], b"x" * 2000, holders)
        assert choose([worker("a-2", 1), worker("b-1", 0)], b"x" * 2000, holders).reason == "least-in-flight"

    def test_a_hot_prefix_cannot_own_a_worker(self) -> None:
        workers, holders = [worker(name) for name in "abcd"], routing.Holders()
        for _ in range(400):
            choose(workers, b"x" * 5000, holders).worker.sent += 1
        loads = sorted(w.load for w in workers)
        assert loads[-1] <= 1.5 * 100
        assert loads[0] > 50

    @given(st.lists(st.integers(0, 500), min_size=2, max_size=8), st.lists(st.integers(0, 3), min_size=1, max_size=9))
    def test_bounded_load(self, loads: list[int], prompts: list[int]) -> None:
        workers, holders = [worker(f"w{i}", load) for i, load in enumerate(loads)], routing.Holders()
        for prompt in prompts:
            now = [w.load for w in workers]
            chosen = choose(workers, b"%d" % prompt * 1100, holders).worker
            assert chosen.load <= max(routing.LOAD_RATIO * sum(now) / len(now), min(now) + routing.LOAD_SLACK)
            chosen.sent += 1

    def test_a_thousand_workers_are_loaded_evenly(self) -> None:
        pool, holders = Pool([worker(f"w{i}") for i in range(1000)]), routing.Holders()
        for _ in range(20_000):
            routing.choose(pool, "m", "s", b"", holders).worker.sent += 1
        loads = sorted(w.load for w in pool.workers)
        assert sum(loads) == 20_000
        assert loads[-1] <= 24, "20 each on average"
        assert loads[10] >= 15

    def test_of_a_thousand_a_prefix_still_finds_its_holder(self) -> None:
        pool, holders = Pool([worker(f"w{i}") for i in range(1000)]), routing.Holders()
        first = routing.choose(pool, "m", "s", b"x" * 5000, holders).worker
        for _ in range(20):
            assert routing.choose(pool, "m", "s", b"x" * 5000, holders) == (first, "prefix-4096")
        first.sent = 50
        assert routing.choose(pool, "m", "s", b"x" * 5000, holders).worker is not first

    def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(routing, "MAX_PREFIXES", 10)
        holders = routing.Holders()
        for number in range(100):
            for name in range(20):
                holders.note(b"%d" % number, str(name))
        assert len(holders._holders) == 10
        assert holders.of(b"99") == tuple(str(i) for i in range(12, 20))
        assert holders.of(b"5") == ()


class TestTable:
    def beat(self, name: str, state: str = "ready", in_flight: int = 0) -> bytes:
        return msgspec.json.encode(Heartbeat(name, f"{name}:1", state, [Model("m", 1)], in_flight=in_flight))  # type: ignore[arg-type]

    def test_life_of_a_worker(self) -> None:
        now = [0.0]
        table = WorkerTable(lambda: now[0])
        table.take(self.beat("a"))
        table.take(self.beat("b"))
        assert len(table.serving("m").workers) == 2
        table.take(self.beat("a", "stalled"))
        assert [w.beat.id for w in table.serving("m").workers] == ["b"]
        table.take(self.beat("b", "draining"))
        assert [w.beat.id for w in table.serving("m").workers] == ["a"], "a stalled worker is better than none"
        table.take(self.beat("a"))
        table.suspect("a:1")
        table.take(self.beat("b"))
        assert [w.beat.id for w in table.serving("m").workers] == ["b"]
        now[0] = 2.5
        table.take(self.beat("a"))
        assert len(table.serving("m").workers) == 2
        now[0] = 4.0
        table.expire()
        assert [w.beat.id for w in table.serving("m").workers] == ["a"]
        table.take(self.beat("a", "gone"))
        assert table.serving("m").workers == []
        table.take(b"{nonsense")

    def test_what_requests_ask_for_is_worked_out_on_change_only(self) -> None:
        table = WorkerTable()
        for name in "abc":
            table.take(self.beat(name))
        pool, models = table.serving("m"), table.models()
        table.take(self.beat("a", in_flight=7))
        assert table.serving("m") is pool, "new numbers are no change"
        assert table.models() is models
        assert pool.by_id["a"].load == 7
        for change in (self.beat("a", "stalled"), self.beat("a", "gone"), self.beat("d")):
            before = table.serving("m")
            table.take(change)
            assert table.serving("m") is not before
        for number in range(1000):
            assert table.serving(f"nobody has {number}").workers == []
        assert len(table._pools) == 1, "names that clients make up are not kept"

    def test_a_model_that_was_deleted_is_forgotten_one_that_went_with_its_worker_is_not(self) -> None:
        """A deleted model answered 503 until the gateway was started again (B4)."""
        def beat(name: str, *models: str, state: str = "ready") -> bytes:
            return msgspec.json.encode(Heartbeat(name, f"{name}:1", state, [Model(m, 1) for m in models]))  # type: ignore[arg-type]

        table = WorkerTable()
        for name in "ab":
            table.take(beat(name, "m", "ft:x", "ft:y"))
        table.take(beat("a", "m", "ft:y"))
        assert "ft:x" in table.known_models, "the other one still has it"
        table.take(beat("b", "m"))
        assert table.known_models == {"m", "ft:y"}
        table.take(beat("a", "m", "ft:y", state="gone"))
        assert "ft:y" in table.known_models, "its worker may be back"

    def test_one_that_was_deleted_while_its_worker_started_again_is_forgotten_after_a_while(self) -> None:
        now = [0.0]
        table = WorkerTable(lambda: now[0])

        def beat(name: str, *adapters: str, state: str = "ready") -> bytes:
            models = [Model("m", 1), *(Model(a, 1, parent="m") for a in adapters)]
            return msgspec.json.encode(Heartbeat(name, f"{name}:1", state, models))  # type: ignore[arg-type]

        for raw in (beat("a", "ft:x", "ft:y"), beat("a", state="gone"), beat("b", "ft:y")):
            table.take(raw)
        for now[0] in range(0, 400, 2):
            table.take(beat("b", "ft:y"))
            table.tend(connected=True)
            assert ("ft:x" in table.known_models) == (now[0] <= 300)
        assert table.known_models == {"m", "ft:y"}
        table.take(beat("b", state="gone"))
        for now[0] in range(400, 1000, 2):
            table.tend(connected=True)
        assert table.known_models == {"m"}, "a base may be back at any time"

    def test_load_never_leaks(self) -> None:
        table = WorkerTable()
        table.take(self.beat("a"))
        table.workers["a"].sent += 50
        assert table.workers["a"].load == 50
        table.take(self.beat("a", in_flight=0))
        assert table.workers["a"].load == 0


def told(failed: str, sent: str = "", status: str = "") -> attempts.Attempts:
    """What nginx' headers say."""
    names = (b"x-failed-worker", b"x-failed-sent", b"x-failed-status")
    return attempts.read(dict(zip(names, (text.encode("latin-1", "replace") for text in (failed, sent, status)), strict=True)))


class TestAttempts:
    def test_refused_then_died(self) -> None:
        seen = told(" a:1 b:1", "300 : 0 : 350 : 512", "200 : 502 : 200 : 502")
        assert seen == attempts.Attempts(("a:1", "b:1"), 1, False, "died")

    def test_a_retried_connection_counts_once(self) -> None:
        assert told("a:1", "0, 300 : 0, 900", "502, 200 : 502, 502").deaths == 1

    def test_refusal_by_the_engine_is_no_death(self) -> None:
        assert told("a:1", "300 : 900", "200 : 503").deaths == 0

    def test_timeout(self) -> None:
        assert told("a:1", "300 : 900", "200 : 504").timed_out

    @given(st.text(), st.text(), st.text())
    def test_anything_parses(self, failed: str, sent: str, status: str) -> None:
        told(failed, sent, status)


class TestKeys:
    @given(st.text(max_size=120))
    def test_junk_never_has_an_id(self, junk: str) -> None:
        assert keys.key_id_of(junk) is None

    def test_a_key_matches_itself_only(self) -> None:
        key, record = keys.make("x")
        assert keys.key_id_of(key) == record.id
        assert keys.matches(key, record)
        assert not keys.matches(keys.make("x")[0], record)
        assert key not in msgspec.json.encode(record).decode()

    @pytest.mark.parametrize("name", ["", "a" * 65, "x\ny", "../x", "{"])
    def test_names_are_plain(self, name: str) -> None:
        with pytest.raises(ValueError, match="name"):
            keys.make(name)


class TestDecode:
    @given(st.binary(max_size=300))
    def test_any_bytes_give_an_ask_or_an_api_error(self, raw: bytes) -> None:
        try:
            decode("/v1/chat/completions", raw, 16)
        except ApiError as error:
            assert error.status == 400

    @given(st.dictionaries(st.sampled_from(["model", "stream", "n", "max_tokens", "messages", "prompt", "zzz"]),
                           st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                                        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)))
    def test_any_json_gives_an_ask_or_a_400(self, document: dict) -> None:
        try:
            ask = decode("/v1/chat/completions", json.dumps(document).encode("utf-8", "surrogatepass"), 16)
        except InvalidRequest:
            return
        assert ask.model == document["model"]

    def test_a_whole_number_may_be_written_as_100_0(self) -> None:
        chat = '{"model":"m","messages":[],"max_tokens":%s}'
        for said in ("100", "100.0", "1e2"):
            assert decode("/v1/chat/completions", (chat % said).encode(), 16).max_tokens == 100
        for said in ("1.5", "-1", '"x"', "1e99", "true"):
            with pytest.raises(InvalidRequest, match="max_tokens"):
                decode("/v1/chat/completions", (chat % said).encode(), 16)

    @pytest.mark.parametrize(("path", "field"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")])
    def test_one_request_floods_no_engine(self, path: str, field: str) -> None:
        """300,000 prompts in 1.5 MB counted as one request (B11)."""
        def ask(prompts: object) -> None:
            decode(path, json.dumps({"model": "m", field: prompts}).encode(), 16)

        for few in ("x" * 9000, ["x"] * MAX_PROMPTS, [[1, 2]] * MAX_PROMPTS, list(range(100_000)), [], "[" * 2000):
            ask(few)
        decode(path, b'{"model":"m","%s":[%s]}' % (field.encode(), b" " * 5000), 16)
        ask(['a "quoted", [and] \\escaped\\" text'] * MAX_PROMPTS)
        ask([[{"role": "user", "content": 'a[i] "b[j]" \\"' * 1100}]])
        tracemalloc.start()
        decode(path, b'{"model":"m","%s":[%s1]}' % (field.encode(), b"1," * 1_000_000), 16)
        assert tracemalloc.get_traced_memory()[1] < 20e6, "nothing is made of each number"
        tracemalloc.stop()
        if path == "/v1/embeddings":
            talk = [{"role": "user", "content": "a"}]
            with pytest.raises(InvalidRequest, match="messages: 1025 are over"):
                decode(path, json.dumps({"model": "m", "input": "x", "messages": [talk] * 1025}).encode(), 16)
        for many in (["x"] * (MAX_PROMPTS + 1), [[1, 2]] * (MAX_PROMPTS + 1), ['\\"'] * (MAX_PROMPTS + 1)):
            with pytest.raises(InvalidRequest, match=f"{field}: {MAX_PROMPTS + 1} are over the limit"):
                ask(many)


MEGABYTES = 4 * 1024 * 1024
LONG = b'"' + b"1" * 30 + b'"'
HOSTILE = {
    "texts": (b"/v1/chat/completions", b'"messages":[1],"x":[' + b'"a",' * (MEGABYTES // 4 - 99) + LONG + b"]"),
    "empty texts": (b"/v1/chat/completions", b'"messages":[1],"x":[' + b'"",' * (MEGABYTES // 3 - 99) + LONG + b"]"),
    "long numbers": (b"/v1/chat/completions", b'"messages":[1],"x":[' + b"1234567890123456789," * (MEGABYTES // 20 - 99) + b"1]"),
    "long texts": (b"/v1/chat/completions", b'"messages":[1],"x":[' + (LONG + b",") * (MEGABYTES // 33 - 99) + b"1]"),
    "brackets in texts": (b"/v1/rerank", b'"query":"x","documents":[{},' + b'"{",' * (MEGABYTES // 4 - 99) + b"1]"),
    "texts of documents": (b"/v1/rerank", b'"query":"x","documents":[{},' + b'"",' * (MEGABYTES // 3 - 99) + b"1]"),
}


class TestNumbersAndBrackets:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_no_body_holds_everybody_up(self, kind: str) -> None:
        """Four megabytes of tiny texts took the gateway half a second (it looked at each)."""
        path, fields = HOSTILE[kind]
        body, took = b'{"model":"m",' + fields + b"}", []
        for _ in range(3):
            began = time.perf_counter()
            with contextlib.suppress(InvalidRequest):
                decode(path.decode(), body, 16)
            took.append(time.perf_counter() - began)
        assert min(took) < 0.2, took

    @given(document=st.recursive(
        st.integers(-(2**66), 2**66) | st.sampled_from([2**63, 2**63 - 1, -(2**63), -(2**63) - 1, 10**18, 1e25, 1.5e-30, 12345678901234567890.5])
        | st.text('a"\\[{}]:,.-1234567890', max_size=30),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('a"\\[{9', max_size=24), inner, max_size=4), max_leaves=12))
    def test_it_is_what_a_reader_of_json_finds(self, document: object) -> None:
        def numbers(value: object) -> Iterator[int]:
            if isinstance(value, dict | list):
                for inner in value.values() if isinstance(value, dict) else value:
                    yield from numbers(inner)
            elif isinstance(value, int):
                yield value

        def brackets(value: object) -> tuple[int, int]:
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            counts = [brackets(inner) for inner in inside]
            own = (isinstance(value, dict), isinstance(value, list))
            return tuple(own[at] + sum(count[at] for count in counts) for at in (0, 1))  # type: ignore[return-value]

        raw = json.dumps(document, ensure_ascii=False).encode()
        too_large = any(not -(2**63) <= number < 2**63 for number in numbers(document))
        try:
            decoding._refuse_large_integers(raw)
            refused = False
        except InvalidRequest:
            refused = True
        assert refused == too_large
        assert tuple(decoding._count_outside(raw, bracket) for bracket in (b"{", b"[")) == brackets(document)


def metered(
    events: list[bytes], hide: bool = True, path: str = "/v1/chat/completions", lost: bool = False
) -> tuple[bytes, Record]:
    """What a client sees of a stream, and the record."""
    sent: list[bytes] = []
    records: list[Record] = []

    class FakeMeter:
        def begin(self, record: Record) -> None: ...
        def end(self, record: Record) -> None:
            records.append(record)

    async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if lost:
            raise StreamLost("gone")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def receive() -> dict:
        options = "" if hide else ',"stream_options":{"include_usage":true}'
        return {"type": "http.request", "body": f'{{"model":"m","stream":true{options}}}'.encode()}

    async def send(message) -> None:  # type: ignore[no-untyped-def]
        sent.append(message.get("body", b""))

    scope = {"type": "http", "path": path, "method": "POST", "headers": []}
    asyncio.run(Metering(app, FakeMeter(), "w")(scope, receive, send))  # type: ignore[arg-type]
    return b"".join(sent), records[0]


TEXT = [b'data: {"choices":[{"delta":{"content":"%d"},"finish_reason":null}]}\n\n' % i for i in range(6)]
FINAL = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":6}}\n\n'
DONE = b"data: [DONE]\n\n"


class TestMetering:
    @pytest.mark.parametrize("tail", [b"", b'data: {"choices":[{"del', TEXT[2].strip() + b"\n"])
    def test_a_worker_lost_in_the_middle_of_an_event_is_no_success(self, tail: bytes) -> None:
        """The half event and the error became one event that nobody could read, and the outcome was ok."""
        seen, record = metered([*TEXT[:2], tail], lost=True)
        assert seen == TEXT[0] + TEXT[1] + engine_errors.in_stream("chat") + b"\n\n"
        assert record.outcome == "stream_error"

    def test_lost_within_its_first_event_somebody_else_may_answer(self) -> None:
        with pytest.raises(UpstreamFailed):
            metered([TEXT[0][:20]], lost=True)

    @pytest.mark.parametrize("said", [b'{"message":{"usage":{"input_tokens":"3"}}}', b'{"message":{"usage":{"cache_read_input_tokens":1.5}}}'])
    def test_odd_usage_ends_a_request_like_any(self, said: bytes) -> None:
        """It was in flight for ever, without a record."""
        seen, record = metered([b"data: " + said + b"\n\n", DONE], path="/v1/messages")
        assert (seen, record.outcome) == (b"data: " + said + b"\n\n" + DONE, "ok")

    def test_a_large_event_in_small_pieces_costs_no_square(self) -> None:
        """4 MB in pieces held the gateway's loop up for more than a second."""
        whole, event = sse.Whole(), b"data: " + b"x" * 4_000_000 + b"\n\n"
        began, taken = time.perf_counter(), []
        taken += [whole.take(event[at : at + 16384], more=True) for at in range(0, len(event), 16384)]
        assert b"".join(taken) == event
        assert [part for part in taken if part] == [event]
        assert time.perf_counter() - began < 1.0, "each piece looks at its own bytes; copying is all that grows"

    def test_an_event_without_end_is_not_held_for_ever(self) -> None:
        whole = sse.Whole()
        passed = sum(len(whole.take(b"x" * 1_000_000, more=True)) for _ in range(20))
        assert passed >= 20_000_000 - sse.MAX_HELD_BYTES

    @settings(max_examples=300)
    @given(st.lists(st.integers(0, 600), max_size=12), st.booleans())
    def test_any_chunking_gives_the_same_bytes(self, cuts: list[int], hide: bool) -> None:
        whole = b"".join([*TEXT, b": ping\n\n", FINAL, USAGE, DONE])
        edges = sorted({0, *[min(c, len(whole)) for c in cuts], len(whole)})
        pieces = [whole[a:b] for a, b in zip(edges, edges[1:], strict=False)]
        seen, record = metered(pieces, hide)
        assert seen == (whole.replace(USAGE, b"") if hide else whole)
        assert (record.outcome, record.prompt_tokens, record.completion_tokens) == ("ok", 9, 6)
        assert record.finish_reason == "stop"

    @pytest.mark.parametrize("body", [
        b'{"model":"m","stream":true,"stream_options":{},"x":1e999}',
        b'{"model":"m","stream":true,"x":' + b"9" * 5000 + b"}",
        b'{"model":"m","stream":true,"stream\\u005foptions":null}',
        b'{"model":"m","stream":true,"stream_options":{"include_usage":false,"z":[1e999]}}',
    ])
    def test_usage_is_asked_for_whatever_else_the_body_holds(self, body: bytes) -> None:
        changed = rewrite(body, usage=True)
        assert changed.count(b'"include_usage":true') == 1
        assert b"null" not in changed
        rest = body.split(b'"x":')[-1] if b'"x"' in body else b""
        assert rest.rstrip(b"}") in changed

    @example([488], True, b"\r\n", False, False)  # between the last CR and its LF
    @settings(max_examples=200)
    @given(st.lists(st.integers(0, 600), max_size=12), st.booleans(), st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.booleans())
    def test_streams_of_any_engine(self, cuts: list[int], hide: bool, end: bytes, spaced: bool, tight: bool) -> None:
        """LF or CRLF, a space after `data:` or none, spaces in the JSON or none: the same is recorded and hidden (C2)."""
        def said(events: list[bytes]) -> bytes:
            whole = b"".join(events)
            if spaced:
                whole = whole.replace(b'":', b'": ').replace(b',"', b', "')
            if tight:
                whole = whole.replace(b"data: {", b"data:{")
            return whole.replace(b"\n", end)

        whole, without = said([*TEXT, b": ping\n\n", FINAL, USAGE, DONE]), said([*TEXT, b": ping\n\n", FINAL, DONE])
        edges = sorted({0, *[min(c, len(whole)) for c in cuts], len(whole)})
        seen, record = metered([whole[a:b] for a, b in zip(edges, edges[1:], strict=False)], hide)
        assert seen == (without if hide else whole)
        assert (record.outcome, record.finish_reason) == ("ok", "stop")
        assert (record.prompt_tokens, record.completion_tokens) == (9, 6)

    def test_pings_are_no_tokens(self) -> None:
        _, record = metered([*TEXT[:3], *[b": ping\n\n"] * 50, DONE])
        assert record.tokens_estimated
        assert record.completion_tokens == 3

    def test_an_anthropic_stream_that_breaks_is_told_in_our_words(self) -> None:
        event = b'event: error\ndata: {"type":"error","error":{"type":"x","message":"at 0x7f"}}\n\n'
        seen, record = metered([event], path="/v1/messages")
        assert b"0x7f" not in seen
        assert seen.startswith(b"event: error\ndata: ")
        assert record.outcome == "stream_error"

    def test_text_that_looks_like_usage_is_left_alone(self) -> None:
        odd = b'data: {"choices":[{"delta":{"content":"\\"usage\\":{\\"error\\""},"finish_reason":null}]}\n\n'
        assert metered([odd, DONE])[0] == odd + DONE

    def test_an_error_event_is_ours_and_ends_the_stream(self) -> None:
        seen, record = metered([TEXT[0], b'data: {"error":{"message":"at 0x7f"}}\n\n', DONE])
        assert b"0x7f" not in seen
        assert b"[DONE]" not in seen
        assert record.outcome == "stream_error"

    @given(st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=20), max_size=4),
           st.none() | st.fixed_dictionaries({"include_usage": st.booleans()}))
    def test_asking_for_usage_changes_nothing_else(self, document: dict, options: dict | None) -> None:
        document = {**document, "model": "m", "x": '"stream_options"'}
        if options is not None:
            document["stream_options"] = options
        else:
            document.pop("stream_options", None)
        changed = json.loads(rewrite(json.dumps(document).encode(), usage=True))
        assert changed.pop("stream_options")["include_usage"] is True
        document.pop("stream_options", None)
        assert changed == document


class TestSettings:
    def test_short_or_missing_secrets_stop_the_start(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot read"):
            read_secret(tmp_path / "none")
        (tmp_path / "short").write_text("changeme")
        with pytest.raises(ValueError, match="8 characters"):
            read_secret(tmp_path / "short")

    def test_env_example_names_what_compose_reads_and_nothing_else(self) -> None:
        example = (ROOT / ".env.example").read_text()
        offered = set(re.findall(r"^#?\s?([A-Z][A-Z0-9_]+)=", example, re.M))
        used: set[str] = set()
        for path in ("compose.yaml", "services/worker/hardware.yaml", "services/trainer/hardware.yaml"):
            used |= set(re.findall(r"\$\{([A-Z][A-Z0-9_]+)[:}]", (ROOT / path).read_text()))
        assert offered == used

    def test_compose_sets_only_known_variables(self) -> None:
        import yaml

        settings = (Settings, WorkerSettings, JobsSettings, TrainerSettings, LedgerSettings, ExporterSettings)
        known = {name.upper() for each in settings for name in each.model_fields}
        known |= {"GATEWAY_PROCESSES", "HOME", "USER", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "NVIDIA_DRIVER_CAPABILITIES"}
        document = yaml.safe_load((ROOT / "compose.yaml").read_text())
        hardware = [yaml.safe_load((ROOT / f"services/{who}/hardware.yaml").read_text()) for who in ("worker", "trainer", "gpu_exporter")]
        for services in (each["services"] for each in (document, *hardware)):
            for name, service in services.items():
                if name not in ("nginx", "grafana", "alertmanager", "trtllm", "sglang"):  # a script and programs of others read theirs
                    assert set(service.get("environment", {})) <= known, name


class TestEngineCommand:
    def settings(self, tmp_path: Path, **fields: object) -> WorkerSettings:
        secret = tmp_path / "secret"
        secret.write_text("x" * 40)
        return WorkerSettings(redis_url="redis://r", redis_password_file=secret, worker_token_file=secret,
                              **{"model": "/models/m", "advertise_host": "h", **fields})  # type: ignore[arg-type]

    @pytest.mark.parametrize("fields", [
        {},
        {"accelerator": "cuda", "model": "mistralai/Mistral-7B-Instruct-v0.3", "tool_call_parser": "mistral", "model_revision": "abc"},
        {"accelerator": "cuda", "model": "meta-llama/Meta-Llama-3-8B-Instruct", "max_num_seqs": 32,
         "tensor_parallel_size": 2, "max_model_len": 8192, "engine_args": "--enable-chunked-prefill --seed 7"},
        {"otlp_traces_endpoint": "http://tempo:4318/v1/traces"},
    ])
    def test_vllms_own_parser_accepts_it(self, tmp_path: Path, fields: dict) -> None:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        wanted = self.settings(tmp_path, **fields)
        command = engine.command(wanted)
        cpu = wanted.accelerator == "cpu" and len(os.sched_getaffinity(0)) <= engine.SMALL_MACHINE_CORES
        assert command[1:3] == ["-m", "services.worker.vllm.serve" if cpu else "vllm.entrypoints.openai.api_server"]
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(command[3:])
        assert parsed.middleware == [engine.MIDDLEWARE]
        assert parsed.allowed_media_domains == [engine.NO_MEDIA_DOMAIN]
        assert parsed.allowed_origins == []
        assert parsed.disable_fastapi_docs is True
        assert parsed.served_model_name == [wanted.served_name]
        assert parsed.otlp_traces_endpoint == (wanted.otlp_traces_endpoint or None)
        assert parsed.enforce_eager is (wanted.accelerator == "cpu")
        assert parsed.max_num_seqs == (wanted.max_num_seqs or (64 if wanted.accelerator == "cpu" else 256))
        assert parsed.max_model_len == (wanted.max_model_len or (None if wanted.accelerator == "cpu" else -1)), "auto is -1"
        assert (parsed.revision, parsed.tokenizer_revision) == ((wanted.model_revision or None,) * 2)

    @pytest.mark.parametrize(("fields", "chunk"), [
        ({}, None), ({"accelerator": "cuda", "model": "mistralai/Mistral-7B-Instruct-v0.3", "kv_host_gib": 16}, 15),
    ])
    def test_vllms_own_parser_accepts_the_kv_tier(self, tmp_path: Path, fields: dict, chunk: int | None) -> None:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

        secret = tmp_path / "secret"
        wanted = self.settings(tmp_path, kv_tier="redis", cache_redis_url="redis://c", kv_secret_file=secret, **fields)
        command = engine.command(wanted)
        assert wanted.kv_secret not in " ".join(command)
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(command[3:])
        transfer = parsed.kv_transfer_config
        assert parsed.prefix_caching_hash_algo == "sha256_cbor"
        assert parsed.max_num_batched_tokens == (None if chunk else 512)
        assert KVConnectorFactory.get_connector_class(transfer).__name__ == "RedisOffloadingConnector"
        assert transfer.kv_load_failure_policy == "recompute"
        extra = transfer.kv_connector_extra_config
        assert extra.get("blocks_per_chunk") == chunk
        assert extra["cpu_bytes_to_use"] == int(wanted.kv_host_gib * 2**30)
        module = __import__(extra["spec_module_path"], fromlist=["x"])
        assert issubclass(getattr(module, extra["spec_name"]), TieringOffloadingSpec)

    def test_a_model_without_kv_blocks_starts_without_the_tier(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        for architecture, tiered in (("BertModel", False), ("LlamaForCausalLM", True), ("T5ForConditionalGeneration", False)):
            (tmp_path / "config.json").write_text(f'{{"architectures":["{architecture}"]}}')
            wanted = self.settings(tmp_path, model=str(tmp_path), kv_tier="redis", cache_redis_url="redis://c", kv_secret_file=secret)
            assert ("--kv-transfer-config" in engine.command(wanted)) is tiered

    def test_adapters_can_be_off_and_are_for_decoders(self, tmp_path: Path) -> None:
        for architecture, loras, on in (("BertModel", 4, False), ("LlamaForCausalLM", 4, True), ("LlamaForCausalLM", 0, False)):
            folder = tmp_path / f"{architecture}{loras}"
            folder.mkdir()
            (folder / "config.json").write_text(f'{{"architectures":["{architecture}"]}}')
            wanted = self.settings(tmp_path, model=str(folder), adapters_dir=tmp_path, max_loras=loras)
            assert ("--enable-lora" in engine.command(wanted)) is on

    @pytest.mark.parametrize(("model_type", "vocabulary", "parser"), [
        ("mistral", 32768, "mistral"), ("llama", 128256, "llama3_json"), ("llama", 49152, "hermes"), ("qwen2", 152064, "hermes"),
    ])
    def test_tool_calls_are_read_as_the_family_writes_them(self, tmp_path: Path, model_type: str, vocabulary: int, parser: str) -> None:
        from vllm.tool_parsers import ToolParserManager

        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": vocabulary}))
        assert engine.tool_parser(self.settings(tmp_path, model=str(tmp_path))) == parser
        assert ToolParserManager.get_tool_parser(parser)
        assert engine.tool_parser(self.settings(tmp_path, model=str(tmp_path), tool_call_parser="pythonic")) == "pythonic"

    def test_a_hub_model_is_known_by_what_was_fetched_of_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        snapshot = tmp_path / "models--org--bert/snapshots/abc"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text('{"architectures":["BertModel"]}')
        (tmp_path / "models--org--bert/refs").mkdir()
        (tmp_path / "models--org--bert/refs/main").write_text("abc")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        for revision in ("", "abc"):
            wanted = self.settings(tmp_path, model="org/bert", model_revision=revision, adapters_dir=tmp_path)
            assert "--enable-lora" not in engine.command(wanted)
        assert checkpoint.config("org/another") == {}

    def test_the_kv_tier_needs_its_redis_and_secret(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="CACHE_REDIS_URL and KV_SECRET_FILE"):
            self.settings(tmp_path, kv_tier="redis")

    def test_environment(self, tmp_path: Path) -> None:
        env = engine.environment(self.settings(tmp_path, model=str(tmp_path)))
        assert env["HF_HUB_OFFLINE"] == env["VLLM_NO_USAGE_STATS"] == "1"
        assert env["VLLM_CPU_KVCACHE_SPACE"] == "1"
        assert "VLLM_CPU_KVCACHE_SPACE" not in set(engine.environment(
            self.settings(tmp_path, accelerator="cuda"))) - set(os.environ)


class TestRepeat:
    """What a program does beside its requests goes on whatever happens: else workers that died stay in the table."""

    def rounds(self, *happens: Exception | bool | None) -> list[str]:
        """What is logged while the work ends so, one time after the other."""
        said: list[str] = []

        async def live() -> None:
            left = list(happens)
            self.registry = registry = CollectorRegistry()

            async def work() -> bool | None:
                if not left:
                    done.set()
                    return None
                happened = left.pop(0)
                if isinstance(happened, Exception):
                    raise happened
                return happened

            done = asyncio.Event()
            task = asyncio.create_task(tasks.repeat("it", work, 0.001, tasks.failures_counter(registry)))
            async with asyncio.timeout(5):
                await done.wait()
            await end_tasks([task])
            assert task.cancelled()

        sink = logger.add(lambda message: said.append(message.record["level"].name), level="INFO")
        try:
            asyncio.run(live())
        finally:
            logger.remove(sink)
        return said

    def test_it_goes_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tasks, "RETRY_S", 0.001)
        away = RedisError("away")
        assert self.rounds(None, None) == []
        assert self.rounds(RuntimeError("a bug"), None, RuntimeError("a bug")) == ["ERROR", "ERROR"]
        assert self.registry.get_sample_value("owngpt_background_failures_total", {"what": "it"}) == 2

        async def broken() -> None:
            cancelled = asyncio.get_running_loop().create_future()
            cancelled.cancel()
            await cancelled

        async def live() -> None:
            task = asyncio.create_task(tasks.repeat("it", broken, 0.001))
            await asyncio.sleep(0.05)
            assert not task.done(), "what it awaits was cancelled, not it"
            await end_tasks([task])

        asyncio.run(live())
        assert self.rounds(away, OSError("away"), None, None, away, None) == ["WARNING", "INFO", "WARNING", "INFO"]

    def test_work_that_was_not_its_turn_is_no_sign_of_life(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It said "goes on" every other second while redis was away."""
        monkeypatch.setattr(tasks, "RETRY_S", 0.001)
        away = RedisError("away")
        assert self.rounds(away, False, away, False, away, None, False) == ["WARNING", "INFO"]

    def test_a_failure_is_no_busy_loop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tasks, "RETRY_S", 0.05)
        began = time.monotonic()
        self.rounds(RuntimeError("a bug"), RedisError("away"))
        assert time.monotonic() - began >= 0.1
