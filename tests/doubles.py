"""Servers that do not run here, TensorRT-LLM's `trtllm-serve` and SGLang, played by their documented answers: every key,
null and blank as they write them (docs/engines.md has the sources). `python -m tests.doubles trtllm|sglang PORT`.

The double of `trtllm-serve` refuses a field that it does not know, as the original does; SGLang's drops it, as the
original does, which is why the gateway must not send it one.
"""

import asyncio
import json
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from common import engines

WORDS = ["Hello", "!", " I", " am", " here", " to", " help", "."]
NAME = "double"
LONGEST = 2048
SCHEMA_ANSWER = '{"name": "Ada", "age": 36}'
seen: list[dict[str, Any]] = []
"""The bodies it got, for tests that ask at /seen."""


def compact(document: object) -> str:
    return json.dumps(document, separators=(",", ":"))


class Double:
    """One server."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.served = 0
        self.app = FastAPI()
        for path, answer in (("/v1/chat/completions", self.chat), ("/v1/completions", self.completions),
                             ("/v1/responses", self.responses), ("/v1/messages", self.messages),
                             ("/v1/messages/count_tokens", self.count), ("/v1/embeddings", self.embeddings),
                             ("/tokenize", self.tokenize)):
            if path in engines.LIMITED[engine]:
                self.app.post(path)(answer)
        self.app.get("/v1/models")(self.models)
        self.app.get("/health")(lambda: Response(status_code=200))
        self.app.get("/prometheus/metrics" if engine == "trtllm" else "/metrics")(self.metrics)
        self.app.get("/seen")(lambda: seen)

    async def models(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"id": NAME, "object": "model", "created": 1, "owned_by": "tensorrt_llm"}
        if self.engine == "sglang":
            entry |= {"owned_by": "sglang", "root": NAME, "parent": None, "max_model_len": LONGEST}
        return {"object": "list", "data": [entry]}

    async def metrics(self) -> PlainTextResponse:
        names = ({"sglang:num_queue_reqs": 0, "sglang:token_usage": 0.1, "sglang:prompt_tokens_total": 9 * self.served,
                  "sglang:generation_tokens_total": 8 * self.served} if self.engine == "sglang" else
                 {"trtllm_num_requests_waiting": 0, "trtllm_kv_cache_utilization": 0.1,
                  "trtllm_prompt_tokens_total": 9 * self.served, "trtllm_generation_tokens_total": 8 * self.served})
        return PlainTextResponse("".join(f'{name}{{model_name="{NAME}"}} {value}\n' for name, value in names.items()))

    # --- the routes ------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        body = await self.read(request)
        if isinstance(body, Response):
            return body
        text = SCHEMA_ANSWER if body.get("response_format") else "".join(WORDS)
        if body.get("stream"):
            return self.stream(body, "chat.completion.chunk")
        calls = [{"id": "call_1", "type": "function", "function": {"name": body["tools"][0]["function"]["name"],
                                                                   "arguments": '{"city": "Paris"}'}}] if body.get("tools") else []
        choices = [self.choice(index, body, text, calls) for index in range(body.get("n") or 1)]
        return self.document("chat.completion", body, choices)

    def choice(self, index: int, body: dict[str, Any], text: str, calls: list) -> dict[str, Any]:
        tops = body.get("top_logprobs") or 0
        logprobs = {"content": [{"token": word, "logprob": -0.5, "bytes": list(word.encode()), "top_logprobs": [
            {"token": word, "logprob": -0.5 - n, "bytes": list(word.encode())} for n in range(tops)]} for word in WORDS]}
        length = (body.get("max_tokens") or body.get("max_completion_tokens") or 99) <= len(WORDS)
        message: dict[str, Any] = {"role": "assistant", "content": None if calls else text, "reasoning_content": None}
        reason = "tool_calls" if calls else "length" if length else "stop"
        if self.engine == "sglang":
            return {"index": index, "message": {**message, "tool_calls": calls or None}, "finish_reason": reason,
                    "logprobs": logprobs if body.get("logprobs") else None, "matched_stop": None if length else 2}
        return {"index": index, "message": {**message, "reasoning": None, "tool_calls": calls}, "finish_reason": reason,
                "logprobs": logprobs if body.get("logprobs") else None, "stop_reason": None, "mm_embedding_handle": None,
                "disaggregated_params": None, "avg_decoded_tokens_per_iter": 1.0}

    async def completions(self, request: Request) -> Response:
        body = await self.read(request)
        if isinstance(body, Response):
            return body
        if body.get("stream"):
            return self.stream(body, "text_completion")
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        choices = [{"index": index, "text": "".join(WORDS), "logprobs": None, "finish_reason": "stop"}
                   for index in range(len(prompts) * (body.get("n") or 1))]
        return self.document("text_completion", body, choices)

    def document(self, kind: str, body: dict[str, Any], choices: list[dict[str, Any]]) -> Response:
        said = {"id": "chatcmpl-d", "object": kind, "created": 1, "model": body["model"], "choices": choices,
                "usage": self.usage(body, len(choices))}
        said |= {"metadata": {"weight_version": "default"}} if self.engine == "sglang" else {"prompt_token_ids": None}
        return Response(compact(said), media_type="application/json")

    def usage(self, body: dict[str, Any], choices: int = 1) -> dict[str, Any]:
        made = choices * min(body.get("max_tokens") or body.get("max_completion_tokens") or 99, len(WORDS))
        more = ({"prompt_tokens_details": None, "reasoning_tokens": 0} if self.engine == "sglang"
                else {"prompt_tokens_details": {"cached_tokens": 0}})
        return {"prompt_tokens": 9, "total_tokens": 9 + made, "completion_tokens": made, **more}

    def stream(self, body: dict[str, Any], kind: str) -> Response:
        made = self.usage(body)["completion_tokens"]
        head = {"id": "chatcmpl-d", "object": kind, "created": 1, "model": body["model"]}
        sglang, chat = self.engine == "sglang", kind.startswith("chat")
        tail = "\n\n" if sglang else " \n\n"

        def event(choices: list[dict[str, Any]], **more: object) -> bytes:
            return f"data: {compact({**head, 'choices': choices, **more})}{tail}".encode()

        def delta(content: dict[str, Any], reason: str | None = None) -> list[dict[str, Any]]:
            choice: dict[str, Any] = {"index": 0, **({"delta": content} if chat else {"text": content.get("content", "")})}
            if sglang:  # TensorRT-LLM leaves out what is null
                return [{**choice, "logprobs": None, "finish_reason": reason, "matched_stop": None}]
            return [{**choice, **({"finish_reason": reason} if reason else {})}]

        async def events() -> Any:
            empty: dict[str, Any] = {"reasoning_content": None} if sglang else {}
            yield event(delta({**empty, "role": "assistant", **({"content": ""} if sglang else {})}))
            for word in WORDS[:made]:
                yield event(delta({**empty, "content": word}))
                await asyncio.sleep(0.01)
            yield event(delta(empty, "length" if made < len(WORDS) else "stop"))
            if (body.get("stream_options") or {}).get("include_usage"):
                yield event([], usage=self.usage(body))
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def responses(self, request: Request) -> Response:
        body = await self.read(request)
        if isinstance(body, Response):
            return body
        return JSONResponse({
            "id": "resp_d", "object": "response", "created_at": 1, "model": body["model"], "status": "completed",
            "output": [{"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
                        "content": [{"type": "output_text", "text": "".join(WORDS), "annotations": [], "logprobs": None}]}],
            "parallel_tool_calls": False, "temperature": 1.0, "tool_choice": "auto", "tools": [], "top_p": 1.0,
            "usage": {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 8,
                      "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 17}})

    async def messages(self, request: Request) -> Response:
        body = await self.read(request)
        if isinstance(body, Response):
            return body
        return JSONResponse({"id": "msg_d", "type": "message", "role": "assistant", "model": body["model"],
                             "content": [{"type": "text", "text": "".join(WORDS)}], "stop_reason": "end_turn",
                             "stop_sequence": None, "usage": {"input_tokens": 9, "output_tokens": 8}})

    async def count(self, request: Request) -> Response:
        body = await self.read(request)
        return body if isinstance(body, Response) else JSONResponse({"input_tokens": 9})

    async def embeddings(self, request: Request) -> Response:
        body = await self.read(request)
        if isinstance(body, Response):
            return body
        return JSONResponse({"object": "list", "model": NAME, "data": [{"object": "embedding", "index": 0, "embedding": [0.1] * 8}],
                             "usage": {"prompt_tokens": 9, "total_tokens": 9}})

    async def tokenize(self, request: Request) -> Response:
        body = await self.read(request)
        return body if isinstance(body, Response) else JSONResponse({"tokens": [1, 2, 3], "count": 3, "max_model_len": LONGEST})

    # --- and what they refuse --------------------------------------------------------------------

    async def read(self, request: Request) -> dict[str, Any] | Response:
        """The body; or what the server says of a bad one."""
        body = json.loads(await request.body())
        seen.append(body)
        self.served += 1
        path = request.url.path
        unknown = [name for name in body if name not in engines.LIMITED[self.engine][path] and name not in ("model", "user")]
        if self.engine == "trtllm" and unknown and path != "/v1/responses":
            return JSONResponse({"error": f"[{{'type': 'extra_forbidden', 'loc': ('body', '{unknown[0]}')}}]"}, 400)
        if body.get("temperature") is not None and not 0 <= body["temperature"] <= 2:
            return self.refused("temperature must be between 0 and 2")
        if len(json.dumps(body)) > 4 * LONGEST:
            return self.refused(f"The input (9351 tokens) is longer than the model's context length ({LONGEST} tokens).")
        return body

    def refused(self, text: str) -> Response:
        kind = "Bad Request" if self.engine == "sglang" else "BadRequestError"
        return JSONResponse({"object": "error", "message": text, "type": kind, "param": None, "code": 400}, 400)


if __name__ == "__main__":
    uvicorn.run(Double(sys.argv[1]).app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
