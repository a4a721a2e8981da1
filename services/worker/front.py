"""Our middleware before an engine that cannot carry it: `python -m services.worker.front`, a server of its own.

To nginx and the gateway it is one more worker: the worker's token is asked for, every request is metered, answers and
conversations are kept. What is behind it is told neither the token nor who asks; its own key, if it has one, leaves
this process towards it alone. One more hop for each byte: 50 microseconds a streamed event.
"""

import asyncio

import aiohttp
import uvicorn
from prometheus_client import REGISTRY, generate_latest

from common import engines
from common.asgi import App, Message, Receive, Scope, Send
from common.errors import ApiError, UpstreamFailed, encode, encode_parts
from common.metering.rewrite import rewrite
from common.routes import ROUTES
from common.settings import read_settings
from common.upstream import Upstream, open_session
from services.worker.engines import dialects
from services.worker.middleware import WorkerMiddleware
from services.worker.settings import WorkerSettings

CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 600.0
"""The longest silence of an engine, nginx' of a worker as well."""
ASK_TIMEOUT_S = 0.8
"""Whoever asks waits a second."""
TEXT = b"text/plain; version=0.0.4; charset=utf-8"


class Front:
    """The engine at a base URL, as an ASGI app."""

    def __init__(self, settings: WorkerSettings, url: str, key: str) -> None:
        self._settings, self._url, self._key = settings, url.rstrip("/").removesuffix("/v1"), key
        self._dialect = dialects.find(settings.engine)
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["method"] == "POST" and scope["path"] in ROUTES:
            await self._forward(scope, receive, send)
        elif scope["path"] == "/metrics":
            theirs = await self._ask(self._dialect.metrics_path) if self._dialect.metrics_path else None
            own = generate_latest(REGISTRY)
            await _answer(send, 200, TEXT, own + (theirs[1] if theirs is not None and theirs[0] == 200 else b""))
        elif scope["path"] in ("/v1/models", "/health"):
            status, body = await self._ask("/v1/models") or (502, b"")
            await _answer(send, status, b"application/json", body)
        else:
            await _answer(send, 404, b"application/json", b"")

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._session = open_session(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
            elif self._session is not None:
                await self._session.close()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._session is not None  # noqa: S101 - requests come after the startup
        await Upstream(self._session, self._url, self._key)(scope, self._fitted(scope["path"], receive), send)

    def _fitted(self, path: str, receive: Receive) -> Receive:
        """The body with the name by which the engine knows the model, without what is for us alone."""
        ours, without = self._settings, engines.foreign(self._settings.engine, path)
        theirs = "" if ours.engine == "llamacpp" or ours.model == ours.served_name else ours.model

        async def fitted() -> Message:
            message = await receive()
            if message.get("body"):  # `Metering` gives it whole
                message = {**message, "body": rewrite(message["body"], model=theirs, without=without)}
            return message

        return fitted

    async def _ask(self, path: str) -> tuple[int, bytes] | None:
        """Status and body of an answer to GET; None: silence."""
        assert self._session is not None  # noqa: S101 - as above
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S), self._session.get(self._url + path, headers=headers) as answer:
                return answer.status, await answer.read()
        except (aiohttp.ClientError, TimeoutError):
            return None


def answered(app: App) -> App:
    """What is raised before an answer has begun becomes one: nginx then asks the gateway for another worker."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except UpstreamFailed as failure:
            status, headers, body = encode_parts(502 if failure.ran else 503, str(failure), "server_error")
        except ApiError as error:
            status, headers, body = encode(error)
        else:
            return
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answer


async def _answer(send: Send, status: int, kind: bytes, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": body})


def serve(settings: WorkerSettings, url: str, key: str) -> None:
    """Before the engine at a base URL that asks for a key, until a signal ends it."""
    app = answered(WorkerMiddleware(
        Front(settings, url, key), vllm=False, salted=dialects.find(settings.engine).salted
    ))
    uvicorn.run(app, host=settings.engine_host, port=settings.engine_port, log_level="warning", access_log=False)


def main() -> None:
    """Before the server at ENGINE_URL."""
    settings = read_settings(WorkerSettings, "worker")
    serve(settings, settings.engine_url, settings.engine_key)


if __name__ == "__main__":
    main()
