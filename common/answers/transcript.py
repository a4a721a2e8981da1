"""One answer in two shapes: a stream of events and the document that says the same. Pure functions.

Only what both shapes can say is converted. A field that is not known here makes the conversion fail (None), and the
answer is computed instead: nothing is left out silently.
Shapes: https://platform.openai.com/docs/api-reference/chat/streaming and .../completions
"""

from typing import Any

import msgspec

Document = dict[str, Any]

_TOP = {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
_CHOICE = {"index", "logprobs", "finish_reason", "stop_reason"}
_DELTA = {"role", "content", "reasoning", "tool_calls"}
_CALL = {"index", "id", "type", "function"}
_FINISHED = {"stop", "length", "tool_calls"}
DONE = b"data: [DONE]\n\n"


def from_events(route: str, stream: bytes) -> Document | None:
    """The document that a whole stream of events amounts to; None when it broke or says what is not known here."""
    try:
        return _from_events(route, stream)
    except (msgspec.MsgspecError, LookupError, TypeError, AttributeError):  # no shape that is known here
        return None


def _from_events(route: str, stream: bytes) -> Document | None:
    events = stream.split(b"\n\n")
    if events[-2:] != [b"data: [DONE]", b""]:
        return None
    head: Document = {}
    usage: Document | None = None
    choices: dict[int, Document] = {}
    for event in events[:-2]:
        if not event.startswith(b"data: "):
            return None
        chunk: Document = msgspec.json.decode(event[6:], type=dict[str, Any])
        if not _known(chunk, _TOP):
            return None
        head = head or chunk
        usage = chunk.get("usage") or usage
        for part in chunk.get("choices") or []:
            choice = choices.setdefault(part["index"], {"index": part["index"], "logprobs": None})
            if not (_add_chat(choice, part) if route == "chat" else _add_text(choice, part)):
                return None
    if usage is None or not choices or any(c.get("finish_reason") not in _FINISHED for c in choices.values()):
        return None
    return {
        "id": head["id"], "object": "chat.completion" if route == "chat" else "text_completion",
        "created": head["created"], "model": head["model"], "choices": [choices[i] for i in sorted(choices)],
        "system_fingerprint": head.get("system_fingerprint"), "usage": usage,
    }


def to_events(route: str, document: Document, *, usage: bool) -> bytes | None:
    """The stream that says what a document says; None when a document holds what a stream cannot say."""
    try:
        return _to_events(route, document, usage)
    except (LookupError, TypeError, AttributeError):
        return None


def _to_events(route: str, document: Document, usage: bool) -> bytes | None:
    if not _known(document, _TOP):
        return None
    head = {key: document[key] for key in ("id", "created", "model")}
    head["object"] = "chat.completion.chunk" if route == "chat" else "text_completion"
    parts: list[Document] = []
    for choice in document["choices"]:
        index, end = choice["index"], {k: choice.get(k) for k in ("finish_reason", "stop_reason")}
        if route == "chat":
            said = choice["message"]
            # What else vLLM puts into a message (refusal, annotations ...) is null in a stream as well.
            if not _known(choice, _CHOICE | {"message"}) or not _known(said, _DELTA):
                return None
            delta = {k: v for k, v in said.items() if v is not None and k != "role"}
            if "tool_calls" in delta:
                delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
            parts += [
                {"index": index, "delta": {"role": said["role"], "content": said.get("content") and ""},
                 "logprobs": None, "finish_reason": None},
                {"index": index, "delta": delta, "logprobs": choice.get("logprobs"), "finish_reason": None},
                {"index": index, "delta": {}, "logprobs": None, **end},
            ]
        else:
            if not _known(choice, _CHOICE | {"text"}):
                return None
            parts.append({"index": index, "text": choice["text"], "logprobs": choice.get("logprobs"), **end})
    chunks: list[Document] = [{**head, "choices": [part]} for part in parts]
    if usage:
        chunks.append({**head, "choices": [], "usage": document["usage"]})
    return b"".join(b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks) + DONE


def complete(document: Document) -> bool:
    """Whether every choice of a document came to its end."""
    choices: list[Document] = document.get("choices") or []
    return bool(choices) and all(choice.get("finish_reason") in _FINISHED for choice in choices)


def _known(document: Document, names: set[str]) -> bool:
    """Whether all fields beside `names` are empty."""
    return all(value is None or value in ([], {}) for key, value in document.items() if key not in names)


def _add_chat(choice: Document, part: Document) -> bool:
    delta = part.get("delta") or {}
    if not _known(part, _CHOICE | {"delta"}) or not _known(delta, _DELTA):
        return False
    message = choice.setdefault("message", {"role": "assistant", "content": None})
    message["role"] = delta.get("role") or message["role"]
    for name in ("content", "reasoning"):
        if delta.get(name) is not None:
            message[name] = (message.get(name) or "") + delta[name]
    for call in delta.get("tool_calls") or []:
        if not _known(call, _CALL):
            return False
        calls = message.setdefault("tool_calls", [])
        if call["index"] == len(calls):
            calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        elif call["index"] != len(calls) - 1:
            return False
        known, function = calls[-1], call.get("function") or {}
        known["id"] += call.get("id") or ""
        known["function"]["name"] += function.get("name") or ""
        known["function"]["arguments"] += function.get("arguments") or ""
    _add_end(choice, part)
    if part.get("logprobs"):
        choice["logprobs"] = choice["logprobs"] or {"content": []}
        choice["logprobs"]["content"] += part["logprobs"].get("content") or []
    return True


def _add_text(choice: Document, part: Document) -> bool:
    if not _known(part, _CHOICE | {"text"}):
        return False
    choice["text"] = choice.get("text", "") + part["text"]
    _add_end(choice, part)
    if part.get("logprobs"):
        choice["logprobs"] = choice["logprobs"] or {name: [] for name in part["logprobs"]}
        for name, values in part["logprobs"].items():
            choice["logprobs"][name] += values or []
    return True


def _add_end(choice: Document, part: Document) -> None:
    for name in ("finish_reason", "stop_reason"):
        choice[name] = part.get(name) if part.get(name) is not None else choice.get(name)
