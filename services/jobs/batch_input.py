"""A batch's input and output files: what a line may be, and which lines are answered already. Pure, but for reading.

Input: {"custom_id", "method": "POST", "url", "body"}, as in https://platform.openai.com/docs/guides/batch
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from common.dataset import shown

MAX_LINES = 50_000
MAX_NAME_CHARS = 512
MAX_PROBLEMS = 1000
MAX_LINE_BYTES = 4 * 1024 * 1024
"""About what the gateway takes as a body (MAX_BODY_BYTES)."""


class Line(NamedTuple):
    """Where a request is in the input file, and its name."""

    number: int
    offset: int
    size: int
    custom_id: str


class Found(NamedTuple):
    """What is in an input file."""

    lines: list[Line]
    problems: list[dict[str, Any]]
    models: set[str]


def problem(line: int | None, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """One entry of a batch's `errors`."""
    return {"line": line, "code": code, "message": message, "param": param}


def check(path: Path, endpoint: str, models: set[str] | None) -> Found:
    """Every line of an input file, or what is wrong with it. Without `models` any model will do. Raises OSError."""
    found = Found([], [], set())
    seen: dict[str, int] = {}
    offset = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            if len(raw) > MAX_LINE_BYTES:
                text = f"More than {MAX_LINE_BYTES} bytes; the lines after it were not read."
                found.problems.append(problem(number, "line_too_long", text))
                break
            if raw.strip():
                found.problems.extend(_wrong(number, raw, endpoint, models, found.models, seen))
                if not found.problems:
                    found.lines.append(Line(number, offset, len(raw), next(reversed(seen))))
            if len(found.lines) > MAX_LINES or len(found.problems) >= MAX_PROBLEMS:
                break
            offset += len(raw)
    if len(found.lines) > MAX_LINES:
        found.problems.append(problem(None, "too_many_requests", f"More than {MAX_LINES} requests."))
    if not found.lines and not found.problems:
        found.problems.append(problem(None, "empty_file", "The file has no requests."))
    return found


def _wrong(
    number: int, raw: bytes, endpoint: str, models: set[str] | None, used: set[str], seen: dict[str, int]
) -> Iterator[dict[str, Any]]:
    try:
        row = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        yield problem(number, "invalid_json_line", "This line is not valid JSON.")
        return
    if not isinstance(row, dict):
        yield problem(number, "invalid_json_line", "This line is not a JSON object.")
        return
    name = row.get("custom_id")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        text = f"custom_id: a text of 1 to {MAX_NAME_CHARS} characters is needed."
        yield problem(number, "missing_required_parameter", text, "custom_id")
    elif (earlier := seen.setdefault(name, number)) != number:
        text = f"custom_id {shown(repr(name))} is also on line {earlier}."
        yield problem(number, "duplicate_custom_id", text, "custom_id")
    if row.get("method") != "POST":
        yield problem(number, "invalid_method", f"method: {shown(repr(row.get('method')))}; only 'POST'.", "method")
    if row.get("url") != endpoint:
        text = f"url: {shown(repr(row.get('url')))}; the batch's endpoint is {endpoint!r}."
        yield problem(number, "mismatched_url", text, "url")
    body = row.get("body")
    if not isinstance(body, dict):
        yield problem(number, "missing_required_parameter", "body: an object is needed.", "body")
        return
    if body.get("stream"):
        yield problem(number, "invalid_parameter", "body.stream: a batch has no streams.", "body.stream")
    model = body.get("model")
    if not isinstance(model, str) or len(model) > MAX_NAME_CHARS // 2 or (models is not None and model not in models):
        yield problem(number, "model_not_found", f"body.model: {shown(repr(model))} does not exist.", "body.model")
    else:
        used.add(model)


class _Request(msgspec.Struct):
    body: msgspec.Raw


def body(path: Path, line: Line) -> bytes:
    """The request body of a line, as JSON."""
    with open(path, "rb") as file:
        file.seek(line.offset)
        return bytes(msgspec.json.decode(file.read(line.size), type=_Request).body)
