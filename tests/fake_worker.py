"""A worker whose engine does what the prompt says: for faults that real vLLM cannot produce on demand.

The agent's heartbeat and the metering middleware are the real ones. Scripts, in the last message's content or
the prompt:  `say N` N chunks · `slow S` waits S seconds first · `status N` · `die` · `die after N` chunks ·
`error after N` chunks as vLLM does it · `accel` tries to steer nginx · `echo headers` · `echo body`.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time

import msgspec
import uvicorn
from prometheus_client import REGISTRY, generate_latest
from redis.exceptions import RedisError

from common.asgi import Receive, Scope, Send
from common.redis.connect import connect
from common.redis.names import CHANNEL_WORKERS, HEARTBEAT_TTL_MS, WORKERS, worker_key
from common.workers import Heartbeat, Model
from services.worker.middleware import WORKER_ID, WorkerMiddleware
from services.worker.settings import WorkerSettings

MODEL = "fake"
cancelled: list[str] = []


def chunk(text: str, **more: object) -> bytes:
    """One SSE event as vLLM writes it."""
    document = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL,
                "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **more}
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


async def engine(scope: Scope, receive: Receive, send: Send) -> None:
    """The scripted engine."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    path = scope["path"]
    if path == "/metrics":
        await answer(send, 200, generate_latest(REGISTRY), b"text/plain")
        return
    if path == "/v1/models":
        await answer(send, 200, json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode())
        return
    if path == "/cancelled":
        await answer(send, 200, json.dumps(cancelled).encode())
        return
    body = json.loads((await receive())["body"] or b"{}")
    if path == "/v1/responses":
        await respond(body, send)
        return
    script = str(body["messages"][-1]["content"] if body.get("messages") else body.get("prompt") or body.get("input") or "say 3")
    work = asyncio.create_task(act(script.split(), body, scope, send))
    gone = asyncio.create_task(until_gone(receive))
    done, _ = await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    if work not in done:
        work.cancel()
        cancelled.append(dict(scope["headers"]).get(b"x-request-id", b"").decode())
    else:
        gone.cancel()
        work.result()


async def until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def act(words: list[str], body: dict, scope: Scope, send: Send) -> None:
    verb = words[0]
    if verb == "slow":
        await asyncio.sleep(float(words[1]))
    elif verb == "status":
        await answer(send, int(words[1]), b'{"error":{"message":"Traceback: secret/path.py","type":"X","param":"seed","code":1}}')
        return
    elif verb == "accel":
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-type", b"application/json"), (b"x-accel-redirect", b"/v1/models")]})
        await send({"type": "http.response.body", "body": b'{"choices":[]}'})
        return
    elif verb == "echo":
        names = {n.decode(): v.decode() for n, v in scope["headers"]}
        await answer(send, 200, json.dumps(body if words[1:] == ["body"] else names).encode())
        return
    elif verb == "die" and len(words) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    count = next((int(word) for word in words if word.isdigit()), 3)
    usage = {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count,
             "prompt_tokens_details": {"cached_tokens": 4}}
    if not body.get("stream") or scope["path"] == "/v1/embeddings":
        document = {"id": "c", "object": "chat.completion", "created": 1, "model": MODEL, "usage": usage, "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "x" * count}, "finish_reason": "stop"}]}
        await answer(send, 200, json.dumps(document).encode())
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for number in range(count):
        await send({"type": "http.response.body", "body": chunk(f"w{number} "), "more_body": True})
        await asyncio.sleep(0.02 if verb != "say" else 0.001)
    if verb == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if verb == "error":
        await send({"type": "http.response.body", "more_body": True,
                    "body": b'data: {"error":{"message":"Traceback secret/path.py","type":"X","code":500}}\n\n'})
    else:
        end = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
        await send({"type": "http.response.body", "more_body": True, "body": chunk("", choices=[end])})
    if verb != "error" and (body.get("stream_options") or {}).get("include_usage"):
        await send({"type": "http.response.body", "more_body": True, "body": b"data: " + json.dumps(
            {"id": "c", "created": 1, "model": MODEL, "choices": [], "usage": usage}, separators=(",", ":")).encode() + b"\n\n"})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def respond(body: dict, send: Send) -> None:
    """`/v1/responses` as vLLM shapes it. The text says what it was asked; `die` and `stop` (at the limit) in the last
    item do so."""
    if isinstance(body["input"], str):
        body["input"] = [{"content": body["input"]}]
    script = str(body["input"][-1]["content"])
    if script == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if script.startswith("status"):
        await answer(send, int(script.split()[1]), b'{"error":{"message":"odd","type":"X","param":"seed","code":1}}')
        return
    text = " | ".join(item["content"] if isinstance(item["content"], str) else item["content"][0]["text"]
                      for item in body["input"])
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
               "content": [{"type": "output_text", "text": f"<{text}>", "annotations": [], "logprobs": None}]}
    usage = {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10,
             "input_tokens_details": {"cached_tokens": 4}, "output_tokens_details": {"reasoning_tokens": 0}}
    document = {"id": body.get("request_id", "resp_own"), "object": "response", "created_at": 1, "model": MODEL,
                "previous_response_id": body.get("previous_response_id"), "output": [message], "usage": usage,
                "status": "incomplete" if script == "stop" else "completed"}
    if not body.get("stream"):
        await answer(send, 200, json.dumps(document).encode())
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    begun = {**document, "status": "in_progress", "output": [], "usage": None}
    delta = {"type": "response.output_text.delta", "delta": 'x "response": {} \n\n', "sequence_number": 1}
    events = [{"type": "response.created", "response": begun}, delta, {"type": f"response.{document['status']}",
                                                                       "response": document}]
    raw = b"".join(b"event: %s\ndata: %s\n\n" % (str(event["type"]).encode(), json.dumps(event).encode()) for event in events)
    for at in range(0, len(raw), 97):  # cut anywhere
        await send({"type": "http.response.body", "body": raw[at : at + 97], "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def answer(send: Send, status: int, body: bytes, kind: bytes = b"application/json") -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": body})


async def beat(settings: WorkerSettings, middleware: WorkerMiddleware) -> None:
    """Heartbeats, as the agent sends them."""
    redis = connect(settings)
    worker_id = os.environ[WORKER_ID]
    revision = sys.argv[sys.argv.index("--revision") + 1] if "--revision" in sys.argv else "r1"
    while True:
        raw = msgspec.json.encode(Heartbeat(
            id=worker_id, address=settings.address, state="ready", models=[Model(MODEL, 8192, int(time.time()), revision=revision)],
            in_flight=middleware.meter.in_flight, slots=8, keeps=middleware.keeps,
        )).decode()
        with contextlib.suppress(RedisError, OSError):
            async with redis.pipeline() as pipe:
                pipe.set(worker_key(worker_id), raw, px=HEARTBEAT_TTL_MS)
                pipe.sadd(WORKERS, worker_id)
                pipe.publish(CHANNEL_WORKERS, raw)
                await pipe.execute()
        await asyncio.sleep(0.1)


async def main() -> None:
    if "--bare" in sys.argv:  # the engine alone: somebody else's server
        config = uvicorn.Config(engine, host="127.0.0.1", port=int(os.environ["ENGINE_PORT"]), log_level="warning")
        await uvicorn.Server(config).serve()
        return
    settings = WorkerSettings()
    middleware = WorkerMiddleware(engine)
    config = uvicorn.Config(middleware, host="127.0.0.1", port=settings.engine_port, log_level="warning", timeout_keep_alive=5)
    background = None if "--silent" in sys.argv else asyncio.create_task(beat(settings, middleware))
    await uvicorn.Server(config).serve()
    if background is not None:
        background.cancel()


if __name__ == "__main__":
    asyncio.run(main())
