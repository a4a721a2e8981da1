"""FastAPI handlers that answer errors in the API's shape."""

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from loguru import logger
from starlette.exceptions import HTTPException

from common import errors


async def answer_api_error(request: Request, error: Exception) -> Response:
    """An exception handler: an ApiError in OpenAI's shape."""
    assert isinstance(error, errors.ApiError)  # noqa: S101 - registered for it only
    status, headers, body = errors.encode(error)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


async def answer_away(request: Request, error: Exception) -> Response:
    """An exception handler: the redis, the database or the disk behind this service. Later it may."""
    logger.warning("away", path=request.scope["path"], error=str(error) or type(error).__name__)
    text = "What this service keeps its state in does not answer, or is full; its log says more. Try again later."
    return await answer_api_error(request, errors.Unavailable(text, code="state_unavailable", retry_after_s=5))


async def answer_bug(request: Request, error: Exception) -> Response:
    """An exception handler for everything else: our words; the server's log gets the cause."""
    return await answer_api_error(request, errors.ApiError(f"The service failed ({type(error).__name__})."))


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """An exception handler: no such path, or not with this method; or a form that cannot be read."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it only
    path, method = request.scope["path"], request.method
    if error.status_code == 405:
        return await answer_api_error(request, errors.MethodNotAllowed(f"{path} does not take {method}."))
    if error.status_code != 404:
        return await answer_api_error(request, errors.InvalidRequest(f"{error.detail}."))
    return await answer_api_error(request, errors.NotFound(f"There is nothing at {path}."))


async def answer_invalid(request: Request, error: Exception) -> Response:
    """Pydantic's complaint in OpenAI's shape: the first field, all of them in the text."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it only
    problems = [
        (".".join(str(p) for p in e["loc"] if p not in ("body", "query")), e["msg"], e.get("input"))
        for e in error.errors()
    ]
    text = "; ".join(f"{name or 'body'}: {message} (got {str(value)[:100]!r})" for name, message, value in problems)
    return await answer_api_error(request, errors.InvalidRequest(text, param=problems[0][0] or None))
