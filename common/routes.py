"""The public generation routes."""


ROUTES = {
    "/v1/chat/completions": ("chat", ("messages",)),
    "/v1/completions": ("completions", ("prompt",)),
    "/v1/responses": ("responses", ("input",)),
    "/v1/messages": ("messages", ("messages",)),
    "/v1/messages/count_tokens": ("count_tokens", ("messages",)),
    "/v1/embeddings": ("embeddings", ("input",)),
    "/v1/rerank": ("rerank", ("documents",)),
    "/v1/score": ("score", ("text_1", "queries", "data_1")),
    "/v1/classify": ("classify", ("input", "messages")),
    "/v1/pooling": ("pooling", ("input", "messages")),
    "/tokenize": ("tokenize", ("prompt", "messages")),
    "/detokenize": ("detokenize", ()),
}
"""Public path -> (route label, fields of which one must be there). Every other path is not forwarded."""

ENGINE_PATHS = {"/v1/classify": "/classify", "/v1/pooling": "/pooling"}
"""Where vLLM has them elsewhere."""
