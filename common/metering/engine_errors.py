"""What engines say when they refuse a request, in words that its sender understands."""

import re

import msgspec

_PYDANTIC = re.compile(r"validation error.*?'loc': '([^']*)', 'msg': ['\"]([^'\"]*)", re.S)
"""The first problem in vLLM's list of pydantic errors; the rest repeats it for other message classes."""


def engine_message(body: bytes) -> tuple[str, str | None]:
    """Message and field of an engine's error body (OpenAI's, Anthropic's or FastAPI's shape)."""
    try:
        document = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return "", None
    error = document.get("error", document) if isinstance(document, dict) else {}
    if not isinstance(error, dict):
        return "", None
    message, param = error.get("message") or error.get("detail"), error.get("param")
    text = message if isinstance(message, str) else ""
    if (found := _PYDANTIC.search(text[:8000])) is not None:
        field = _field(found[1])
        return f"{field}: {found[2]}.", field
    return text[:2000], param if isinstance(param, str) else None


def _field(location: str) -> str:
    """`body.messages.0.ChatCompletionUserMessageParam.content` as the client wrote it: `messages.0.content`."""
    parts = [part for part in location.split(".") if not part[:1].isupper()]
    return ".".join(parts[1:] if parts[:1] == ["body"] else parts)
