"""What engines say when they refuse a request, in words that its sender understands."""

import re

import msgspec

from common.errors import encode_parts
from common.routes import ROUTES

_PYDANTIC = re.compile(r"validation error.*?'loc': '([^']*)', 'msg': ['\"]([^'\"]*)", re.S)
"""The first problem in vLLM's list of pydantic errors; the rest repeats it for other message classes."""


_BROKEN = "The worker failed while it was answering."
_STREAM_ERRORS = {
    "chat": b"data: " + encode_parts(500, _BROKEN, "server_error", code="stream_interrupted")[2],
    "messages": b"event: error\ndata: " + msgspec.json.encode(
        {"type": "error", "error": {"type": "api_error", "message": _BROKEN}}
    ),
    "responses": b"event: error\ndata: " + msgspec.json.encode(
        {"type": "error", "code": "stream_interrupted", "message": _BROKEN, "param": None}
    ),
}


def in_stream(route: str) -> bytes:
    """The event that ends a stream which broke: what the route's clients understand."""
    return _STREAM_ERRORS.get(route, _STREAM_ERRORS["chat"])


def in_our_words(
    status: int, body: bytes, model: str, path: str, retry_after: bytes = b""
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body for an engine's error."""
    message, param, said = _message(body)
    route = ROUTES[path][0]
    if status >= 500:
        refused = status == 503
        return encode_parts(
            status, "The worker takes no more requests right now." if refused else "The worker failed.",
            "server_error", code="worker_refused" if refused else "worker_failed",
            retry_after_s=1 if refused else None, route=route,
        )
    if status in (404, 405) and (not message or message in ("Not Found", "Method Not Allowed")):
        text = f"The model {model!r} does not support {path}."
        return encode_parts(status, text, "invalid_request_error", code="unsupported_endpoint", route=route)
    code = said or {404: "model_not_found", 422: "unprocessable", 429: "engine_busy"}.get(status, "invalid_value")
    again_s = int(retry_after) if retry_after.isdigit() else 1 if status in (409, 429) else None
    message = message or f"The engine refused the request (status {status})."
    return encode_parts(status, message, "invalid_request_error", param, code, again_s, route=route)


def _message(body: bytes) -> tuple[str, str | None, str | None]:
    """Message, field and code, if that is a text, of an engine's error (OpenAI's, Anthropic's or FastAPI's shape)."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return "", None, None
    error = document.get("error", document) if isinstance(document, dict) else {}
    if isinstance(error, str):  # TensorRT-LLM's
        error = {"message": error}
    if not isinstance(error, dict):
        return "", None, None
    message, param, code = error.get("message") or error.get("detail"), error.get("param"), error.get("code")
    if isinstance(message, list) and message and isinstance(message[0], dict):  # FastAPI's own
        param = ".".join(str(part) for part in message[0].get("loc", ()) if part != "body")
        message = f"{param}: {message[0].get('msg')}"
    text = message if isinstance(message, str) else ""
    if (found := _PYDANTIC.search(text[:8000])) is not None:
        field = _field(found[1])
        return f"{field}: {found[2]}.", field, None
    return text[:2000], param if isinstance(param, str) else None, code if isinstance(code, str) else None


def _field(location: str) -> str:
    """`body.messages.0.ChatCompletionUserMessageParam.content` as the client wrote it: `messages.0.content`."""
    parts = [part for part in location.split(".") if not part[:1].isupper()]
    return ".".join(parts[1:] if parts[:1] == ["body"] else parts)
