"""`services/worker/front.py` before a server that does what servers do: compresses, redirects, sets cookies, refuses, is slow."""

import asyncio
import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from services.worker import dialects, llamacpp
from services.worker.front import Front, answered, one_tool
from services.worker.settings import WorkerSettings
from tests.harness import free_ports, wait_for

CHAT = "/v1/chat/completions"
METRICS = b'# HELP x\nvllm:num_requests_waiting{engine="0"} 2.0'


class Odd:
    """The server. What a request says in `script` it does."""

    def __init__(self) -> None:
        self.port, self.got = free_ports(1)[0], []  # type: ignore[var-annotated]
        self.owner = "somebody"
        app = FastAPI()
        app.get("/v1/models")(self.models)
        app.get("/metrics")(self.metrics)
        app.post(CHAT)(self.chat)
        app.post("/v1/responses")(self.chat)
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        wait_for(lambda: self.server.started, "the odd server")

    def packed(self, request: Request, body: bytes, kind: str) -> Response:
        """Compressed, where that may be."""
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(gzip.compress(body), media_type=kind, headers={"content-encoding": "gzip"})
        return Response(body, media_type=kind)

    async def models(self, request: Request) -> Response:
        return self.packed(request, json.dumps({"data": [{"id": "m", "owned_by": self.owner}]}).encode(), "application/json")

    async def metrics(self, request: Request) -> Response:
        return self.packed(request, METRICS, "text/plain")

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.got.append((body, dict(request.headers)))
        script = body["messages"][0]["content"] if "messages" in body else "say"
        if script == "redirect":
            return RedirectResponse(f"http://127.0.0.1:{self.port}/elsewhere", 307)
        if script.startswith("status"):
            return JSONResponse({"error": {"message": "Incorrect API key provided: sk-ours"}}, int(script.split()[1]),
                                headers={"retry-after": "7"})
        return JSONResponse({"choices": [], "usage": {}}, headers={"set-cookie": "who=first", "x-request-id": "theirs"})


@pytest.fixture(scope="module")
def odd() -> Iterator[Odd]:
    odd = Odd()
    yield odd
    odd.server.should_exit = True
    odd.thread.join()


def settings(folder: Path, **fields: object) -> WorkerSettings:
    (folder / "secret").write_text("x" * 40)
    return WorkerSettings(redis_url="redis://r", redis_password_file=folder / "secret", worker_token_file=folder / "secret",
                          **{"engine": "attached", "engine_url": "http://x", "advertise_host": "h", **fields})  # type: ignore[arg-type]


def asked(odd: Odd, folder: Path, *requests: tuple[str, str, dict[str, Any] | None], **fields: object) -> list[httpx.Response]:
    """Answers of a front before it."""
    async def ask() -> list[httpx.Response]:
        front = Front(settings(folder, **fields), f"http://127.0.0.1:{odd.port}/v1", "sk-ours")
        inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        outbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        life = asyncio.create_task(front({"type": "lifespan"}, inbox.get, outbox.put))  # type: ignore[arg-type]
        await inbox.put({"type": "lifespan.startup"})
        await outbox.get()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(answered(front)), base_url="http://f") as client:
            for _ in range(100):
                if (await client.get("/health")).status_code == 200:
                    break
                await asyncio.sleep(0.02)
            found = [await client.request(method, path, json=body) for method, path, body in requests]
        await inbox.put({"type": "lifespan.shutdown"})
        await asyncio.wait_for(life, 5)
        return found

    return asyncio.run(ask())


def chat(script: str, **fields: object) -> tuple[str, str, dict[str, Any]]:
    return "POST", CHAT, {"model": "m", "messages": [{"role": "user", "content": script}], **fields}


def test_nothing_comes_compressed(odd: Odd, tmp_path: Path) -> None:
    """Its numbers were read as zeros, and Prometheus got bytes of gzip."""
    listing, numbers, metrics = asked(odd, tmp_path, ("GET", "/v1/models", None), ("GET", dialects.NUMBERS_PATH, None),
                                      ("GET", "/metrics", None))
    assert listing.json()["data"][0]["id"] == "m"
    assert numbers.content == METRICS + b"\n", "whole lines: another text may follow"
    assert metrics.text.endswith(numbers.text)
    assert "python_info" in metrics.text


def test_no_redirect_is_followed_and_no_cookie_kept(odd: Odd, tmp_path: Path) -> None:
    odd.got.clear()
    first, moved, second = asked(odd, tmp_path, chat("say"), chat("redirect"), chat("say"))
    assert (first.status_code, moved.status_code, second.status_code) == (200, 503, 200)
    assert "x-request-id" not in first.headers, "it is not ours"
    assert "cookie" not in odd.got[-1][1]
    assert odd.got[-1][1]["authorization"] == "Bearer sk-ours"
    assert len(odd.got) == 3


def test_what_nobody_thought_of_does_not_end_the_looking(odd: Odd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug, or a key that no header can hold, ended it without a word: the worker stayed away for good."""
    failing = iter([ValueError("a newline in a header")])
    recognise = dialects.recognise

    def once(engine: str, listing: bytes) -> str:
        for error in failing:
            raise error
        return recognise(engine, listing)

    monkeypatch.setattr(dialects, "recognise", once)
    [health] = asked(odd, tmp_path, ("GET", "/health", None))
    assert health.status_code == 200


def test_a_list_without_an_end_is_not_read_to_it(odd: Odd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.worker.front.MAX_SAID_BYTES", 10)
    [health] = asked(odd, tmp_path, ("GET", "/health", None))
    assert health.status_code == 502


@pytest.mark.parametrize(("theirs", "ours"), [(401, 503), (403, 503), (400, 400), (429, 429), (500, 502), (503, 503)])
def test_whose_mistake_it_is(odd: Odd, tmp_path: Path, theirs: int, ours: int) -> None:
    [answer] = asked(odd, tmp_path, chat(f"status {theirs}"))
    assert answer.status_code == ours
    assert "sk-ours" not in answer.text or theirs in (400, 429)


def test_what_runs_there_is_recognised(odd: Odd, tmp_path: Path) -> None:
    odd.got.clear()
    body = {"model": "m", "input": "x", "store": True, "request_id": "resp_1", "metadata": {"a": "b"}}
    asked(odd, tmp_path, ("POST", "/v1/responses", body), chat("say", store=True, user="u"))
    assert odd.got[0][0] == {"model": "m", "input": "x", "store": False, "metadata": {"a": "b"}}, "we keep it, they do not"
    assert odd.got[1][0].keys() == {"model", "messages", "store", "user"}
    odd.owner = "tensorrt_llm"
    try:
        health, _, there = asked(odd, tmp_path, ("GET", "/health", None), chat("say", store=True, user="u"),
                                 ("POST", "/v1/embeddings", {"model": "m", "input": "x"}))
        assert health.headers[dialects.ENGINE.decode()] == "trtllm"
        assert odd.got[-1][0].keys() == {"model", "messages"}
        assert there.status_code == 404
    finally:
        odd.owner = "somebody"


def test_a_tool_by_its_name_is_any_of_that_one() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]
    by_name = {"type": "function", "function": {"name": "b"}}
    assert one_tool(json.dumps({"tools": tools, "tool_choice": by_name}).encode()) == {"tool_choice": "required", "tools": tools[1:]}
    for said in ({}, {"tools": tools}, {"tools": tools, "tool_choice": "auto"}, {"tools": [5], "tool_choice": by_name}, {"tool_choice": by_name}):
        assert one_tool(json.dumps(said).encode()) == {}


class TestLlamacpp:
    @pytest.mark.parametrize(("tokens", "longest", "slots", "asked", "wanted"), [
        (46_592, 8192, 8, 0, (8, 5824)),   # the bundled model and one GiB
        (8192, 32_768, 8, 0, (2, 4096)),   # a 7B and one GiB
        (32_768, 32_768, 8, 8192, (4, 8192)),
        (1000, 8192, 8, 0, (1, 1000)),
        (100_000, 2048, 8, 4096, (8, 2048)),
    ])
    def test_no_sequence_has_anothers_memory(self, tokens: int, longest: int, slots: int, asked: int, wanted: tuple[int, int]) -> None:
        many, each = llamacpp.split(tokens, longest, slots, asked)
        assert (many, each) == wanted
        assert many * each <= tokens

    @pytest.mark.parametrize(("bind", "wanted"), [("0-15", 16), ("0,1", 2), ("0-3,8-11", 8), ("3", 1)])
    def test_threads(self, bind: str, wanted: int) -> None:
        assert llamacpp.threads(bind) == wanted
        assert llamacpp.threads("auto") == llamacpp.threads("") >= 1

    def test_a_file_or_the_only_one_of_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="found 0"):
            llamacpp.find_file(str(tmp_path))
        for part in (1, 2, 3):
            (tmp_path / f"m-{part:05}-of-00003.gguf").touch()
        assert llamacpp.find_file(str(tmp_path)).name == "m-00001-of-00003.gguf"
        (tmp_path / "other.gguf").touch()
        with pytest.raises(ValueError, match="found 2"):
            llamacpp.find_file(str(tmp_path))
        assert llamacpp.find_file(str(tmp_path / "other.gguf")).name == "other.gguf"

    def test_the_bundled_file_says_its_shape(self) -> None:
        from services.local.model import bundled_file

        assert llamacpp.shape(bundled_file()) == (23_040, 8192)

    def test_sampling_as_its_authors_say(self, tmp_path: Path) -> None:
        assert llamacpp.sampling(tmp_path) == llamacpp.OPENAIS
        (tmp_path / "generation_config.json").write_text('{"temperature": 0.2, "repetition_penalty": 1.1, "top_k": "x"}')
        assert llamacpp.sampling(tmp_path) == {**llamacpp.OPENAIS, "temp": 0.2, "penalty_repeat": 1.1}
        with contextlib.suppress(OSError):
            (tmp_path / "generation_config.json").write_text("{")
        assert llamacpp.sampling(tmp_path) == llamacpp.OPENAIS
