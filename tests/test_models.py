"""Three models in one stack, from models.yaml: a chat model that is always there, and two that take turns, one of which embeds
(all-MiniLM-L6-v2 from PyPI). Then models.yaml changes, and everything is started anew, under load.
"""

import contextlib
import json
import math
import time
import xmlrpc.client
from collections.abc import Iterator

import httpx
import openai
import pytest

from bench.hosts import Streams, local, three_models
from services.local.apply import NEXT_GATEWAY
from services.local.commands import running_stack
from services.local.programs import gateway
from tests.harness import wait_for
from tests.up import Up, started

NAME = "minilm"
LIKE = ("A cat sits on the mat.", "A kitten rests on the rug.")
UNLIKE = "The stock market fell sharply."


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "models.yaml").write_text(three_models(max_tokens=2048))
    with started(folder, 0, MODELS_FILE=str(folder / "models.yaml")) as up:
        yield up


def states(up: Up) -> dict[str, str]:
    status = httpx.get(up.base + "/v1/status", headers={"authorization": f"Bearer {up.key}"}).json()
    return {worker["models"][0]: worker["state"] for worker in status["workers"]}


def ask(up: Up, path: str, **body: object) -> httpx.Response:
    return httpx.post(up.base + path, json={"model": NAME, **body}, headers={"authorization": f"Bearer {up.key}"}, timeout=60)


def test_all_are_listed_and_the_first_request_wakes_one(up: Up) -> None:
    assert sorted(model.id for model in up.sdk.models.list().data) == ["chat", NAME, "second"]
    assert states(up) == {"chat": "ready", "second": "asleep", NAME: "asleep"}
    began = time.monotonic()
    assert up.ask("Say hello.", model="second")
    took = time.monotonic() - began
    assert states(up) == {"chat": "ready", "second": "ready", NAME: "asleep"}
    line = [line for line in (up.state / "logs/worker-second-1.log").read_text().splitlines() if '"engine ready"' in line][-1]
    engine_s = float(json.loads(line)["after_s"])
    assert took < 1.25 * engine_s + 2, f"{took:.1f} s, of which the engine {engine_s:.1f} s"
    listed = {model.id: model.model_extra["max_model_len"] for model in up.sdk.models.list().data if model.model_extra}
    assert (listed["second"], listed["chat"]) == (2048, 8192)


def test_embeddings_through_the_sdk(up: Up) -> None:
    found = up.sdk.embeddings.create(model=NAME, input=[*LIKE, UNLIKE])
    vectors = [row.embedding for row in found.data]
    assert [len(vector) for vector in vectors] == [384] * 3

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2]) + 0.3
    assert found.usage.prompt_tokens > 10


def test_rerank_score_and_pooling(up: Up) -> None:
    ranked = ask(up, "/v1/rerank", query=LIKE[0], documents=[UNLIKE, LIKE[1]]).json()["results"]
    assert [row["index"] for row in ranked] == [1, 0]
    scores = [row["score"] for row in ask(up, "/v1/score", text_1=LIKE[0], text_2=[LIKE[1], UNLIKE]).json()["data"]]
    assert scores[0] > scores[1] + 0.3
    assert len(ask(up, "/v1/pooling", input=LIKE[0]).json()["data"][0]["data"]) == 384


def test_every_request_leaves_its_record(up: Up) -> None:
    wait_for(lambda: {json.loads(raw)["route"] for raw in up.records()} >= {"embeddings", "rerank", "score", "pooling"}, "records", 10)
    for record in map(json.loads, up.records()):
        if record["outcome"] == "ok":
            assert record["prompt_tokens"] > 0, record


def test_what_it_cannot_is_refused_by_name(up: Up) -> None:
    for path, body in (("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}), ("/v1/classify", {"input": "x"})):
        answer = ask(up, path, **body)
        assert answer.status_code in (400, 404), answer.text
        assert NAME in answer.json()["error"]["message"] or path in answer.json()["error"]["message"]
    for path in ("/v1/rerank", "/v1/score", "/v1/classify", "/v1/pooling"):
        assert ask(up, path).json()["error"]["param"]
    many = ask(up, "/v1/rerank", query="x", documents=["x"] * 1025)
    assert (many.status_code, many.json()["error"]["param"]) == (400, "documents")


def test_a_batch_of_embeddings(up: Up) -> None:
    rows = [{"custom_id": f"{n}", "method": "POST", "url": "/v1/embeddings", "body": {"model": NAME, "input": f"Number {n}."}} for n in range(20)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = up.sdk.files.create(file=("in.jsonl", content), purpose="batch")
    made = up.sdk.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    wait_for(lambda: up.sdk.batches.retrieve(made.id).status == "completed", "completed", 60)
    lines = [json.loads(line) for line in up.sdk.files.content(up.sdk.batches.retrieve(made.id).output_file_id or "").text.splitlines()]
    assert [len(line["response"]["body"]["data"][0]["embedding"]) for line in lines] == [384] * 20


def test_a_model_that_cannot_be_tuned_is_refused(up: Up) -> None:
    rows = "".join(json.dumps({"question": f"q{n}", "answer": "a"}) + "\n" for n in range(12)).encode()
    file = up.sdk.files.create(file=("t.jsonl", rows), purpose="fine-tune")
    for model in (NAME, "second"):
        with pytest.raises(openai.APIStatusError, match="There are: chat"):
            up.sdk.fine_tuning.jobs.create(model=model, training_file=file.id)


def test_apply_touches_only_what_changed(up: Up) -> None:
    pids = {name: up.program_pid(name) for name in ("worker-chat-1", f"worker-{NAME}-1", "gateway", "nginx", "trainer")}
    file = up.state.parent / "models.yaml"
    file.write_text(three_models(max_token=1))
    wrong = local(up, "apply")
    assert (wrong.returncode, "line" in wrong.stderr, "max_token" in wrong.stderr) == (1, True, True), wrong.stderr
    file.write_text(three_models(max_tokens=1024))
    with Streams(up) as load:
        done = local(up, "apply")
        assert done.returncode == 0, done.stderr
    assert "1 new, 1 gone, 2 as they were" in done.stdout
    assert load.failures == []
    assert load.took_s
    assert {name: up.program_pid(name) for name in pids} == pids
    with contextlib.suppress(openai.APIStatusError):
        up.ask("x", model="second")
    assert next(m.model_extra for m in up.sdk.models.list().data if m.id == "second") ["max_model_len"] == 1024
    assert "0 new, 0 gone, 3 as they were" in local(up, "apply").stdout


def test_everything_is_started_anew_and_nothing_fails(up: Up) -> None:
    before = {name: up.program_pid(name) for name in ("worker-chat-1", "gateway")}
    with Streams(up) as load:
        done = local(up, "restart")
        assert done.returncode == 0, done.stderr
        time.sleep(1)
    assert load.failures == []
    assert up.program_pid("gateway") != before["gateway"]
    assert up.program_pid("worker-chat-2") != before["worker-chat-1"]
    assert up.ask("Say hello.", model="chat")


def test_a_restart_that_was_broken_off_is_finished_by_the_next_change(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next gateway had the socket; `make apply` removed it, and nobody had started the gateway again."""
    monkeypatch.setenv("STATE_DIR", str(up.state))
    with running_stack() as stack:
        extra = gateway(stack._dials, stack._free_port(), NEXT_GATEWAY)
        stack._configure(stack.workers, [extra])
        stack._await_gateway(NEXT_GATEWAY, extra)
        stack._supervisor.stopProcessGroup("gateway")  # and here it was broken off
    with Streams(up, clients=1) as load:
        done = local(up, "apply")
        time.sleep(1)
    assert done.returncode == 0, done.stderr
    assert "broken off" in done.stdout
    assert load.failures == []
    assert up.ask("Say hello.", model="chat")
    with pytest.raises(xmlrpc.client.Fault, match="BAD_NAME"):
        up.program_pid(NEXT_GATEWAY)
