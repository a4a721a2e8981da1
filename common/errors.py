"""Every error a client can see, in OpenAI's JSON shape, or Anthropic's on Anthropic's routes.

Knows the texts, types and codes. Does not know HTTP servers: the edge turns an `ApiError` into a response.
Shapes: https://platform.openai.com/docs/guides/error-codes and https://docs.claude.com/en/api/errors
"""

import msgspec


class ApiError(Exception):
    """An answer to the client that is not a success.

    `retry_after_s` adds `Retry-After`; errors that a client must not repeat as they are carry
    `x-should-retry: false`, which the openai SDK obeys.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code


class InvalidRequest(ApiError):
    """400: the body or a field of it is wrong; `param` names the field."""

    status = 400
    type = "invalid_request_error"


class Unauthorized(ApiError):
    """401: no key, or not one of ours. The text is the same for every cause."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__("Missing or incorrect API key. Send it as 'Authorization: Bearer <key>'.")


class NotFound(ApiError):
    """404: no such path or model."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(ApiError):
    """409: not now, as things stand; the text says what stands in the way."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class MethodNotAllowed(ApiError):
    """405."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class BodyTooLarge(ApiError):
    """413: the body is over MAX_BODY_BYTES."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request body is larger than the limit of {limit_bytes} bytes (MAX_BODY_BYTES).")


class UpstreamError(ApiError):
    """502: the request was running on a worker, and the worker died."""

    status = 502
    code = "upstream_error"


class Unavailable(ApiError):
    """503: nobody can answer now; later somebody may."""

    status = 503
    code = "no_worker_ready"


class UpstreamFailed(Exception):
    """A worker failed before anything was sent to the client.

    `ran`: it may have been working on the request; `answered`: with an error of its own.
    """

    def __init__(self, reason: str, *, ran: bool, answered: bool = False) -> None:
        super().__init__(reason)
        self.ran = ran
        self.answered = answered


class StreamLost(Exception):
    """An engine was lost in the middle of its stream. The last event may be half an event."""


class GatewayTimeout(ApiError):
    """504: the worker held the request longer than the read timeout."""

    status = 504
    code = "upstream_timeout"


_ANTHROPIC_ROUTES = frozenset({"messages", "count_tokens"})
_ANTHROPIC_TYPES = {
    401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error",
}


def encode(error: ApiError, route: str = "") -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of an error response on a route (its label in `common.routes`)."""
    return encode_parts(
        error.status, error.message, error.type, error.param, error.code, error.retry_after_s, route=route
    )


def encode_parts(
    status: int,
    message: str,
    type_: str,
    param: str | None = None,
    code: str | None = None,
    retry_after_s: int | None = None,
    *,
    route: str = "",
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """The one place that knows how an error looks on the wire."""
    said: dict[str, object] = {"error": {"message": message, "type": type_, "param": param, "code": code}}
    if route in _ANTHROPIC_ROUTES:
        kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        said = {"type": "error", "error": {"type": kind, "message": message}}
    body = msgspec.json.encode(said)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    if retry_after_s is not None:
        headers.append((b"retry-after", str(retry_after_s).encode()))
    elif status in (409, 500, 502, 504):
        headers.append((b"x-should-retry", b"false"))
    return status, headers, body
