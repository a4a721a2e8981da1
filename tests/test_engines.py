"""Engines beside each other behind one gateway: vLLM, llama.cpp, a llama.cpp server that somebody else runs and that asks
for a key, and the doubles of those that do not run here. Each is asked the twenty requests of `contract.py`.
"""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from bench.hosts import local
from common import engines
from services.local.model import bundled_file
from services.local.plan import ROOT, Dials
from tests import contract
from tests.harness import free_ports, wait_for
from tests.up import Up, started

KEY = "sk-of-their-server-0123456789"
THEIRS = """
import sys, threading, xllamacpp
told = xllamacpp.CommonParams()
told.model.path, told.model_alias, told.api_keys = sys.argv[1], {"their-name"}, [sys.argv[3]]
told.n_ctx, told.n_parallel, told.kv_unified, told.port, told.verbosity = 8192, 4, True, int(sys.argv[2]), 1
server = xllamacpp.Server(told)
threading.Event().wait()
"""
ENGINES = {"chat": "vllm", "llama": "llamacpp", "theirs": "llamacpp", "trt": "trtllm", "sgl": "sglang"}
"""Model -> the engine whose fields are taken: that of somebody's server is recognised."""


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("engines")
    ports = free_ports(3)
    (folder / "key").write_text(KEY)
    (folder / "models.yaml").write_text(catalog(ports))
    with contextlib.ExitStack() as running:
        for command in (["-c", THEIRS, str(bundled_file()), str(ports[0]), KEY], ["-m", "tests.doubles", "trtllm", str(ports[1])],
                        ["-m", "tests.doubles", "sglang", str(ports[2])]):
            process = running.enter_context(subprocess.Popen([sys.executable, *command], cwd=ROOT))
            running.callback(process.kill)
        with started(folder, 0, MODELS_FILE=str(folder / "models.yaml")) as up:
            up.doubles = dict(zip(("theirs", "trt", "sgl"), ports, strict=True))  # type: ignore[attr-defined]
            yield up


def catalog(ports: list[int], *more: dict[str, object]) -> str:
    return yaml.safe_dump({"models": [
        {"name": "chat", "source": "bundled", "max_tokens": 4096},
        {"name": "llama", "source": "bundled", "engine": "llamacpp", "adapters": False},
        {"name": "theirs", "source": "their-name", "engine": "attached", "url": f"http://127.0.0.1:{ports[0]}/v1", "key_file": "key"},
        {"name": "trt", "source": "double", "engine": "trtllm", "url": f"http://127.0.0.1:{ports[1]}", "max_tokens": 2048},
        {"name": "sgl", "source": "double", "engine": "sglang", "url": f"http://127.0.0.1:{ports[2]}"},
        *more,
    ]})


def client(up: Up) -> httpx.Client:
    return httpx.Client(base_url=up.base, headers={"authorization": f"Bearer {up.key}"}, timeout=120)


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


def test_what_is_ours_does_not_reach_them(up: Up) -> None:
    with client(up) as asking:
        body = {**contract.chat(), "user": "ada", "store": True, "metadata": {"a": "b"}, "prompt_cache_key": "x"}
        for model in ("trt", "sgl"):
            assert asking.post(contract.CHAT, json={"model": model, **body}).status_code == 200
            got = httpx.get(f"http://127.0.0.1:{up.doubles[model]}/seen").json()[-1]  # type: ignore[attr-defined]
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


def test_another_engine_of_the_same_name_takes_over(up: Up, tmp_path: Path) -> None:
    """llama.cpp joins as `chat`; vLLM is killed while both answer: no request that is no stream fails."""
    file = up.state.parent / "models.yaml"
    file.write_text(catalog(list(up.doubles.values()), {"name": "chat", "engine": "llamacpp", "source": "bundled"}))  # type: ignore[attr-defined]
    done = local(up, "apply")
    assert done.returncode == 0, done.stdout + done.stderr
    by, failed, over = set(), [], threading.Event()

    def stream_of_requests() -> None:
        with client(up) as asking:
            while not over.is_set():
                answer = asking.post(contract.CHAT, json={"model": "chat", **contract.chat()}, headers=contract.HEADERS)
                if answer.status_code == 200:
                    by.add(answer.headers["x-owngpt-worker"].rpartition("-")[0])
                else:
                    failed.append(answer.text)

    asking = [threading.Thread(target=stream_of_requests) for _ in range(3)]
    for thread in asking:
        thread.start()
    wait_for(lambda: len(by) == 2, "both engines answer", 30)
    subprocess.run(["kill", "-9", *map(str, up.engine_pids())], check=True)
    time.sleep(8)
    over.set()
    for thread in asking:
        thread.join()
    assert failed == []
    with client(up) as one:
        answer = one.post(contract.CHAT, json={"model": "chat", **contract.chat(prompt_logprobs=1)})
        assert answer.status_code in (200, 503), "vLLM alone takes it: back, or about to be"
