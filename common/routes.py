"""The public generation routes."""


ROUTES = {
    "/v1/chat/completions": ("chat", ("messages",)),
    "/v1/completions": ("completions", ("prompt",)),
    "/v1/responses": ("responses", ("input",)),
    "/v1/messages": ("messages", ("messages",)),
    "/v1/messages/count_tokens": ("count_tokens", ("messages",)),
    "/v1/embeddings": ("embeddings", ("input",)),
    "/tokenize": ("tokenize", ("prompt", "messages")),
    "/detokenize": ("detokenize", ()),
}
"""Public path -> (route label, fields of which one must be there). Every other path is not forwarded."""
