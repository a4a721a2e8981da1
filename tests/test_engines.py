"""Engines beside each other behind one gateway (`tests/engines.py`). Each is asked the twenty requests of `contract.py`."""

import json
import os
from collections.abc import Iterator

import httpx
import pytest

from common import engines
from services.local.plan import Dials
from services.worker.vllm.command import SMALL_MACHINE_CORES
from tests import contract
from tests.engines import ENGINES, beside, client, failover
from tests.harness import wait_for
from tests.up import Up


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Up, dict[str, int]]]:
    with beside(tmp_path_factory.mktemp("engines")) as both:
        yield both


@pytest.fixture(scope="module")
def up(both: tuple[Up, dict[str, int]]) -> Up:
    return both[0]


@pytest.mark.parametrize("model", ENGINES)
def test_twenty_requests(up: Up, model: str) -> None:
    assert len(contract.CASES) == 20
    before = len(up.records())
    with client(up) as asking:
        assert contract.run(asking, model, ENGINES[model]) == {}
    paid = [json.loads(record) for record in up.records()[before:]]
    good = [record for record in paid if record["outcome"] == "ok" and record["model"] == model]
    assert len(good) >= 8, paid
    assert all(record["completion_tokens"] > 0 for record in good if record["route"] not in ("tokenize", "count_tokens"))


@pytest.mark.parametrize("model", ENGINES)
def test_who_leaves_frees_the_engine(up: Up, model: str) -> None:
    with client(up) as asking:
        contract.leave_early(asking, model)
        wait_for(lambda: next(w for w in asking.get("/v1/status").json()["workers"] if w["models"] == [model])["in_flight"] == 0,
                 "nothing runs", 20)
    outcomes = [json.loads(record)["outcome"] for record in up.records() if json.loads(record)["model"] == model]
    assert outcomes[-1] == ("cancelled" if model not in ("trt", "sgl") else outcomes[-1])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) > SMALL_MACHINE_CORES, reason="vLLM deals out the cores of a larger machine itself")
def test_nothing_is_imported_again(up: Up) -> None:
    """vLLM's own way made three interpreters of an engine, one after the other."""
    running = up.everything().values()
    assert any("services.worker.vllm.serve" in command for command in running)
    assert not [command for command in running if "spawn_main" in command]


def test_all_are_listed_with_their_lengths(up: Up) -> None:
    listed = {model.id: (model.model_extra or {})["max_model_len"] for model in up.sdk.models.list().data}
    assert listed == {"chat": 4096, "llama": listed["llama"], "theirs": 8192, "trt": 2048, "sgl": 2048}
    assert 4096 < listed["llama"] < 8192, "eight sequences at once share a GiB, and none another's"
    status = httpx.get(up.base + "/v1/status", headers={"authorization": f"Bearer {up.key}"}).json()
    assert {w["models"][0]: w["engine"] for w in status["workers"]} == ENGINES


def test_nothing_is_dropped_in_silence(up: Up) -> None:
    """Every field of a list of many that vLLM takes, at each engine: refused by its name, or sent on."""
    fields = {"min_p": 0.1, "top_k": 5, "repetition_penalty": 1.1, "min_tokens": 2, "stop_token_ids": [5], "bad_words": ["x"],
              "structured_outputs": {"regex": "a"}, "truncate_prompt_tokens": 5, "length_penalty": 0.5, "allowed_token_ids": [5],
              "return_token_ids": True, "include_stop_str_in_output": True, "thinking_token_budget": 5}
    with client(up) as asking:
        for model, engine in ENGINES.items():
            if engine == "vllm":
                continue
            for name, value in fields.items():
                answer = asking.post(contract.CHAT, json={"model": model, **contract.chat(max_tokens=2), name: value})
                if name in engines.LIMITED[engine][contract.CHAT]:
                    assert answer.status_code == 200, (model, name, answer.text)
                else:
                    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name), (model, name, answer.text)


def test_what_is_ours_does_not_reach_them(both: tuple[Up, dict[str, int]]) -> None:
    up, ports = both
    with client(up) as asking:
        body = {**contract.chat(), "user": "ada", "store": True, "metadata": {"a": "b"}, "prompt_cache_key": "x"}
        for model in ("trt", "sgl"):
            assert asking.post(contract.CHAT, json={"model": model, **body}).status_code == 200
            got = httpx.get(f"http://127.0.0.1:{ports[model]}/seen").json()[-1]
            assert not {"user", "store", "metadata", "prompt_cache_key", "priority"} & got.keys()
            assert got["model"] == "double"
            assert "cache_salt" in got, "two keys do not share what they wrote"


def test_an_error_of_theirs_keeps_its_words(up: Up) -> None:
    with client(up) as asking:
        for model in ("trt", "sgl", "llama"):
            said = asking.post(contract.CHAT, json={"model": model, **contract.chat("dog " * 30_000)})
            assert said.status_code == 400
            assert "context" in said.json()["error"]["message"]


def test_its_numbers_are_scraped(up: Up) -> None:
    found = {}
    for target in json.loads((Dials(up.state).run_dir / "targets.json").read_text())[0]["targets"]:
        text = httpx.get(f"http://{target}/metrics").text
        found |= {name: text for name in ("vllm:", "llamacpp:", "sglang:", "trtllm_") if name in text}
        assert "owngpt_requests" in text, target
    assert found.keys() == {"vllm:", "llamacpp:", "sglang:", "trtllm_"}


def test_another_engine_of_the_same_name_takes_over(both: tuple[Up, dict[str, int]]) -> None:
    assert failover(*both) == []
    with client(both[0]) as one:
        answer = one.post(contract.CHAT, json={"model": "chat", **contract.chat(prompt_logprobs=1)})
        assert answer.status_code in (200, 503), "vLLM alone takes it: back, or about to be"
