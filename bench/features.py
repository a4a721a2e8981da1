"""Every feature of the API that makes an engine do something of its own, asked twice of one that is fresh.

A first answer that takes much longer than the second says that something was compiled or loaded in front of a client; an
engine that dies says that it could not be.
"""

import functools
import time
from collections.abc import Callable

import openai

_SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"]}
_TOOL = {"type": "function", "function": {"name": "weather", "parameters": _SCHEMA}}
_FORCED = {"type": "function", "function": {"name": "weather"}}
_LIST = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
CHAT: dict[str, dict[str, object]] = {
    "plain": {},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "json_schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": _SCHEMA}}},
    "json_object": {"response_format": {"type": "json_object"}},
    "regex": {"extra_body": {"structured_outputs": {"regex": "[0-9]{3}"}}},
    "choice": {"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}},
    "grammar": {"extra_body": {"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}}},
    "array": {"extra_body": {"structured_outputs": {"json": _LIST}}},
    "penalties": {"frequency_penalty": 0.5, "presence_penalty": 0.5, "extra_body": {"repetition_penalty": 1.1}},
    "logit_bias": {"logit_bias": {"1": -50}},
    "sampling": {"temperature": 0.7, "top_p": 0.9, "seed": 7, "extra_body": {"top_k": 20, "min_p": 0.05}},
    "stop": {"stop": ["."]},
    "n": {"n": 3, "temperature": 0.8},
    "tool": {"tools": [_TOOL], "tool_choice": _FORCED},
}


def features(sdk: openai.OpenAI, model: str, adapter: str) -> dict[str, Callable[[], object]]:
    """Name -> one request that uses it. `adapter`: a tuned model, empty: none is asked."""
    chat = functools.partial(
        sdk.chat.completions.create, model=model, messages=[{"role": "user", "content": "Name a city."}], max_tokens=24,
        extra_headers={"cache-control": "no-store"},
    )
    complete = functools.partial(sdk.completions.create, model=model, prompt="A city is", max_tokens=8)
    found: dict[str, Callable[[], object]] = {
        name: functools.partial(chat, **asked) for name, asked in CHAT.items()
    }
    found |= {
        "prompt_logprobs": functools.partial(complete, extra_body={"prompt_logprobs": 2}),
        "echo": functools.partial(complete, echo=True, logprobs=1),
        "responses": functools.partial(sdk.responses.create, model=model, input="Name a city.", max_output_tokens=24),
    }
    if adapter:
        found["adapter"] = functools.partial(chat, model=adapter)
        found["adapter and logprobs"] = functools.partial(chat, model=adapter, logprobs=True)
    return found


def first_and_second(sdk: openai.OpenAI, model: str, adapter: str = "") -> dict[str, tuple[float, float]]:
    """Seconds of the first and of the second answer to each. Raises openai.APIError where one fails."""
    took = {}
    for name, ask in features(sdk, model, adapter).items():
        pair = []
        for _ in range(2):
            began = time.perf_counter()
            ask()
            pair.append(time.perf_counter() - began)
        took[name] = (pair[0], pair[1])
        print(f"{name:<22} {pair[0]:6.2f} s, then {pair[1]:6.2f} s", flush=True)
    return took
