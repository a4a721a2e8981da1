"""What the HTTP services below `services/` have in common: the app, whose request it is, the metrics, the command.

    python -m services.NAME --port N
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from common import errors
from common.auth import bearer
from common.keys import ApiKey
from common.problems import answer_api_error, answer_away, answer_bug, answer_http_exception, answer_invalid


def make_api(lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]]) -> FastAPI:
    """An app that answers errors in OpenAI's shape, and /health. Its lifespan sets `state.authenticator`."""
    api = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    api.add_exception_handler(errors.ApiError, answer_api_error)
    api.add_exception_handler(HTTPException, answer_http_exception)
    api.add_exception_handler(RequestValidationError, answer_invalid)
    for away in (RedisError, OSError):
        api.add_exception_handler(away, answer_away)
    api.add_exception_handler(Exception, answer_bug)

    @api.get("/health")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    return api


async def owner(request: Request) -> str:
    """Whose request this is: the id of its API key."""
    key: ApiKey = await request.app.state.authenticator.check(bearer(dict(request.scope["headers"])))
    return key.id


Owner = Annotated[str, Depends(owner)]


def exposition(registry: CollectorRegistry) -> Response:
    """Prometheus text. nginx does not let it out."""
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def serve(name: str, description: str) -> None:
    """Parse the address and serve `services.NAME.app:from_environment` until told to stop."""
    parser = argparse.ArgumentParser(prog=f"python -m services.{name}", description=description)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    args = parser.parse_args()
    uvicorn.run(
        f"services.{name}.app:from_environment", factory=True, host=args.host, port=args.port, access_log=False,
        log_level="warning", server_header=False, date_header=False, timeout_keep_alive=75,
        timeout_graceful_shutdown=10,
    )
