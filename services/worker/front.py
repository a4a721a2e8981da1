"""Our middleware before an engine that cannot carry it: `python -m services.worker.front`, a server of its own.

To nginx and the gateway it is one more worker: the worker's token is asked for, every request is metered, and
conversations are kept. What is behind it is told neither the token nor who asks; its own key, if it has one, leaves
this process towards it alone.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import aiohttp
import msgspec
import uvicorn
from loguru import logger
from prometheus_client import REGISTRY, generate_latest

from common import engines
from common.asgi import App, Message, Receive, Scope, Send
from common.errors import ApiError, UpstreamFailed, encode, encode_parts
from common.metering.rewrite import decode_raw, rewrite
from common.routes import ENGINE_PATHS, ROUTES
from common.settings import read_settings
from common.tasks import end_tasks, repeat
from common.upstream import THEIRS_RETURNED, Upstream, open_session, read
from services.worker import dialects
from services.worker.middleware import WorkerMiddleware
from services.worker.settings import WorkerSettings

CONNECT_TIMEOUT_S = 2.0
METRICS_TIMEOUT_S = 0.8
"""Whoever asks for numbers waits a second."""
LISTED_EVERY_S, LISTED_TIMEOUT_S, LISTED_FOR_S = 5.0, 10.0, 20.0
"""How often the engine is asked what it serves, by this process alone, for it may be somebody's who counts; how long an
answer may take; and how long an old one stands while none comes."""
FIRST_EVERY_S = 0.5
FIRST_TRIES = 60
MAX_SAID_BYTES = 8 * 2**20
"""Of a list of models, or of metrics."""
TEXT = b"text/plain; version=0.0.4; charset=utf-8"
_PUBLIC = {theirs: ours for ours, theirs in ENGINE_PATHS.items()}
NOT_THE_CLIENTS = (401, 403, 407)
"""What is said of our key is not said to clients."""


class Listing(NamedTuple):
    """What an engine said that it serves, and when."""

    body: bytes
    at: float


class Front:
    """The engine at a base URL, as an ASGI app."""

    def __init__(self, settings: WorkerSettings, url: str, key: str) -> None:
        self._settings, self._key = settings, key
        self._url = url.rstrip("/").removesuffix("/v1")
        self._engine: str = settings.engine
        self._slots = 0
        self._dialect = dialects.find(settings.engine)
        self._session: aiohttp.ClientSession | None = None
        self._listing: Listing | None = None
        self._look_at, self._tries = 0.0, 0
        self.salted: set[str] = set(self._dialect.salted)
        """The routes on which the engine takes a `cache_salt`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        path = scope["path"]
        if scope["method"] == "POST" and (public := _PUBLIC.get(path, path)) in ROUTES:
            await self._forward(public, scope, receive, send)
        elif path == "/metrics":  # ours stand by themselves
            await _answer(send, 200, TEXT, generate_latest(REGISTRY) + (await self._numbers() or b""))
        elif path == dialects.NUMBERS_PATH:
            numbers = await self._numbers()
            await _answer(send, 502 if numbers is None else 200, TEXT, numbers or b"")
        elif path in ("/v1/models", "/health"):
            listing = self._listing
            fresh = listing is not None and time.monotonic() - listing.at < LISTED_FOR_S
            said = [(dialects.ENGINE, self._engine.encode()), (dialects.SLOTS, b"%d" % self._slots)]
            await _answer(send, 200 if fresh else 502, b"application/json", listing.body if listing else b"", said)
        else:
            await _answer(send, 404, b"application/json", b"")

    async def _live(self, receive: Receive, send: Send) -> None:
        looking: list[asyncio.Task[None]] = []
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._session = open_session(
                    CONNECT_TIMEOUT_S, self._settings.read_timeout_s,
                    reuse=self._url.startswith("https"),  # a handshake costs; llama.cpp closes when it likes
                )
                looking = [asyncio.create_task(repeat("what the engine serves", self._look, FIRST_EVERY_S))]
            else:
                await end_tasks(looking)
                if self._session is not None:
                    await self._session.close()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return

    async def _look(self) -> bool:
        """What the engine serves, when it is time to ask: often until it first says so. False: it was not."""
        if time.monotonic() < self._look_at:
            return False
        self._tries += 1
        try:
            status, body = await self._get("/v1/models", LISTED_TIMEOUT_S)
        except aiohttp.ClientConnectorError:
            self._listing = None  # nobody is there: no need to wait until the old one is too old
        except (aiohttp.ClientError, TimeoutError) as error:
            logger.warning("the engine does not say what it serves", error=str(error) or type(error).__name__)
        else:
            if status == 200:
                await self._recognise(body)
                self._listing = Listing(body, time.monotonic())
            else:
                logger.warning("the engine does not say what it serves", status=status)
        often = self._listing is None and self._tries < FIRST_TRIES
        self._look_at = time.monotonic() + (0 if often else LISTED_EVERY_S)
        return True

    async def _recognise(self, listing: bytes) -> None:
        """Whose server it is, where only its address is known; of llama.cpp, what it can do with this model."""
        engine = dialects.recognise(self._settings.engine, listing)
        self._dialect = dialects.find(engine)
        if engine == "llamacpp":
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, msgspec.MsgspecError, UnicodeDecodeError):
                props = msgspec.json.decode((await self._get("/props", LISTED_TIMEOUT_S))[1], type=dialects.Props)
                engine, self._slots = props.engine, props.total_slots
        self._engine = engine
        self.salted.clear()
        self.salted.update(self._dialect.salted)

    async def _forward(self, public: str, scope: Scope, receive: Receive, send: Send) -> None:
        takes = engines.LIMITED.get(self._engine)
        if takes is not None and public not in takes:
            await _answer(send, 404, b"application/json", b"")
            return
        assert self._session is not None  # noqa: S101 - requests come after the startup
        upstream = Upstream(self._session, self._url, self._key, returned=THEIRS_RETURNED, judge=self._judge)
        await upstream(scope, self._fitted(public, receive), send)

    def _fitted(self, path: str, receive: Receive) -> Receive:
        """The body as this engine takes it: its name for the model, without what is for us or for vLLM alone."""
        ours = self._settings
        theirs = "" if ours.engine == "llamacpp" or ours.model == ours.served_name else ours.model
        without: set[str] = set(engines.foreign(self._engine, path))
        fields: dict[str, object] = {}
        llamacpp = dialects.base(self._engine) == "llamacpp"
        if path == "/v1/responses" and self._engine != "vllm":
            without.add("request_id")
            if not llamacpp:  # it keeps none
                fields["store"] = False  # we do
        defaults = {"max_tokens": 16} if path == "/v1/completions" and llamacpp else None

        async def fitted() -> Message:
            message = await receive()
            if message.get("body"):  # `Metering` gives it whole
                named = one_tool(message["body"]) if llamacpp else {}
                body = rewrite(
                    message["body"], model=theirs, without=without, fields=fields | named, defaults=defaults
                )
                message = {**message, "body": body}
            return message

        return fitted

    def _judge(self, status: int, error: bytes) -> int:
        """What an error of the engine is taken for."""
        if status in NOT_THE_CLIENTS or status < 400:  # 3xx: where prompts go is our owner's decision
            logger.error("the engine refuses us", status=status, url=self._url)
            return 503
        own = any(text in error for text in dialects.LLAMACPP_FAILS)
        if status == 500 and dialects.base(self._engine) == "llamacpp" and not own:
            return 400
        return status

    async def _numbers(self) -> bytes | None:
        """The engine's own metrics; None: it has none, or does not say."""
        if not self._dialect.metrics_path:
            return None
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            status, body = await self._get(self._dialect.metrics_path, METRICS_TIMEOUT_S)
            if status == 200 and not body.startswith((b"[", b"{", b"<")):  # else no text of Prometheus'
                return body if body.endswith(b"\n") else body + b"\n"
        return None

    async def _get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        """Status and body. Raises ClientError, TimeoutError."""
        assert self._session is not None  # noqa: S101 - as above
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        asked = self._session.get(self._url + path, headers=headers, allow_redirects=False)
        async with asyncio.timeout(timeout_s), asked as answer:
            body = await read(answer, MAX_SAID_BYTES + 1)
            if len(body) > MAX_SAID_BYTES:
                raise aiohttp.ClientPayloadError(f"{path}: more than {MAX_SAID_BYTES} bytes")
            return answer.status, body


def one_tool(body: bytes) -> dict[str, object]:
    """The fields of a request for a tool by its name, which llama.cpp does not know: any tool, of that one."""
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
        said = decode_raw(body)
        name = msgspec.json.decode(said["tool_choice"])["function"]["name"]
        tools = [tool for tool in msgspec.json.decode(said["tools"]) if tool["function"]["name"] == name]
        if tools:
            return {"tool_choice": "required", "tools": tools}
    return {}


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


async def _answer(
    send: Send, status: int, kind: bytes, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *headers]})
    await send({"type": "http.response.body", "body": body})


def serve(settings: WorkerSettings, url: str, key: str) -> None:
    """Before the engine at a base URL that asks for a key, until a signal ends it."""
    front = Front(settings, url, key)
    app = answered(WorkerMiddleware(front, vllm=False, salted=front.salted))
    uvicorn.run(app, host=settings.engine_host, port=settings.engine_port, log_level="warning", access_log=False,
                lifespan="on")


def main() -> None:
    """Before the server at ENGINE_URL."""
    settings = read_settings(WorkerSettings, "worker")
    serve(settings, settings.engine_url, settings.engine_key)


if __name__ == "__main__":
    main()
