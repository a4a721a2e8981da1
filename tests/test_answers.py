"""Answers from memory: what counts as the same question, the two shapes of an answer, and the way through the stack."""

import asyncio
import concurrent.futures
import contextlib
import json
import signal
import time
from collections.abc import Callable

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter

from common.answers import transcript
from common.answers.store import HEADER, Stored
from common.keys import make
from common.metering import context
from common.metering.context import Keep
from common.metering.metered import Metering
from common.metering.rewrite import rewrite
from gateway.answers import Answers, Flight
from gateway.decode import Ask, decode
from gateway.isolation import Scopes
from gateway.question import IGNORED, MAX_QUESTION_BYTES, Question, ask_question, may_be_remembered
from gateway.steps import run
from tests.harness import Stack, body, running, wait_for

CHAT = "/v1/chat/completions"
KNOWN = {field.name for field in msgspec.structs.fields(Ask)}
BASE = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
JSON = st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=5)


def question(document: dict | bytes, *headers: tuple[bytes, bytes], scope: str = "s", revision: str = "r") -> Question | None:
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    ask = decode(CHAT, raw, 16)
    if not may_be_remembered("chat", ask, raw, dict(headers)):
        return None
    return ask_question("chat", ask, ask.model, raw, scope, revision)


class TestQuestion:
    @settings(max_examples=300)
    @given(st.text(min_size=1, max_size=12).filter(lambda name: name not in IGNORED | KNOWN), JSON, JSON)
    def test_any_other_field_makes_another_question(self, name: str, value: object, other: object) -> None:
        """Known or not: an allow-list would leave out the field that the next engine adds."""
        plain, with_value = question(BASE), question({**BASE, name: value})
        assert plain is not None
        assert with_value is not None
        assert with_value.name != plain.name
        if json.dumps(value) != json.dumps(other):
            assert question({**BASE, name: other}).name != with_value.name  # type: ignore[union-attr]

    @pytest.mark.parametrize("change", [
        {"model": "n"}, {"messages": [{"role": "user", "content": "hi "}]}, {"seed": 1}, {"max_tokens": 5}, {"top_p": 0.5},
        {"n": 2}, {"tools": []}, {"cache_salt": "x"}, {"stop": "a"}, {"logprobs": True}, {"temperature": 0.0}, {"temperature": 0.5, "seed": 1},
    ])
    def test_known_fields_count_too(self, change: dict) -> None:
        assert question({**BASE, **change}).name != question(BASE).name  # type: ignore[union-attr]

    def test_scope_and_revision_count(self) -> None:
        names = {question(BASE, scope=s, revision=r).name for s in "ab" for r in "cd"}  # type: ignore[union-attr]
        assert len(names) == 4
        assert question(BASE, scope="ab", revision="c").name != question(BASE, scope="a", revision="bc").name  # type: ignore[union-attr]

    @pytest.mark.parametrize("change", [
        {"stream": True}, {"stream": False}, {"user": "u"}, {"metadata": {"a": "b"}},
        {"stream": True, "stream_options": {"include_usage": True}}, {"stream_options": None},
    ])
    def test_what_does_not_change_the_answer_does_not_count(self, change: dict) -> None:
        assert question({**BASE, **change}).name == question(BASE).name  # type: ignore[union-attr]

    def test_order_and_spaces_between_fields_do_not_count(self) -> None:
        spaced = b'{ "temperature" : 0, "messages": [ {"role": "user", "content":"hi"} ],\n "model":"m"}'
        assert question(spaced).name == question(BASE).name  # type: ignore[union-attr]

    @pytest.mark.parametrize(("change", "headers", "cached"), [
        ({}, (), True), ({"temperature": 0.0}, (), True), ({"temperature": 0.1}, (), False), ({"temperature": None}, (), False),
        ({"temperature": 1, "seed": 0}, (), True), ({"temperature": 1, "seed": None}, (), False),
        ({"temperature": 1}, ((HEADER, b"use"),), True), ({"temperature": 1}, ((HEADER, b"please"),), False),
        ({}, ((b"cache-control", b"no-store"),), False), ({}, ((HEADER, b"use"), (b"cache-control", b"max-age=0, no-store")), False),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, (), False),
    ])
    def test_who_may_be_answered_from_memory(self, change: dict, headers: tuple, cached: bool) -> None:
        assert (question({**BASE, **change}, *headers) is not None) is cached

    def test_a_large_body_takes_the_fast_path(self) -> None:
        assert question({**BASE, "messages": [{"role": "user", "content": "x" * MAX_QUESTION_BYTES}]}) is None

    def test_an_alias_asks_what_its_model_is_asked(self) -> None:
        raw = json.dumps({**BASE, "model": "alias"}).encode()
        asked = ask_question("chat", decode(CHAT, raw, 16), "m", raw, "s", "r")
        assert asked.name == question(BASE).name  # type: ignore[union-attr]

    def test_an_unknown_revision_is_never_cached(self) -> None:
        assert question(BASE, revision="") is None


def sse(*chunks: dict) -> bytes:
    return b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks) + transcript.DONE


def chunk(delta: dict | None, index: int = 0, **more: object) -> dict:
    part = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "m", "choices": [part]}


END = {"id": "chatcmpl-1", "created": 5, "model": "m", "choices": [],
       "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}


class TestTranscript:
    @given(st.lists(st.text(max_size=8), min_size=1, max_size=6), st.integers(1, 3), st.booleans())
    def test_a_stream_and_its_document_say_the_same(self, pieces: list[str], count: int, usage: bool) -> None:
        chunks = [chunk({"role": "assistant", "content": ""}, i) for i in range(count)]
        chunks += [chunk({"content": p + str(i)}, i, logprobs={"content": [{"token": p}]}) for p in pieces for i in range(count)]
        chunks += [chunk({}, i, finish_reason="stop") for i in range(count)]
        document = transcript.from_events("chat", sse(*chunks, END))
        assert document is not None
        assert document["usage"] == END["usage"]
        for index, choice in enumerate(document["choices"]):
            assert choice["message"]["content"] == "".join(p + str(index) for p in pieces)
            assert len(choice["logprobs"]["content"]) == len(pieces)
        again = transcript.to_events("chat", document, usage=True)
        assert again is not None
        assert transcript.from_events("chat", again) == document
        assert (b'"usage":{' in (transcript.to_events("chat", document, usage=usage) or b"")) is usage

    def test_tool_calls(self) -> None:
        def call(index: int, **function: str) -> dict:
            return chunk({"tool_calls": [{"index": index, "id": "c" if "name" in function else None, "type": "function",
                                          "function": function}]})

        document = transcript.from_events("chat", sse(
            chunk({"role": "assistant", "content": None}), call(0, name="f", arguments=""), call(0, arguments='{"a":'),
            call(0, arguments="1}"), call(1, name="g", arguments="{}"), chunk({}, finish_reason="tool_calls"), END))
        assert document is not None
        calls = document["choices"][0]["message"]["tool_calls"]
        assert [c["function"] for c in calls] == [{"name": "f", "arguments": '{"a":1}'}, {"name": "g", "arguments": "{}"}]
        assert transcript.from_events("chat", transcript.to_events("chat", document, usage=True) or b"") == document

    def test_completions(self) -> None:
        def part(text: str, **more: object) -> dict:
            return {"id": "cmpl-1", "created": 1, "model": "m", "choices": [{"index": 0, "text": text, "finish_reason": None, **more}]}

        document = transcript.from_events("completions", sse(
            part("a", logprobs={"tokens": ["a"], "text_offset": [0]}), part("b", logprobs={"tokens": ["b"], "text_offset": [1]}),
            part("", finish_reason="length"), END))
        assert document is not None
        assert document["choices"][0]["text"] == "ab"
        assert document["choices"][0]["logprobs"] == {"tokens": ["a", "b"], "text_offset": [0, 1]}
        assert transcript.from_events("completions", transcript.to_events("completions", document, usage=True) or b"") == document

    @pytest.mark.parametrize("stream", [
        sse(chunk({"content": "a"}), END),  # no end
        sse(chunk({"content": "a"}, finish_reason="stop")),  # no usage
        sse(chunk({"content": "a"}, finish_reason="stop"), END)[: -len(transcript.DONE)],  # cut
        sse(chunk({"content": "a"}, finish_reason="error"), END),
        sse(chunk({"content": "a", "audio": {"id": 1}}, finish_reason="stop"), END),  # not known here
        sse({**chunk({"content": "a"}, finish_reason="stop"), "news": 1}, END),
        sse(chunk({"content": "a"}, finish_reason="stop", token_ids=[1]), END),
        b'data: {"error":{}}\n\n' + sse(chunk({"content": "a"}, finish_reason="stop"), END), b"", b"junk",
    ])
    def test_what_broke_or_is_not_known_is_not_kept(self, stream: bytes) -> None:
        assert transcript.from_events("chat", stream) is None

    def test_a_document_that_a_stream_cannot_say_is_asked_again(self) -> None:
        document = {**END, "object": "chat.completion", "choices": [{"index": 0, "finish_reason": "stop", "message": {
            "role": "assistant", "content": "a", "annotations": [{"x": 1}]}}]}
        asked = Question("n", "chat", True, False)
        assert asked.render(document, "r") is None
        assert Question("n", "chat", False, False).render(document, "r") is not None


class TestScopes:
    def test_keys_are_apart_unless_told_otherwise(self) -> None:
        a, b, c, d = (make(name, scope)[1] for name, scope in (("a", ""), ("b", ""), ("c", "team"), ("d", "team")))
        apart = Scopes("s" * 24, "key")
        assert len({apart.salt(apart.of(k)) for k in (a, b, c, d)}) == 3
        assert apart.of(c) == apart.of(d)
        together = Scopes("s" * 24, "all")
        assert len({together.of(k) for k in (a, b, c, d)}) == 1

    def test_nobody_can_guess_or_name_anothers_scope(self) -> None:
        a = make("a")[1]
        with pytest.raises(ValueError, match="scope"):
            make("x", f"key {a.id}\n")
        assert Scopes("s" * 24, "key").salt("x") != Scopes("t" * 24, "key").salt("x")
        assert Scopes("s" * 24, "key").of(make("x", f"key {a.id}")[1]) != Scopes("s" * 24, "key").of(a)

    @given(st.dictionaries(st.text(max_size=6), JSON, max_size=4), JSON)
    def test_a_clients_own_salt_never_leads_out_of_its_scope(self, document: dict, own: object) -> None:
        salted = json.loads(rewrite(json.dumps({**document, "cache_salt": own}).encode(), usage=False, salt="a" * 32))
        plain = json.loads(rewrite(json.dumps(document).encode(), usage=False, salt="a" * 32))
        other = json.loads(rewrite(json.dumps({**document, "cache_salt": "a" * 32}).encode(), usage=False, salt="b" * 32))
        assert {k: v for k, v in salted.items() if k != "cache_salt"} == {k: v for k, v in document.items() if k != "cache_salt"}
        assert (salted["cache_salt"] == plain["cache_salt"]) is (own is None or "cache_salt" in document)
        assert other["cache_salt"] not in (salted["cache_salt"], "a" * 32)


def ask(stack: Stack, script: str, key: str = "", headers: dict | None = None, **fields: object) -> httpx.Response:
    with httpx.Client(base_url=stack.base, timeout=20) as client:
        return client.post(CHAT, headers={"authorization": f"Bearer {key or stack.key}", **(headers or {})},
                           json=body(script, **{"temperature": 0, **fields}))


def text(response: httpx.Response) -> str:
    if response.headers["content-type"].startswith("application/json"):
        return response.json()["choices"][0]["message"]["content"]
    found = [json.loads(e[6:]) for e in response.text.split("\n\n") if e.startswith("data: {")]
    assert response.text.endswith("data: [DONE]\n\n")
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in found if c["choices"])


def cache_of(response: httpx.Response) -> list[str]:
    return response.headers.get_list("x-owngpt-cache")


class TestStack:
    def test_miss_then_hit_in_both_shapes(self, shared: Stack) -> None:
        first = ask(shared, "say 5 one")
        assert cache_of(first) == ["miss"]
        again, stream = ask(shared, "say 5 one"), ask(shared, "say 5 one", stream=True)
        assert [cache_of(r) for r in (again, stream)] == [["hit"], ["hit"]]
        assert text(first) == text(again) == text(stream)
        assert again.json()["usage"] == first.json()["usage"]
        assert again.json()["id"] != first.json()["id"]
        assert '"usage":{' not in stream.text
        asked = ask(shared, "say 5 one", stream=True, stream_options={"include_usage": True})
        assert '"usage":{' in asked.text

    def test_a_stream_fills_the_cache_and_shows_no_usage_nobody_asked_for(self, shared: Stack) -> None:
        first = ask(shared, "say 6 two", stream=True)
        assert cache_of(first) == ["miss"]
        assert "usage" not in first.text
        second = ask(shared, "say 6 two")
        assert cache_of(second) == ["hit"]
        assert text(first) == text(second)
        assert second.json()["usage"]["completion_tokens"] == 6

    def test_the_first_client_gets_chunks_as_they_come(self, shared: Stack) -> None:
        stamps = []
        with shared.client() as client, client.stream("POST", CHAT, json=body("trickle 20 chunks", temperature=0, stream=True)) as response:
            stamps.extend(time.monotonic() for _ in response.iter_raw())
        assert len(stamps) > 5
        assert stamps[-1] - stamps[0] > 0.02

    def test_not_determined_not_asked_and_no_store_bypass(self, shared: Stack) -> None:
        for fields, headers in (({"temperature": 0.7}, {}), ({}, {"cache-control": "no-store"})):
            for _ in range(2):
                assert cache_of(ask(shared, "say 3 three", headers=headers, **fields)) == ["bypass"]
        opted = [cache_of(ask(shared, "say 3 three", headers={"x-owngpt-cache": "use"}, temperature=0.7)) for _ in range(2)]
        assert opted == [["miss"], ["hit"]]

    def test_tenants_share_nothing_unless_their_scope_says_so(self, shared: Stack) -> None:
        other, team1, team2 = shared.add_key("o")[0], shared.add_key("p", "team")[0], shared.add_key("q", "team")[0]
        assert [cache_of(ask(shared, "say 4 four", key)) for key in ("", other, team1, team2, "")] == [
            ["miss"], ["miss"], ["miss"], ["hit"], ["hit"]]

    def test_every_request_carries_its_scopes_salt_to_the_engine(self, shared: Stack) -> None:
        team1, team2 = shared.add_key("t", "salty")[0], shared.add_key("u", "salty")[0]
        salts = [ask(shared, "echo body", key, temperature=1, **more).json()["cache_salt"] for key, more in (
            ("", {}), ("", {}), (team1, {}), (team2, {}), ("", {"cache_salt": "mine"}), (team1, {"cache_salt": "mine"}))]
        assert salts[0] == salts[1]
        assert salts[2] == salts[3]
        assert len(set(salts)) == 4
        assert "mine" not in salts

    def test_identical_misses_at_once_are_answered_once(self, shared: Stack) -> None:
        before = len(shared.redis().xrange("usage"))
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda n: ask(shared, "slow 0.4 flight", stream=bool(n % 2)), range(12)))
        assert len({text(r) for r in found}) <= 2  # the fake's stream and document have other words
        assert sorted(said for r in found for said in cache_of(r)) == ["hit"] * 11 + ["miss"]
        wait_for(lambda: len(shared.redis().xrange("usage")) >= before + 12, "12 records")
        workers = [json.loads(f["r"])["worker"] for _, f in shared.redis().xrange("usage")[before:]]
        assert workers.count("answer-cache") == 11

    def test_a_slow_reader_holds_nobody_up(self, shared: Stack) -> None:
        """Whoever asks the same waits for the stored answer, not for the first one's client (B10)."""
        with shared.client() as client, client.stream("POST", CHAT, json=body("say 2000 slowly", temperature=0, stream=True)) as leader:
            assert leader.headers["x-owngpt-cache"] == "miss"
            began = time.monotonic()
            with concurrent.futures.ThreadPoolExecutor(3) as pool:
                found = list(pool.map(lambda _: ask(shared, "say 2000 slowly", stream=True), range(3)))
            took_s = time.monotonic() - began
            assert [cache_of(r) for r in found] == [["hit"]] * 3
            unread = leader.read()  # only now does the first client read
            assert text(found[0]) == text(leader)
            assert len(unread) > 100_000
        assert took_s < 15

    def test_many_failures_in_a_row_are_one_after_the_other(self, shared: Stack) -> None:
        """The first client leaves; of those who wait one goes on, and the others wait for that one."""
        before = len(shared.redis().xrange("usage"))
        with concurrent.futures.ThreadPoolExecutor(6) as pool, shared.client() as client:
            with pytest.raises(httpx.ReadTimeout):
                first = pool.submit(lambda: client.post(CHAT, json=body("slow 1 row", temperature=0), timeout=0.3))
                time.sleep(0.1)
                others = [pool.submit(ask, shared, "slow 1 row") for _ in range(5)]
                first.result()
            found = [other.result() for other in others]
        assert sorted(said for r in found for said in cache_of(r)) == ["hit"] * 4 + ["miss"]
        wait_for(lambda: len(shared.redis().xrange("usage")) >= before + 6, "records")
        workers = [json.loads(f["r"])["worker"] for _, f in shared.redis().xrange("usage")[before:]]
        assert workers.count("answer-cache") == 4, "two ran on workers: the first, and one of the others"

    def test_errors_are_not_kept_and_do_not_hold_others_up(self, shared: Stack) -> None:
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: ask(shared, "status 400 flight"), range(6)))
        assert [r.status_code for r in found] == [400] * 6
        assert time.monotonic() - began < 3
        assert cache_of(ask(shared, "error after 3", stream=True)) == ["miss"]
        assert cache_of(ask(shared, "error after 3", stream=True)) == ["miss"]

    def test_a_client_that_leaves_takes_nobody_with_it(self, shared: Stack) -> None:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            with shared.client() as client, pytest.raises(httpx.ReadTimeout):
                leader = pool.submit(lambda: client.post(CHAT, json=body("slow 0.8 leave", temperature=0), timeout=0.3))
                time.sleep(0.1)
                others = [pool.submit(ask, shared, "slow 0.8 leave") for _ in range(3)]
                leader.result()
            assert [r.result().status_code for r in others] == [200] * 3

    def test_a_hit_leaves_a_record(self, shared: Stack) -> None:
        ask(shared, "say 9 nine")
        request_id = ask(shared, "say 9 nine").headers["x-request-id"]
        wait_for(lambda: any(json.loads(f["r"])["request_id"] == request_id for _, f in shared.redis().xrange("usage")), "a record")
        record = next(r for _, f in shared.redis().xrange("usage") if (r := json.loads(f["r"]))["request_id"] == request_id)
        assert (record["worker"], record["outcome"], record["completion_tokens"], record["cached_tokens"]) == ("answer-cache", "ok", 9, 7)

    def test_damaged_and_foreign_entries_are_misses(self, shared: Stack) -> None:
        ask(shared, "say 8 eight")
        cache = shared.cache()
        name = question_name(shared, "say 8 eight")
        good = cache.get(name)
        other = cache.get(question_name(shared, "say 9 nine")) or b"x" * 50
        for bad in (good[:-1] + b"x", good[32:], b"", b"{}", other, b"\0" * 32 + good[32:]):
            cache.set(name, bad)
            response = ask(shared, "say 8 eight")
            assert cache_of(response) == ["miss"]
            assert text(response) == "x" * 8
            wait_for(lambda bad=bad: cache.get(name) != bad, "stored again")
            assert len(cache.get(name)) == len(good)


def question_name(stack: Stack, script: str) -> str:
    """The name under which the stack keeps an answer, computed anew."""
    raw = json.dumps(body(script, temperature=0), separators=(",", ":")).encode()
    scopes = Scopes((stack.dials.secrets / "gateway/cache_secret").read_text().strip(), "key")
    found = ask_question("chat", decode(CHAT, raw, 16), "fake", raw, scopes.of(stack.record), "r1")
    assert found is not None
    return found.name


class TestFaults:
    def test_redis_cache_killed_frozen_and_back(self, stack: Stack) -> None:
        stack.add_worker("w1")
        assert cache_of(ask(stack, "say 2")) == ["miss"]
        stack.running["redis-cache"].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        away = (["miss"], ["bypass"])  # bypass: by now the worker has said that it keeps none
        assert cache_of(ask(stack, "say 2")) in away
        assert ask(stack, "say 4").status_code == 200
        assert time.monotonic() - began < 2
        stack.running["redis-cache"].send_signal(signal.SIGCONT)
        wait_for(lambda: cache_of(ask(stack, "say 2")) == ["hit"], "a hit again")
        stack.kill("redis-cache")
        assert cache_of(ask(stack, "say 2")) in away
        (stack.dials.run_dir / "redis-cache.sock").unlink(missing_ok=True)
        stack.start_cache()
        wait_for(lambda: cache_of(ask(stack, "say 2")) == ["hit"], "filled and found again", 40)

    def test_workers_that_disagree_about_the_model_are_not_cached(self, stack: Stack) -> None:
        stack.add_worker("w1")
        stack.add_worker("w2", "--revision", "r2")
        assert [cache_of(ask(stack, "say 2")) for _ in range(2)] == [["bypass"], ["bypass"]]

    def test_a_new_revision_makes_a_new_question(self, stack: Stack) -> None:
        stack.add_worker("w1")
        assert [cache_of(ask(stack, "say 2")) for _ in range(2)] == [["miss"], ["hit"]]
        stack.kill("w1")
        wait_for(lambda: stack.ready_count() == 0, "worker gone")
        stack.add_worker("w2", "--revision", "r2")
        assert [cache_of(ask(stack, "say 2")) for _ in range(2)] == [["miss"], ["hit"]]

    def test_without_nginx(self, tmp_path) -> None:
        with running(tmp_path, edge="none") as stack:
            stack.add_worker("w1")
            for stream in (False, True):
                first, second = (ask(stack, f"say 7 {stream}", stream=stream) for _ in range(2))
                assert [cache_of(first), cache_of(second)] == [["miss"], ["hit"]]
                assert text(first) == text(second)
                assert "usage" not in first.text or not stream
            assert cache_of(ask(stack, "say 7", temperature=1)) == ["bypass"]

    def test_of_an_engine_whose_files_nobody_knows_nothing_is_kept(self, tmp_path) -> None:
        with running(tmp_path) as stack:
            stack.add_fronted("w1")
            assert [cache_of(ask(stack, "say 7")) for _ in range(2)] == [["bypass"], ["bypass"]]
            assert "cache_salt" not in ask(stack, "echo body").json()


class FakeStore:
    """A store in memory, as slow as it is told."""

    def __init__(self) -> None:
        self.found: dict[str, Stored] = {}
        self.reads: list[list[str]] = []
        self.away = False

    async def read(self, names: list[str]) -> list[Stored | None]:
        self.reads.append(list(names))
        await asyncio.sleep(0)
        return [self.found.get(name) for name in names]

    async def close(self) -> None: ...


SAID = {"choices": [{"index": 0}], "usage": {}}


class TestKeeping:
    """The answer is stored when the engine has made it, whenever its reader reads."""

    def metered(self, reading: asyncio.Event, count: int, max_bytes: int = 100_000) -> tuple[dict, list[bytes], list[str]]:
        """(what is stored, what the reader got, the order of things) for a stream whose reader waits for `reading`."""
        stored: dict[str, object] = {}
        got: list[bytes] = []
        order: list[str] = []

        class Store:
            async def write(self, name: str, document: object, ttl_s: int, max_bytes: int) -> None:
                stored[name] = document
                order.append("stored")

        class Meter:
            unread = contextlib.nullcontext

            def begin(self, record: object) -> None: ...

            def end(self, record: object) -> None:
                order.append("ended")

        async def app(scope: object, receive: object, send: Callable) -> None:
            await receive()  # type: ignore[operator]
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
            for event in [*[chunk({"content": "x" * 50})] * count, chunk({}, finish_reason="stop"), END]:
                await send({"type": "http.response.body", "more_body": True, "body": b"data: " + json.dumps(event).encode() + b"\n\n"})
            order.append("made")
            await send({"type": "http.response.body", "body": transcript.DONE})

        async def receive() -> dict:
            return {"type": "http.request", "body": b'{"model":"m","stream":true}'}

        async def send(message: dict) -> None:
            await reading.wait()
            got.append(message.get("body", b""))

        keep = Keep("q", 60, "w", max_bytes)
        header = context.encode(context.Context("u", "r", "k", keep=keep))
        scope = {"type": "http", "path": CHAT, "method": "POST", "headers": [(context.CONTEXT, header)]}

        async def run_it() -> None:
            task = asyncio.create_task(Metering(app, Meter(), "w", store=Store())(scope, receive, send))  # type: ignore[arg-type]
            await asyncio.sleep(0.1)
            order.append("read")
            reading.set()
            await asyncio.wait_for(task, 5)

        asyncio.run(run_it())
        return stored, got, order

    def test_a_reader_that_reads_nothing_holds_nothing_up(self) -> None:
        stored, got, order = self.metered(asyncio.Event(), 500)
        assert order == ["made", "stored", "ended", "read"]
        assert stored["q"]["choices"][0]["message"]["content"] == "x" * 50 * 500  # type: ignore[index]
        assert b"".join(got).count(b"data: {") == 501, "usage is hidden, the rest is there"
        assert got[-1].endswith(transcript.DONE)

    def test_what_is_too_large_goes_at_its_readers_pace(self) -> None:
        stored, got, order = self.metered(asyncio.Event(), 500, max_bytes=1000)
        assert order.index("read") < order.index("made")
        assert stored == {"q": None}
        assert len(b"".join(got)) > 50 * 500


class TestFlights:
    """Whoever asks what is being answered waits for the stored answer; when there will be none, one goes on alone."""

    def answers(self) -> tuple[Answers, FakeStore, dict[str, bool | None]]:
        store, running = FakeStore(), dict[str, bool | None]()

        async def is_running(worker_id: str, uid: str) -> bool | None:
            return running.get(uid, False)

        count = Counter("x", "x", ("result",), registry=CollectorRegistry())
        return Answers(store, is_running, count, 60, 10_000, 30.0), store, running  # type: ignore[arg-type]

    def test_look_ups_of_one_turn_are_one_round_trip(self) -> None:
        async def ask() -> None:
            answers, store, _ = self.answers()
            asked = [Question(f"q{i % 5}", "chat", False, False) for i in range(20)]
            assert await asyncio.gather(*(run(answers.find(q)) for q in asked)) == [(None, True)] * 20
            assert store.reads == [["q0", "q1", "q2", "q3", "q4"]]

        asyncio.run(ask())

    def test_followers_get_the_stored_answer(self) -> None:
        async def ask() -> None:
            answers, store, running = self.answers()
            question, running["u"] = Question("q", "chat", False, False), True
            assert await run(answers.find(question)) == (None, True)
            answers.lead(question, "u", "w")
            waiting = [asyncio.create_task(run(answers.find(question))) for _ in range(5)]
            await asyncio.sleep(0.1)
            waiting.pop().cancel()  # whoever leaves takes nobody with it
            store.found["q"] = Stored(SAID)
            assert await asyncio.gather(*waiting) == [(SAID, False)] * 4
            assert answers._flights == {}

        asyncio.run(ask())

    @pytest.mark.parametrize("how", ["lost", "refused", "nobody knows"])
    def test_one_goes_on_alone_when_the_first_fails(self, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gateway.answers.GRACE_S", 0.0)
        monkeypatch.setattr("gateway.answers.UNKNOWN_S", 0.1)

        async def ask() -> None:
            answers, _, running = self.answers()
            question, running["u0"] = Question("q", "chat", False, False), None if how == "nobody knows" else how != "lost"
            answers.lead(question, "u0", "w")
            led: list[str] = []

            async def follow(uid: str) -> None:
                document, worth = await run(answers.find(question))
                assert (document, worth) == (None, True)
                assert "q" not in answers._flights, "one at a time"
                answers.lead(question, uid, "w")
                running[uid] = True
                led.append(uid)
                await asyncio.sleep(0.05)
                answers.failed("q", uid)

            waiting = [asyncio.create_task(follow(f"u{i}")) for i in range(1, 4)]
            await asyncio.sleep(0.05)
            if how == "refused":
                answers.failed("q", "u0")
            await asyncio.gather(*waiting)
            assert len(led) == 3

        asyncio.run(ask())

    def test_nobody_waits_for_what_is_not_kept(self) -> None:
        async def ask() -> None:
            answers, store, running = self.answers()
            question, running["u"] = Question("q", "chat", False, False), True
            answers.lead(question, "u", "w")
            waiting = [asyncio.create_task(run(answers.find(question))) for _ in range(5)]
            await asyncio.sleep(0.05)
            store.found["q"] = Stored(None)
            assert await asyncio.gather(*waiting) == [(None, False)] * 5, "all at once, each alone, none to be kept"

        asyncio.run(ask())

    def test_another_attempt_of_the_first_keeps_the_others_waiting(self) -> None:
        answers, _, _ = self.answers()
        question = Question("q", "chat", False, False)
        assert answers.lead(question, "u", "w1").worker == "w1"
        assert answers.lead(question, "u", "w2").worker == "w2"
        assert answers._flights["q"] == Flight("u", "w2", answers._flights["q"].since)
        assert answers.lead(question, "b", "w1", batch=True).worker == "w1"
        assert not answers._flights["q"].batch
        assert answers.lead(question, "other", "w1").worker == "w1"
        assert answers._flights["q"].uid == "u"
        answers.failed("q", "other")
        assert "q" in answers._flights

    def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gateway.answers.MAX_FLIGHTS", 10)
        answers, _, _ = self.answers()
        for number in range(30):
            answers.lead(Question(f"q{number}", "chat", False, False), f"u{number}", "w")
        assert list(answers._flights) == [f"q{number}" for number in range(20, 30)]
        answers._flights["q20"].over = object()  # type: ignore[assignment]  # somebody waits for it
        answers.lead(Question("one more", "chat", False, False), "u", "w")
        assert "q20" in answers._flights
        assert "q21" not in answers._flights
        answers._flights["q20"].over = None
        answers._longest_s = 0.0
        answers.tend()
        assert answers._flights == {}
