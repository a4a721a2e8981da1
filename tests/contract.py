"""Twenty requests that every engine behind the gateway is asked: each is answered as asked, or refused by the name of what
the engine lacks. Which of the two, `common/engines.py` says; a field that is dropped in silence fails here.
"""

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx

from common import engines

HEADERS = {"cache-control": "no-store"}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
          "required": ["name", "age"], "additionalProperties": False}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Said = dict[str, Any]


class Case(NamedTuple):
    """One request, and what a good answer to it is."""

    name: str
    path: str
    body: Said
    good: Callable[[Said], object]
    """Of a stream: `{"events": [...]}`."""
    twice: bool = False
    """Asked again: the texts must be equal."""
    status: int = 200


def chat(text: str = "Tell me a long story about a dog.", **fields: object) -> Said:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **fields}


def first(said: Said) -> Said:
    return said["choices"][0]


def text_of(said: Said) -> str:
    if "events" in said:
        parts = [choice for event in said["events"] for choice in event.get("choices", [])]
        return "".join((part.get("delta") or {}).get("content") or part.get("text") or "" for part in parts)
    return first(said)["message"]["content"] or ""


def calls_the_weather(said: Said) -> bool:
    call = first(said)["message"]["tool_calls"][0]["function"]
    return call["name"] == "weather" and isinstance(json.loads(call["arguments"])["city"], str)


def has_tops(said: Said) -> bool:
    tokens = first(said)["logprobs"]["content"]
    return len(tokens) > 0 and all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in tokens)


def ends_with_usage(said: Said) -> bool:
    last = said["events"][-1]
    return last["choices"] == [] and last["usage"]["completion_tokens"] > 0


STREAM = {"stream": True}
CASES = (
    Case("an answer", CHAT, chat(), lambda s: text_of(s) and s["usage"]["completion_tokens"] > 0),
    Case("its length", CHAT, chat(max_tokens=5),
         lambda s: (s["usage"]["completion_tokens"], first(s)["finish_reason"]) == (5, "length")),
    Case("a stream", CHAT, chat(**STREAM), lambda s: text_of(s) and not any(e.get("usage") for e in s["events"])),
    Case("a stream with its usage", CHAT, chat(**STREAM, stream_options={"include_usage": True}), ends_with_usage),
    Case("the same again", CHAT, chat("What is 2 and 2?"), text_of, twice=True),
    Case("a seed", CHAT, chat(temperature=0.8, seed=7), text_of, twice=True),
    Case("a stop", COMPLETIONS, {"prompt": "1, 2, 3, 4, 5,", "max_tokens": 16, "temperature": 0, "stop": ["8"]},
         lambda s: "8" not in first(s)["text"] and first(s)["finish_reason"] == "stop"),
    Case("several choices", CHAT, chat(n=2, temperature=0.8), lambda s: [c["index"] for c in s["choices"]] == [0, 1]),
    Case("log probabilities", CHAT, chat(logprobs=True, top_logprobs=2), has_tops),
    Case("a schema", CHAT, chat("Who is Ada?", max_tokens=64, response_format={
        "type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}),
         lambda s: json.loads(text_of(s)).keys() == {"name", "age"}),
    Case("a tool", CHAT, chat("What is the weather in Paris?", max_tokens=64, tools=[WEATHER], tool_choice={
        "type": "function", "function": {"name": "weather"}}), calls_the_weather),
    Case("a conversation", CHAT, {"messages": [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada."}, {"role": "user", "content": "What is my name?"}],
        "max_tokens": 8, "temperature": 0}, text_of),
    Case("a completion's stream", COMPLETIONS, {"prompt": "Once upon", "max_tokens": 8, **STREAM}, text_of),
    Case("two prompts", COMPLETIONS, {"prompt": ["Once upon", "In the end"], "max_tokens": 4},
         lambda s: sorted(c["index"] for c in s["choices"]) == [0, 1]),
    Case("a response", "/v1/responses", {"input": "Say hello.", "max_output_tokens": 8},
         lambda s: s["output"][-1]["content"][0]["text"] and s["usage"]["output_tokens"] > 0),
    Case("a message", "/v1/messages", {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8},
         lambda s: s["content"][0]["text"] and s["usage"]["output_tokens"] > 0),
    Case("tokens", "/tokenize", {"prompt": "Say hello."}, lambda s: s["count"] == len(s["tokens"]) > 0),
    Case("a prompt's log probabilities", CHAT, chat(prompt_logprobs=1), lambda s: s["prompt_logprobs"]),
    Case("a bad number", CHAT, chat(temperature=-1), lambda s: s["error"]["param"] == "temperature", status=400),
    Case("too long a prompt", CHAT, chat("dog " * 30_000), lambda s: s["error"]["message"], status=400),
)


def ask(client: httpx.Client, model: str, case: Case) -> tuple[int, Said]:
    """Status and answer; of a stream its events, which must have ended as they should."""
    answer = client.post(case.path, json={"model": model, **case.body}, headers=HEADERS)
    if not case.body.get("stream") or answer.status_code != 200:
        return answer.status_code, answer.json()
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1].strip() == "[DONE]", lines[-1]
    return 200, {"events": [json.loads(line) for line in lines[:-1]]}


def problem(client: httpx.Client, model: str, engine: str, case: Case) -> str:
    """What is wrong with how a case was answered; empty: nothing."""
    lacking = engines.missing(engine, case.path, engines.asked(json.dumps(case.body, separators=(",", ":")).encode()))
    status, said = ask(client, model, case)
    if lacking and case.status == 200:
        error = said.get("error", {})
        named = lacking in (error.get("param"), case.path) and lacking in error.get("message", "")
        return "" if status == 400 and named else f"{lacking} is not refused by its name: {status} {said}"
    if status != case.status:
        return f"status {status}: {said}"
    try:
        if not case.good(said):
            return f"not as asked: {said}"
        # llama.cpp computes a prompt's cached and uncached parts in other batches, which may tip a close choice.
        if case.twice and text_of(said) != text_of(ask(client, model, case)[1]) and not engine.startswith("llamacpp"):
            return "another text the second time"
    except (LookupError, TypeError, ValueError) as error:
        return f"{type(error).__name__} {error}: {said}"
    return ""


def run(client: httpx.Client, model: str, engine: str) -> dict[str, str]:
    """The cases that failed, and how."""
    found = {case.name: problem(client, model, engine, case) for case in CASES}
    return {name: text for name, text in found.items() if text}


def leave_early(client: httpx.Client, model: str) -> None:
    """A client that leaves in the middle of a stream."""
    body = {"model": model, **chat(max_tokens=400, ignore_eos=True, **STREAM)}
    if model in ("theirs", "trt"):  # their engines know OpenAI's fields alone
        del body["ignore_eos"]
    with client.stream("POST", CHAT, json=body, headers=HEADERS) as answer:
        assert answer.status_code == 200, answer.read()
        next(answer.iter_bytes())
        time.sleep(0.05)
