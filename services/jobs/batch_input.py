"""A batch's input and output files: what a line may be, and which lines are answered already. Pure, but for reading.

Input: {"custom_id", "method": "POST", "url", "body"}, as in https://platform.openai.com/docs/guides/batch
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
MAX_LINES = 50_000
MAX_PROBLEMS = 1000


class Line(NamedTuple):
    """Where a request is in the input file, and its name."""

    number: int
    offset: int
    size: int
    custom_id: str


def problem(line: int | None, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """One entry of a batch's `errors`."""
    return {"line": line, "code": code, "message": message, "param": param}


def check(
    path: Path, endpoint: str, models: set[str] | None
) -> tuple[list[Line], list[dict[str, Any]], set[str]]:
    """Every line of an input file: (lines, problems, models used). Without `models` any model will do."""
    found: list[Line] = []
    problems: list[dict[str, Any]] = []
    used: set[str] = set()
    seen: dict[str, int] = {}
    offset = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip() and len(problems) < MAX_PROBLEMS:
                wrong = list(_wrong(number, raw, endpoint, models, used, seen))
                problems += wrong
                if not wrong:
                    found.append(Line(number, offset, len(raw), json.loads(raw)["custom_id"]))
            offset += len(raw)
    if not found and not problems:
        problems.append(problem(None, "empty_file", "The file has no requests."))
    if len(found) > MAX_LINES:
        problems.append(problem(None, "too_many_requests", f"{len(found)} requests; at most {MAX_LINES}."))
    return found, problems, used


def _wrong(
    number: int, raw: bytes, endpoint: str, models: set[str] | None, used: set[str], seen: dict[str, int]
) -> Iterator[dict[str, Any]]:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        yield problem(number, "invalid_json_line", "This line is not valid JSON.")
        return
    if not isinstance(row, dict):
        yield problem(number, "invalid_json_line", "This line is not a JSON object.")
        return
    name = row.get("custom_id")
    if not isinstance(name, str) or not name:
        yield problem(number, "missing_required_parameter", "custom_id: a text is needed.", "custom_id")
    elif (earlier := seen.setdefault(name, number)) != number:
        yield problem(number, "duplicate_custom_id", f"custom_id {name!r} is also on line {earlier}.", "custom_id")
    if row.get("method") != "POST":
        yield problem(number, "invalid_method", f"method: {row.get('method')!r}; only 'POST'.", "method")
    if row.get("url") != endpoint:
        text = f"url: {row.get('url')!r}; the batch's endpoint is {endpoint!r}."
        yield problem(number, "mismatched_url", text, "url")
    body = row.get("body")
    if not isinstance(body, dict):
        yield problem(number, "missing_required_parameter", "body: an object is needed.", "body")
        return
    if body.get("stream"):
        yield problem(number, "invalid_parameter", "body.stream: a batch has no streams.", "body.stream")
    model = body.get("model")
    if not isinstance(model, str) or (models is not None and model not in models):
        yield problem(number, "model_not_found", f"body.model: {model!r} does not exist.", "body.model")
    else:
        used.add(model)


def body(path: Path, line: Line) -> bytes:
    """The request body of a line, as JSON."""
    with open(path, "rb") as file:
        file.seek(line.offset)
        return json.dumps(json.loads(file.read(line.size))["body"]).encode()
