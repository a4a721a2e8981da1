"""nginx/console/openapi.json, what is public, out of the programs' own routes and vLLM's own request classes.

    python -m tests.openapi_page            writes it; --check says whether it is as generated

What nginx lets in comes from three programs and from the engine. Request bodies are vLLM's, without what is refused here
and without the inside of deeply nested parts, so that tools can import the document.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.pooling.classify.protocol import ClassificationChatRequest, ClassificationCompletionRequest
from vllm.entrypoints.pooling.embed.protocol import EmbeddingChatRequest, EmbeddingCompletionRequest
from vllm.entrypoints.pooling.pooling.protocol import PoolingChatRequest, PoolingCompletionRequest
from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreQueriesDocumentsRequest, ScoreTextRequest
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)

from common import VERSION
from common.routes import ROUTES
from gateway.decode import MAX_PROMPTS
from gateway.responses import add_response_routes
from gateway.routes import add_routes as add_gateway_routes
from services.jobs.routes import add_routes as add_jobs_routes
from services.ledger.app import add_routes as add_ledger_routes
from services.local.plan import ROOT
from tests.generated import write_or_check

PAGE = ROOT / "nginx/console/openapi.json"
Schema = dict[str, Any]

BODIES: dict[str, tuple[type[BaseModel], ...]] = {
    "chat": (ChatCompletionRequest,), "completions": (CompletionRequest,), "responses": (ResponsesRequest,),
    "messages": (AnthropicMessagesRequest,), "count_tokens": (AnthropicCountTokensRequest,),
    "embeddings": (EmbeddingCompletionRequest, EmbeddingChatRequest), "rerank": (RerankRequest,),
    "score": (ScoreTextRequest, ScoreQueriesDocumentsRequest),
    "classify": (ClassificationCompletionRequest, ClassificationChatRequest),
    "pooling": (PoolingCompletionRequest, PoolingChatRequest),
    "tokenize": (TokenizeCompletionRequest, TokenizeChatRequest), "detokenize": (DetokenizeRequest,),
}
"""Route label -> what vLLM takes there."""
REFUSED = {"priority", "chat_template", "background", "conversation", "request_id", "cache_salt", "kv_transfer_params",
           "ec_transfer_params", "previous_input_messages"}
"""Fields that the gateway refuses, or that are ours to set."""
STREAMS = {"chat", "completions", "responses", "messages"}
WHAT = {
    "chat": "A chat completion.", "completions": "A text completion.",
    "responses": "A response; with previous_response_id the next turn of a conversation.",
    "messages": "A message, as in Anthropic's API.", "count_tokens": "How many tokens a message would read.",
    "embeddings": "Embeddings, where the model can.", "rerank": "Documents in the order of their relevance.",
    "score": "How similar texts are.", "classify": "Classes of texts.", "pooling": "A pooling model's raw output.",
    "tokenize": "The tokens of a text or a chat.", "detokenize": "The text of tokens.",
}
DEPTH = 3
"""Levels of a body that are described; below, anything goes."""
OPEN = ("/health", "/ready")


def document() -> Schema:
    """The whole document."""
    api = FastAPI()
    for add in (add_gateway_routes, add_response_routes, add_jobs_routes, add_ledger_routes):
        add(api)
    public = [route for route in api.routes if isinstance(route, APIRoute) and route.path.startswith(("/v1/", *OPEN))]
    described = get_openapi(title="OwnGPT", version=VERSION, openapi_version="3.1.0", routes=public)
    paths = described["paths"]
    for path, (label, _) in ROUTES.items():
        paths[path] = {"post": generation(label), **paths.get(path, {})}
    for path, verb, operation in operations(paths):
        operation["operationId"] = "_".join([verb, *re.findall(r"\w+", path.removeprefix("/v1"))])
        operation["responses"] = {code: answer for code, answer in operation["responses"].items() if code != "422"}
        operation["responses"]["default"] = {"$ref": "#/components/responses/Error"}
        if path in OPEN:
            operation["security"] = []
    schemas = {name: schema for name, schema in described["components"]["schemas"].items() if "Validation" not in name}
    return {
        **described,
        "info": {"title": "OwnGPT", "version": "1", "description":
                 "What is public, generated from the code. Bodies of generation requests are what vLLM takes; a field that "
                 "the served model cannot do is refused by name."},
        "servers": [{"url": "/"}], "security": [{"key": []}], "paths": dict(sorted(paths.items())),
        "components": {"schemas": {**schemas, "Error": ERROR}, "securitySchemes": {
            "key": {"type": "http", "scheme": "bearer", "description": "An API key: make key NAME=…"}},
            "responses": {"Error": {"description": "What went wrong, and what to do.", "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}}},
    }


ERROR: Schema = {
    "type": "object", "required": ["error"], "properties": {"error": {
        "type": "object", "required": ["message", "type"], "properties": {
            "message": {"type": "string"}, "type": {"type": "string"},
            "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}}}}
"""OpenAI's shape, and Anthropic's as far as they share it."""


def operations(paths: Schema) -> Iterator[tuple[str, str, Schema]]:
    """(path, verb, operation) of each."""
    for path, verbs in paths.items():
        for verb, operation in verbs.items():
            yield path, verb, operation


def generation(label: str) -> Schema:
    """The operation of a route that goes to an engine."""
    bodies = [body(kind) for kind in BODIES[label]]
    content: Schema = {"application/json": {"schema": {"type": "object"}}}
    if label in STREAMS:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "summary": WHAT[label], "tags": ["generation"],
        "requestBody": {"required": True, "content": {"application/json": {
            "schema": bodies[0] if len(bodies) == 1 else {"anyOf": bodies}}}},
        "responses": {"200": {"description": "The answer.", "content": content}},
    }


def body(kind: type[BaseModel]) -> Schema:
    """A request class as a schema of its own."""
    whole = kind.model_json_schema()
    schema = prune(whole, whole.get("$defs", {}), DEPTH)
    schema["properties"] = {name: field for name, field in schema["properties"].items() if name not in REFUSED}
    schema["properties"]["model"] = {"type": "string", "description": "One of /v1/models, or an alias."}
    schema["required"] = sorted({*schema.get("required", []), "model"})
    for name in ("prompt", "input", "documents"):
        if name in schema["properties"]:
            schema["properties"][name].setdefault("description", f"At most {MAX_PROMPTS} prompts.")
    return schema


def prune(schema: Schema, known: dict[str, Schema], depth: int) -> Schema:
    """A schema without references, and without its parts below `depth`."""
    if "$ref" in schema:
        return prune(known[schema["$ref"].rsplit("/", 1)[1]], known, depth)
    if depth <= 0:
        return {"type": schema["type"]} if isinstance(schema.get("type"), str) else {}
    kept = {name: value for name, value in schema.items() if name not in ("$defs", "title", "discriminator", "default")}
    for name in ("anyOf", "oneOf", "allOf"):
        if name in kept:
            kept[name] = distinct(prune(part, known, depth - 1 if len(kept[name]) > 2 else depth) for part in kept[name])
    if "properties" in kept:
        kept["properties"] = {name: prune(part, known, depth - 1) for name, part in kept["properties"].items()}
    for name in ("items", "additionalProperties"):
        if isinstance(kept.get(name), dict):
            kept[name] = prune(kept[name], known, depth - 1)
    if "oneOf" in kept:  # what was told apart by its inside may be the same without it
        kept["anyOf"] = kept.pop("oneOf")
    return kept


def distinct(parts: Iterator[Schema]) -> list[Schema]:
    """Without repetition; everything, if one of them is."""
    found: list[Schema] = []
    for part in parts:
        if part not in found:
            found.append(part)
    return [{}] if {} in found else found


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, json.dumps(document(), indent=1, ensure_ascii=False) + "\n"))
