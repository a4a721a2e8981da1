"""`/v1/responses` with state: real nginx, redis, gateway and the official SDK, before scripted engines."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from redis import Redis
from redis.exceptions import RedisError

from services.local.plan import ROOT
from tests.harness import Stack, running, wait_for

MODEL = "fake"


@pytest.fixture
def two(stack: Stack) -> Stack:
    stack.add_worker("w1")
    stack.add_worker("w2")
    return stack


def sdk(stack: Stack, key: str = "") -> openai.OpenAI:
    return openai.OpenAI(base_url=stack.base + "/v1", api_key=key or stack.key, max_retries=0)


@contextlib.contextmanager
def filled(redis: Redis) -> Iterator[None]:
    """A redis that refuses what grows, however much is freed meanwhile."""
    over = threading.Event()

    def fill() -> None:
        while not over.is_set():
            for size in (100_000, 1_000, 10):
                with contextlib.suppress(RedisError):
                    while True:
                        redis.set(f"key:{os.urandom(8).hex()}", "x" * size)

    filling = threading.Thread(target=fill)
    filling.start()
    time.sleep(1)
    yield
    over.set()
    filling.join()


def test_a_conversation_goes_on_wherever_it_is_answered(two: Stack) -> None:
    client = sdk(two)
    last, said, workers = None, [], set()
    for turn in range(6):
        raw = client.responses.with_raw_response.create(
            model=MODEL, input=f"t{turn}", previous_response_id=last, stream=False)
        response = raw.parse()
        workers.add(raw.headers["x-owngpt-worker"])
        assert response.previous_response_id == last
        assert response.id.startswith("resp_")
        assert response.store is True
        said += [f"t{turn}"]
        assert response.output_text == "<" + " | ".join(said) + ">"
        said += [response.output_text]
        last = response.id
        if turn == 3:  # whoever has had it so far is gone: any other one goes on
            two.kill(raw.headers["x-owngpt-worker"])
    assert len(workers) == 2
    assert client.responses.retrieve(last).output_text == response.output_text


def test_the_next_turn_prefers_the_worker_of_the_last(two: Stack) -> None:
    client, same = sdk(two), 0
    for _ in range(12):
        first = client.responses.with_raw_response.create(model=MODEL, input="a")
        second = client.responses.with_raw_response.create(model=MODEL, input="b", previous_response_id=first.parse().id)
        if "last-turn" in second.headers["server-timing"]:  # on a busy machine a heartbeat may be late
            assert second.headers["x-owngpt-worker"] == first.headers["x-owngpt-worker"]
            same += 1
    assert same >= 9


def test_a_stream_is_kept_before_its_end_is_told(shared: Stack) -> None:
    client = sdk(shared)
    first = client.responses.create(model=MODEL, input="a")
    events = list(client.responses.create(model=MODEL, input="b", previous_response_id=first.id, stream=True))
    assert [event.type for event in events] == [
        "response.created", "response.output_text.delta", "response.completed"]
    assert events[0].response.id == events[-1].response.id
    assert events[0].response.previous_response_id == events[-1].response.previous_response_id == first.id
    assert events[1].delta == 'x "response": {} \n\n'
    assert events[-1].response.store is True
    assert client.responses.retrieve(events[-1].response.id).output_text == "<a | <a> | b>"


def test_the_end_of_a_stream_comes_after_it_is_kept(shared: Stack) -> None:
    with shared.client() as client, client.stream(
        "POST", "/v1/responses", json={"model": MODEL, "input": "x", "stream": True}
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and '"response.completed"' in line:
                name = json.loads(line[6:])["response"]["id"]
                assert shared.redis().hget(f"response:{shared.record.id}:{name}", "response")


def test_what_stopped_at_its_limit_can_be_continued(shared: Stack) -> None:
    client = sdk(shared)
    first = client.responses.create(model=MODEL, input="stop")
    assert first.status == "incomplete"
    assert client.responses.create(model=MODEL, input="on", previous_response_id=first.id).output_text == "<stop | <stop> | on>"


def test_an_input_of_items_and_a_tool_turn(shared: Stack) -> None:
    client = sdk(shared)
    items = [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}, {"role": "user", "content": "b"}]
    first = client.responses.create(model=MODEL, input=items)  # type: ignore[arg-type]
    second = client.responses.create(model=MODEL, input="c", previous_response_id=first.id)
    assert second.output_text == "<a | b | <a | b> | c>"
    listed = client.responses.input_items.list(second.id, order="asc").data
    assert [item.content[0].text for item in listed] == ["a", "b", "<a | b>", "c"]  # type: ignore[union-attr]
    assert [item.content[0].type for item in listed] == ["input_text", "input_text", "output_text", "input_text"]  # type: ignore[union-attr]
    assert len({item.id for item in listed}) == 4
    pages = client.responses.input_items.list(second.id, order="asc", limit=3)
    assert [item.content[0].text for item in pages] == ["a", "b", "<a | b>", "c"]  # type: ignore[union-attr]
    assert [item.id for item in client.responses.input_items.list(second.id)] == [item.id for item in listed][::-1]


def test_not_stored_is_not_there(shared: Stack) -> None:
    client = sdk(shared)
    first = client.responses.create(model=MODEL, input="a", store=False)
    with pytest.raises(openai.NotFoundError, match="no response"):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=MODEL, input="b", previous_response_id=first.id)
    assert refused.value.code == "previous_response_not_found"
    assert refused.value.param == "previous_response_id"
    kept = client.responses.create(model=MODEL, input="a")
    aside = client.responses.create(model=MODEL, input="b", previous_response_id=kept.id, store=False)
    assert aside.output_text == "<a | <a> | b>"
    assert aside.store is False


def test_deleting(shared: Stack) -> None:
    client = sdk(shared)
    first = client.responses.create(model=MODEL, input="a")
    second = client.responses.create(model=MODEL, input="b", previous_response_id=first.id)
    client.responses.delete(first.id)
    for gone in (client.responses.delete, client.responses.retrieve):
        with pytest.raises(openai.NotFoundError):
            gone(first.id)
    with pytest.raises(openai.BadRequestError, match=first.id):  # its past is gone
        client.responses.create(model=MODEL, input="c", previous_response_id=second.id)
    assert client.responses.retrieve(second.id).output_text == "<a | <a> | b>"


def test_nobody_reads_what_is_anothers(shared: Stack) -> None:
    other = sdk(shared, shared.add_key("other")[0])
    mine = sdk(shared).responses.create(model=MODEL, input="secret")
    for call in (other.responses.retrieve, other.responses.delete, other.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            call(mine.id)
    with pytest.raises(openai.BadRequestError):
        other.responses.create(model=MODEL, input="b", previous_response_id=mine.id)
    assert httpx.get(f"{shared.base}/v1/responses/{mine.id}").status_code == 401


@pytest.mark.parametrize(("asked", "said"), [
    ({"background": True}, "batch"), ({"conversation": "conv_1"}, "previous_response_id"),
    ({"previous_response_id": "../x"}, "no id of a response"), ({"previous_response_id": 7}, "previous_response_id"),
    ({"store": "yes"}, "store"),
])
def test_what_there_is_none_of_is_refused_by_name(shared: Stack, asked: dict, said: str) -> None:
    with shared.client() as client:
        answer = client.post("/v1/responses", json={"model": MODEL, "input": "x", **asked})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_a_stored_response_is_neither_streamed_nor_cancelled(shared: Stack) -> None:
    name = sdk(shared).responses.create(model=MODEL, input="a").id
    with shared.client() as client:
        assert client.get(f"/v1/responses/{name}?stream=true").status_code == 400
        assert client.post(f"/v1/responses/{name}/cancel").status_code == 400
        assert client.get(f"/v1/responses/{name}/input_items?limit=1000").status_code == 400
        for after in ("x", f"item_{name}_9", f"item_{name}_" + "9" * 4400, f"item_{name}_-1", f"item_{name}_", f"item_{name}_\u0661"):
            assert client.get(f"/v1/responses/{name}/input_items", params={"after": after}).status_code == 400, after
        assert client.get("/v1/responses/resp_").status_code == 404
        assert client.delete("/v1/responses/..%2f..%2fx").status_code == 404


def test_an_error_of_the_engine_leaves_nothing(shared: Stack) -> None:
    before = shared.redis().zrange(f"responses:{shared.record.id}", 0, -1)
    with pytest.raises(openai.BadRequestError, match="odd"):
        sdk(shared).responses.create(model=MODEL, input="status 400")
    assert shared.redis().zrange(f"responses:{shared.record.id}", 0, -1) == before


def test_a_front_keeps_them_too(tmp_path) -> None:
    """Without our middleware in the engine, and without nginx."""
    with running(tmp_path, edge="none") as stack:
        stack.add_fronted("w1")
        client = sdk(stack)
        first = client.responses.create(model=MODEL, input="a")
        second = list(client.responses.create(model=MODEL, input="b", previous_response_id=first.id, stream=True))[-1]
        assert second.response.output_text == "<a | <a> | b>"  # type: ignore[union-attr]
        assert client.responses.retrieve(second.response.id).output_text == "<a | <a> | b>"  # type: ignore[union-attr]
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model=MODEL, input="b", previous_response_id="resp_" + "0" * 20)
        assert refused.value.code == "previous_response_not_found"


def test_a_frozen_redis_delays_one_answer_not_all(tmp_path) -> None:
    with running(tmp_path) as stack:
        stack.add_worker("w1")
        client = sdk(stack)
        client.responses.create(model=MODEL, input="a")
        stack.kill("redis", signal.SIGSTOP)
        took = []
        for _ in range(8):
            began = time.monotonic()
            assert client.responses.create(model=MODEL, input="b").store is False
            took.append(time.monotonic() - began)
        stack.kill("redis", signal.SIGCONT)
        assert max(took) < 2.5
        assert sorted(took)[4] < 0.5, took
        wait_for(lambda: client.responses.create(model=MODEL, input="c").store, "kept again", 20)
        warned = [line["event"] for line in stack.log("w1") if "responses are" in line["event"]]
        assert warned == ["redis is away; responses are not kept", "redis is back; responses are kept"]


def test_bounded_in_bytes_the_least_recently_used_go_first(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESPONSES_MAX_BYTES", "30000")
    monkeypatch.setenv("RESPONSE_TTL_S", "60")  # what was used within a thousandth of it is not written down again
    with running(tmp_path) as stack:
        stack.add_worker("w1")
        client = sdk(stack)
        used = client.responses.create(model=MODEL, input="u" * 1000).id
        stale = client.responses.create(model=MODEL, input="s" * 1000).id
        made = []
        for _ in range(12):
            made.append(client.responses.create(model=MODEL, input="m" * 1000).id)
            time.sleep(0.07)
            client.responses.create(model=MODEL, input="-", previous_response_id=used, store=False)
        assert client.responses.retrieve(used)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(stale)
        redis = stack.redis()
        sizes = redis.hgetall(f"responsesizes:{stack.record.id}")
        assert int(sizes.pop("total")) == sum(map(int, sizes.values())) <= 30000
        names = redis.zrange(f"responses:{stack.record.id}", 0, -1)
        assert set(names) == set(sizes) == {k.split(":")[2] for k in redis.scan_iter(f"response:{stack.record.id}:*")}
        large = client.responses.create(model=MODEL, input="l" * 40000)
        assert large.store is False  # said, not dropped in silence
        assert client.responses.retrieve(made[-1])


def test_a_state_redis_that_is_full_answers_and_says_that_it_keeps_nothing(tmp_path) -> None:
    with running(tmp_path, redis_maxmemory="12mb") as stack:
        stack.add_worker("w1")
        client = sdk(stack)
        kept = client.responses.create(model=MODEL, input="a")
        with filled(stack.redis()):
            answer = client.responses.create(model=MODEL, input="b", previous_response_id=kept.id)
            assert answer.output_text == "<a | <a> | b>"
            assert answer.store is False
            last = list(client.responses.create(model=MODEL, input="c", previous_response_id=kept.id, stream=True))[-1]
            assert last.response.store is False  # type: ignore[union-attr]
        names = stack.redis().zrange(f"responses:{stack.record.id}", 0, -1)
        assert names == [kept.id]
        assert set(stack.redis().hgetall(f"responsesizes:{stack.record.id}")) == {kept.id, "total"}


def test_redis_away(tmp_path) -> None:
    with running(tmp_path) as stack:
        stack.add_worker("w1")
        client = sdk(stack)
        kept = client.responses.create(model=MODEL, input="a")
        stack.kill("redis")
        answer = client.responses.create(model=MODEL, input="b")
        assert answer.store is False
        with pytest.raises(openai.InternalServerError) as refused:
            client.responses.retrieve(kept.id)
        assert refused.value.status_code == 503
        with pytest.raises(openai.ConflictError) as later:  # no worker's failure: none is avoided for it
            client.responses.create(model=MODEL, input="b", previous_response_id=kept.id)
        assert (later.value.code, later.value.response.headers["retry-after"]) == ("state_unavailable", "1")
        assert not any(line["event"] == "worker failed a request" for line in stack.log("gateway"))


def test_what_says_store_can_be_continued(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third turn made room by deleting the first, and said that it was stored."""
    monkeypatch.setenv("RESPONSES_MAX_BYTES", "60000")
    with running(tmp_path) as stack:
        stack.add_worker("w1")
        client = sdk(stack)
        other = client.responses.create(model=MODEL, input="o" * 3000).id
        turns = [client.responses.create(model=MODEL, input="t" * 1500)]
        while turns[-1].store:
            turns.append(client.responses.create(model=MODEL, input="t" * 1500, previous_response_id=turns[-1].id))
            if turns[-1].store:
                client.responses.create(model=MODEL, input="-", previous_response_id=turns[-1].id, store=False)
        assert len(turns) > 3
        assert client.responses.retrieve(other), "its going would not have been enough"
        for turn in turns[:-1]:
            client.responses.retrieve(turn.id)
        gone = turns[-2]
        client.responses.delete(turns[0].id)
        aside = client.responses.create(model=MODEL, input="-")
        assert aside.store is True, "there is room again"
        with pytest.raises(openai.BadRequestError):
            client.responses.create(model=MODEL, input="-", previous_response_id=gone.id)
        # What is left of it can be read, to the gap.
        listed = client.responses.input_items.list(gone.id, order="asc", limit=100).data
        assert len(listed) == 2 * (len(turns) - 3) + 1


def test_a_conversation_is_bounded_in_bytes(shared: Stack) -> None:
    client, last, made = sdk(shared), None, 0
    with pytest.raises(openai.BadRequestError) as refused:
        while made < 10:
            last = client.responses.create(
                model=MODEL, previous_response_id=last,
                input=[{"role": "user", "content": "x", "padding": "p" * 500_000}]).id  # type: ignore[list-item]
            made += 1
    assert refused.value.code == "conversation_too_long"
    assert 3 <= made <= 5
    assert client.responses.input_items.list(last, limit=1).data[0].type == "message"


def test_odd_items_are_listed_by_their_place(shared: Stack) -> None:
    client = sdk(shared)
    odd = '{"model":"fake","input":[{"role":"user","content":"a","id":"x","n":1e999},' \
          '{"role":"user","content":"b","id":"x"},{"role":"user","content":"c"}]}'
    with shared.client() as http:
        made = http.post("/v1/responses", content=odd, headers={"content-type": "application/json"}).json()
        raw = http.get(f"/v1/responses/{made['id']}/input_items?order=asc")
    assert raw.status_code == 200
    assert raw.headers["content-type"] == "application/json"
    assert b"1e999" in raw.content
    assert [item.content[0].text for item in client.responses.input_items.list(made["id"], order="asc", limit=1)] == ["a", "b", "c"]  # type: ignore[union-attr]


def test_a_revoked_key_leaves_nothing(stack: Stack) -> None:
    stack.add_worker("w1")
    key, record = stack.add_key("short")
    first = sdk(stack, key).responses.create(model=MODEL, input="a")
    sdk(stack, key).responses.create(model=MODEL, input="b", previous_response_id=first.id)
    mine = sdk(stack).responses.create(model=MODEL, input="c")
    subprocess.run([sys.executable, "-m", "gateway.keys", "revoke", record.id], env=stack.env("gateway"), check=True, cwd=ROOT)
    assert [name for name in stack.redis().scan_iter("response*") if record.id in name] == []
    assert sdk(stack).responses.retrieve(mine.id)


def test_other_routes_have_no_state(shared: Stack) -> None:
    """Such fields concerned nobody there before, and concern nobody now."""
    with shared.client() as client:
        answer = client.post("/v1/chat/completions", json={
            "model": MODEL, "messages": [{"role": "user", "content": "say 1"}], "store": "yes", "background": 1,
            "previous_response_id": 7, "conversation": []})
    assert answer.status_code == 200


def test_a_wrong_id_is_wrong_also_while_no_worker_is_ready(stack: Stack) -> None:
    with stack.client() as client:
        answer = client.post("/v1/responses", json={"model": MODEL, "input": "x", "previous_response_id": "nope"})
    assert answer.status_code == 400
