"""The request path: everything that happens to a generation request, top to bottom.

    1 name it          request id
    2 who asks         API key
    3 read             the body, up to the limit
    4 decode           only the fields the decision needs; an alias becomes the model it stands for
    5 look back        did earlier tries of it fail, is it held back
    6 remember         was the same asked before; then its answer is replayed
    7 choose           a worker
    8 answer           `X-Accel-Redirect` for nginx, or relay the bytes

A raw ASGI app: on this path FastAPI would cost more than everything above together.
"""

import re
import secrets
import time
from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import aiohttp
from loguru import logger

from common import errors
from common.aliases import AliasTable
from common.answers.store import BYPASS, HEADER
from common.asgi import Message, Receive, Scope, Send
from common.auth import Authenticator, bearer
from common.keys import ApiKey
from common.metering.context import CONTEXT, TRACEPARENT
from common.metering.meter import Meter
from common.metering.metered import Metering
from common.metering.rewrite import rewrite
from common.records import ANSWER_CACHE, Record
from common.routes import ROUTES
from common.workers import Worker, WorkerTable
from gateway import attempts, routing
from gateway.answers import Answers, Collecting, render, replay
from gateway.decode import Ask, decode
from gateway.isolation import Scopes
from gateway.metrics import GatewayMetrics
from gateway.question import Question, ask_question
from gateway.relay import Upstream
from gateway.settings import Settings

if TYPE_CHECKING:
    from gateway.tracing import Traced, Tracing

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{8,64}")
RETRY_AFTER_S = 2
PRIORITY = b"x-vllm-priority"
"""Batches send one; a client's is dropped, else everybody would be first."""
_OURS = (b"x-request-id", PRIORITY, CONTEXT, TRACEPARENT)
"""What a client may send and a worker hears from us alone."""

HoldBack = Callable[[str], None]


class HeldBack:
    """Digests of request bodies that killed MAX_DEATHS workers, each refused until its time is over."""

    def __init__(self, hold_s: int, publish: HoldBack, clock: Callable[[], float] = time.monotonic) -> None:
        self._hold_s = hold_s
        self._publish = publish
        self._clock = clock
        self._until: dict[str, float] = {}

    @staticmethod
    def digest(body: bytes) -> str:
        """The fingerprint of a body."""
        return blake2b(body, digest_size=16).hexdigest()

    def add(self, digest: str) -> None:
        """Hold a body back, here (`learn`) and in every other gateway."""
        self.learn(digest)
        self._publish(digest)

    def learn(self, digest: str) -> None:
        """Hold a body back that some gateway has met."""
        self._until[digest] = self._clock() + self._hold_s

    def refuses(self, body: bytes) -> bool:
        """Whether a body is held back; costs nothing while none is."""
        if not self._until:
            return False
        now = self._clock()
        for digest in [d for d, until in self._until.items() if until <= now]:
            del self._until[digest]
        return self.digest(body) in self._until


class _Request(NamedTuple):
    """What the way to a worker needs to know of a request."""

    ask: Ask
    body: bytes
    key_id: str
    id: bytes
    cache_scope: str
    salt: str
    took_s: float
    """What the decision took."""
    traceparent: bytes
    """Empty: nobody traces."""

    def headers(self, attempt: int) -> list[tuple[bytes, bytes]]:
        """What the worker's metering and its tracing read."""
        context = f"{self.key_id} {attempt} {self.salt} {self.took_s * 1e6:.0f}".encode()
        return [(CONTEXT, context), *([(TRACEPARENT, self.traceparent)] if self.traceparent else ())]


class RequestPath:
    """The hot routes as one ASGI app."""

    def __init__(
        self,
        settings: Settings,
        table: WorkerTable,
        authenticator: Authenticator,
        held: HeldBack,
        session: aiohttp.ClientSession,
        meter: Meter,
        metrics: GatewayMetrics,
        answers: Answers | None,
        aliases: AliasTable,
        priority: bytes = b"",
        tracing: "Tracing | None" = None,
    ) -> None:
        self._settings = settings
        self._table = table
        self._authenticator = authenticator
        self._held = held
        self._session = session
        self._meter = meter
        self._metrics = metrics
        self._answers = answers
        self._aliases = aliases
        self._scopes = Scopes(settings.cache_secret, settings.cache_scope)
        self._holders = routing.Holders()
        self._decided = {route: metrics.decisions.labels(route, "fast") for route, _ in ROUTES.values()}
        self._tracing = tracing
        self._token = settings.worker_token.encode()
        self._priority = [(PRIORITY, priority)] if priority else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = name_request(scope)
        if self._tracing is None:
            await self._answer(scope, receive, send, request_id, None)
            return
        traced = self._tracing.begin(scope, ROUTES[scope["path"]][0], request_id)
        try:
            await self._answer(scope, receive, send, request_id, traced)
        finally:
            traced.end()

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, request_id: bytes, traced: "Traced | None"
    ) -> None:
        started = time.perf_counter()
        path, route = scope["path"], ROUTES[scope["path"]][0]
        try:
            if scope["method"] != "POST":
                raise errors.MethodNotAllowed(f"{path} takes POST, not {scope['method']}.")
            credentials = bearer(scope["headers"])
            key = self._authenticator.cached(credentials) or await self._authenticator.check(credentials)
            body = await read_body(scope, receive, self._settings.max_body_bytes)
            if body is None:
                return
            ask = decode(path, body, self._settings.max_n)
            alias = self._aliases.targets.get(ask.model)
            if alias is not None:
                ask.model, body = alias, rewrite(body, usage=False, model=alias)
            tried = look_back(scope) if self._settings.edge == "nginx" else attempts.Attempts()
            self._refuse_poison(tried, body)
            cache_scope = self._scopes.of(key)
            question = None
            if self._answers is not None:
                revision = self._table.revision
                question = ask_question(route, ask, body, scope["headers"], cache_scope, revision)
            if question is not None:
                if await self._remember(question, key, ask, request_id, started, send):
                    return
                self._refuse_poison(tried, body)  # whoever was answering it may have killed workers meanwhile
            chosen = self._choose(ask, cache_scope, tried)
        except errors.ApiError as error:
            self._metrics.decisions.labels(route, str(error.status)).inc()
            log_refusal(error, request_id, path)
            if traced is not None:
                traced.failed(error.status, error.code)
            await send_error(error, request_id, send)
            return
        trace = b""
        if traced is not None:
            trace = traced.traceparent
            traced.note(key=key.id, model=ask.model, worker=chosen.worker.beat.id, reason=chosen.reason)
        salt = self._scopes.salt(cache_scope)
        worker = chosen.worker
        worker.sent += 1
        took = time.perf_counter() - started
        request = _Request(ask, body, key.id, request_id, cache_scope, salt, took, trace)
        self._metrics.decision_seconds.observe(took)
        timing = b'gateway;dur=%.2f;desc="%s"' % (took * 1e3, chosen.reason.encode())
        if question is not None and self._answers is not None:
            self._metrics.decisions.labels(route, "relay").inc()
            collecting = Collecting(question, _explain(send, (b"server-timing", timing)), self._answers.max_bytes)
            asked = rewrite(body, usage=True) if question.stream and not question.usage else body
            with self._answers.flight(question, collecting):
                await self._relay(worker, request, asked, scope, receive, collecting)
        elif self._settings.edge == "nginx" and worker.beat.metered and alias is None:
            self._decided[route].inc()
            await self._accelerate(worker, request, len(tried.tried) + 1, timing, send)
        else:
            self._metrics.decisions.labels(route, "relay").inc()
            explained = _explain(send, (b"server-timing", timing), (HEADER, BYPASS))
            await self._relay(worker, request, body, scope, receive, explained)

    async def _remember(
        self, question: Question, key: ApiKey, ask: Ask, request_id: bytes, started: float, send: Send
    ) -> bool:
        """Replay the answer to the same question, if there is one."""
        assert self._answers is not None  # noqa: S101 - else there is no question
        document = await self._answers.find(question)
        if document is None or (body := render(question, document, request_id)) is None:
            return False
        self._metrics.decisions.labels(question.route, "answer").inc()
        usage, took = document["usage"], time.perf_counter() - started
        record = Record(
            id=secrets.token_hex(8), request_id=request_id.decode(), key=key.id, model=ask.model, route=question.route,
            worker=ANSWER_CACHE, started_at=time.time() - took, stream=question.stream, outcome="ok", status=200,
            finish_reason=document["choices"][0]["finish_reason"], prompt_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens"], completion_tokens=usage["completion_tokens"],
            decision_s=round(took, 6), ttft_s=round(took, 6), duration_s=round(took, 6),
        )
        self._meter.begin(record)
        self._meter.end(record)
        await replay(question, body, [
            (b"x-request-id", request_id), (b"x-owngpt-worker", ANSWER_CACHE.encode()),
            (b"server-timing", b'gateway;dur=%.2f;desc="answer"' % (took * 1e3)),
        ], send)
        return True

    async def _accelerate(
        self, worker: Worker, request: "_Request", attempt: int, timing: bytes, send: Send
    ) -> None:
        """Tell nginx where to send the original request."""
        await send({
            "type": "http.response.start",
            "status": 200,
            "headers": [
                (b"x-accel-redirect", b"@worker"),
                (b"x-worker", worker.beat.address.encode()),
                (b"x-worker-token", self._token),
                (b"x-request-id", request.id),
                (b"server-timing", timing),
                (HEADER, BYPASS),
                (b"content-length", b"0"),
                *request.headers(attempt),
            ],
        })
        await send({"type": "http.response.body", "body": b""})

    async def _relay(
        self, worker: Worker, request: "_Request", body: bytes, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Carry the bytes of `body`, the request's own or what we made of it; on an early failure, choose again."""
        tried = attempts.Attempts()
        while True:
            address = worker.beat.address
            forwarded = {**scope, "headers": [
                *[(n, v) for n, v in scope["headers"] if n not in _OURS],
                *self._priority,
                (b"x-request-id", request.id),
                *request.headers(len(tried.tried) + 1),
            ]}
            upstream = Upstream(self._session, address, self._settings.worker_token)
            app = upstream if worker.beat.metered else Metering(upstream, self._meter, worker.beat.id)
            try:
                await app(forwarded, _replay(body, receive), send)
                return
            except errors.UpstreamFailed as failure:
                reason: attempts.Reason = "refused" if not failure.ran else "failed" if failure.answered else "died"
                tried = attempts.Attempts((*tried.tried, address), tried.deaths + failure.ran, reason=reason)
            try:
                self._refuse_poison(tried, request.body)
                worker = self._choose(request.ask, request.cache_scope, tried).worker
                worker.sent += 1
            except errors.ApiError as error:
                self._metrics.decisions.labels(ROUTES[scope["path"]][0], str(error.status)).inc()
                log_refusal(error, request.id, scope["path"])
                await send_error(error, request.id, send)
                return

    def _refuse_poison(self, tried: attempts.Attempts, body: bytes) -> None:
        """Raise for a request that killed too many workers, or is held back because it did before."""
        if tried.timed_out:
            raise errors.GatewayTimeout("The worker did not answer in time.")
        if tried.deaths >= attempts.MAX_DEATHS:
            self._held.add(HeldBack.digest(body))
            raise errors.UpstreamError(
                f"{tried.deaths} workers died while they ran this request; it is not tried again.",
                code="request_held_back",
            )
        if self._held.refuses(body):
            raise errors.UpstreamError(
                "Workers died while they ran this very request; it is refused for a while.",
                code="request_held_back", retry_after_s=self._settings.hold_back_s,
            )

    def _choose(self, ask: Ask, cache_scope: str, tried: attempts.Attempts) -> routing.Route:
        for address in tried.tried[-1:]:
            self._table.suspect(address)
            self._metrics.retries.labels(tried.reason).inc()
            logger.warning("worker failed a request", address=address, deaths=tried.deaths)
        workers = self._table.serving(ask.model)
        if not workers and not tried.tried:
            self._explain_nobody(ask.model)
        fresh = [worker for worker in workers if worker.beat.address not in tried.tried]
        if not fresh or len(tried.tried) >= attempts.MAX_ATTEMPTS:
            if tried.deaths:
                raise errors.UpstreamError("The worker died while it ran this request, and no other can take it.")
            raise errors.Unavailable("No worker could take the request.", retry_after_s=RETRY_AFTER_S)
        return routing.choose(fresh, ask.model, cache_scope, ask.prefix, self._holders)

    def _explain_nobody(self, model: str) -> None:
        served = self._table.models()
        if served and model not in self._table.known_models:
            raise errors.NotFound(
                f"The model {model!r} does not exist. There are: {', '.join(sorted(served))}.",
                param="model", code="model_not_found",
            )
        raise errors.Unavailable("No worker is ready.", retry_after_s=RETRY_AFTER_S)


def name_request(scope: Scope) -> bytes:
    """The client's request id when it is a plain token, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return bytes(value)
    return secrets.token_hex(16).encode()


async def read_body(scope: Scope, receive: Receive, limit_bytes: int) -> bytes | None:
    """The whole body, or None when the client left. Raises BodyTooLarge."""
    for name, value in scope["headers"]:
        if name == b"content-length" and int(value) > limit_bytes:
            raise errors.BodyTooLarge(limit_bytes)
    message = await receive()
    if not message.get("more_body"):
        return None if message["type"] == "http.disconnect" else message["body"]
    parts, size = [message["body"]], len(message["body"])
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message["body"])
        size += len(message["body"])
        if size > limit_bytes:
            raise errors.BodyTooLarge(limit_bytes)
    return b"".join(parts)


def look_back(scope: Scope) -> attempts.Attempts:
    """Earlier tries of this request, from nginx's headers."""
    found: dict[bytes, str] = {}
    for name, value in scope["headers"]:
        if name.startswith(b"x-failed-"):
            found[name] = value.decode("latin-1")
    if not found:
        return attempts.Attempts()
    return attempts.read(
        found.get(b"x-failed-worker", ""), found.get(b"x-failed-sent", ""), found.get(b"x-failed-status", "")
    )


def log_refusal(error: errors.ApiError, request_id: bytes, path: str) -> None:
    """One line for a request that went to no worker."""
    logger.log(
        "WARNING" if error.status >= 500 else "INFO",
        "refused", request_id=request_id.decode(), path=path, status=error.status, code=error.code,
    )


async def send_error(error: errors.ApiError, request_id: bytes, send: Send) -> None:
    """Answer with an error."""
    status, headers, body = errors.encode(error)
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"x-request-id", request_id)]})
    await send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting = [body]

    async def replayed() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replayed


def _explain(send: Send, *headers: tuple[bytes, bytes]) -> Send:
    async def explaining(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *headers]
        await send(message)

    return explaining
