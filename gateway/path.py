"""The request path: everything that happens to a generation request, top to bottom.

    1 name it      our uid, the client's label, what nginx brings back from earlier attempts
    2 who asks     API key
    3 read         the body, up to the limit
    4 decode       only the fields the decision needs; an alias becomes the model it stands for
    5 look back    did earlier attempts fail, is it held back
    6 remember     was the same asked before, or is it being answered right now
    7 choose       a worker; a model that sleeps is waited for
    8 decide       Replay, Accelerate, Relay; Refuse from anywhere above

Nothing is awaited, sent or read here: steps that must wait yield what they wait for (`steps.py`), an edge carries the
decision out (`edge_http.py`, `edge_asgi.py`). Errors of any kind end here, counted and logged.
"""

import itertools
import re
import secrets
import time
from typing import TYPE_CHECKING

import msgspec
from loguru import logger

from common import errors
from common.aliases import AliasTable
from common.auth import Authenticator, bearer
from common.keys import ApiKey
from common.metering import context
from common.metering.context import CONTEXT, Context, Keep
from common.metering.meter import Meter
from common.records import ANSWER_CACHE, Record
from common.routes import ROUTES
from common.workers import WorkerTable
from gateway import attempts, routing, turns
from gateway.answers import Answers
from gateway.arrival import Arrival, ClientGone
from gateway.attempts import Attempts, HeldBack
from gateway.choose import Chooser
from gateway.decision import Accelerate, Decision, Refuse, Relay, Replay
from gateway.decode import Ask, decode
from gateway.isolation import Scopes
from gateway.metrics import GatewayMetrics
from gateway.question import Question, ask_question, may_be_remembered
from gateway.settings import Settings
from gateway.steps import Steps
from gateway.waking import Waking

if TYPE_CHECKING:
    from gateway.tracing import Tracing

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{8,64}")

class RequestPath:
    """The hot routes: from an arrival to a decision."""

    def __init__(
        self,
        settings: Settings,
        table: WorkerTable,
        authenticator: Authenticator,
        held: HeldBack,
        meter: Meter,
        metrics: GatewayMetrics,
        answers: Answers | None,
        aliases: AliasTable,
        waking: Waking,
        tracing: "Tracing | None" = None,
    ) -> None:
        self._settings, self._table, self._authenticator, self._held = settings, table, authenticator, held
        self._meter, self._metrics, self._answers, self._aliases = meter, metrics, answers, aliases
        self._tracing = tracing
        self._scopes = Scopes(settings.cache_secret, settings.cache_scope)
        self._chooser = Chooser(table, metrics, waking)
        # Ours alone: a prefix that nobody else has, and a number.
        self._uids = map(f"{secrets.token_hex(5)}{{:06x}}".format, itertools.count(1))

    def decide(self, arrival: Arrival) -> Steps[Decision]:
        """What becomes of a request. Raises ClientGone."""
        decision: Decision | None = None
        try:
            self._name(arrival)
            decision = yield from self._decide(arrival)
        except errors.ApiError as error:
            decision = self._refuse(arrival, error)
        except ClientGone:
            raise
        except Exception as error:  # a bug of ours: the client gets our words, the log gets the cause
            logger.exception("the path failed", request_id=arrival.request_id, path=arrival.path)
            decision = self._refuse(arrival, errors.ApiError(f"The gateway failed ({type(error).__name__})."))
        finally:  # also when the client leaves while something is awaited
            if arrival.traced is not None and not isinstance(decision, Relay):
                arrival.traced.end()
        return decision

    def _decide(self, arrival: Arrival) -> Steps[Decision]:
        if arrival.method != "POST":  # 1
            raise errors.MethodNotAllowed(f"{arrival.path} takes POST, not {arrival.method}.")
        key = yield from self._who(arrival)  # 2
        if arrival.body is None:  # 3
            assert arrival.read is not None  # noqa: S101 - an edge gives the body or the means
            arrival.body = yield arrival.read(self._settings.max_body_bytes)
        body = arrival.body
        ask = decode(arrival.path, body, self._settings.max_n)  # 4
        model = self._aliases.targets.get(ask.model, "")
        if model and ask.model in self._table.known_models:
            model = ""  # an alias shadows no model, also none that is away for a moment
        tried = self._look_back(arrival)  # 5
        self._refuse_poison(tried, body)
        wish = turns.read(arrival, ask)
        scope = self._scopes.of(key)
        question: Question | None = None
        if self._answers is not None and may_be_remembered(arrival.route, ask, body, arrival.headers):  # 6
            name = model or ask.model
            question = ask_question(arrival.route, ask, name, body, scope, self._table.revision(name))
            if question is not None:
                document, worth = yield from self._remember(arrival, question)
                if document is not None and (said := question.render(document, arrival.request_id)) is not None:
                    return self._replay(arrival, key, question, document, said)
                if not worth:
                    question = None
                self._refuse_poison(tried, body)  # whoever was answering it may have killed workers meanwhile
        name = model or ask.model  # 7
        able = self._chooser.able(arrival.path, body, name)
        if (woken := self._chooser.waits(name, able)) is not None:
            yield woken
        chosen = self._chooser.choose(ask, name, able, scope, tried, wish.last, woken=woken is not None)
        return self._send(arrival, ask, model, key, scope, question, chosen, wish)  # 8

    # --- the steps, in their order ---------------------------------------------------------------

    def _name(self, arrival: Arrival) -> None:
        """Our uid and the client's label: new, or what an earlier attempt of this request was called."""
        headers = arrival.headers
        arrival.uid = arrival.request_id = next(self._uids)
        # Only nginx brings a context, and only from an earlier attempt; it passes none of a client's on.
        told = context.decode(headers[CONTEXT]) if arrival.from_nginx and CONTEXT in headers else None
        if told is not None:
            arrival.uid, arrival.request_id, arrival.attempt = told.uid, told.request_id, told.attempt + 1
            arrival.answer = told.keep.name if told.keep is not None else None
        elif _REQUEST_ID.fullmatch(label := headers.get(b"x-request-id", b"")):
            arrival.request_id = label.decode()
        if self._tracing is not None:
            arrival.traced = self._tracing.begin(arrival)

    def _who(self, arrival: Arrival) -> Steps[ApiKey]:
        """The key that asks, or for which one of our own services asks."""
        credentials = bearer(arrival.headers)
        authenticator = self._authenticator
        if authenticator.is_service(credentials):
            arrival.batch = True
            owner = arrival.headers.get(b"x-owngpt-owner", b"").decode("latin-1")
            arrival.payer = arrival.headers.get(b"x-owngpt-payer", b"").decode("latin-1")
            owned: ApiKey = yield authenticator.owner(owner)
            return owned
        key: ApiKey = authenticator.cached(credentials) or (yield authenticator.check(credentials))
        return key

    def _look_back(self, arrival: Arrival) -> Attempts:
        """Earlier attempts, as nginx tells of them."""
        return attempts.read(arrival.headers) if arrival.from_nginx else attempts.NONE

    def _refuse_poison(self, tried: Attempts, body: bytes) -> None:
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

    def _remember(self, arrival: Arrival, question: Question) -> Steps[tuple[dict[str, object] | None, bool]]:
        """(the answer to the same question, whether this one's is worth keeping)."""
        if self._answers is None or arrival.answer == question.name:
            return None, True  # an earlier attempt of this request leads the question: others wait for this one
        return (yield from self._answers.find(question, batch=arrival.batch))

    # --- the decisions ---------------------------------------------------------------------------

    def _send(
        self, arrival: Arrival, ask: Ask, model: str, key: ApiKey, scope: str, question: Question | None,
        chosen: routing.Route, wish: turns.Wish,
    ) -> Decision:
        """To a worker: by nginx where there is one, else by the relay."""
        worker = chosen.worker
        worker.sent += 1
        keep: Keep | None = None
        if question is not None and self._answers is not None and worker.beat.keeps:
            keep = self._answers.lead(question, arrival.uid, worker.beat.id, batch=arrival.batch)
        elif arrival.answer is not None and self._answers is not None:
            self._answers.failed(arrival.answer, arrival.uid)  # this attempt's answer is not kept: nobody waits for it
        traced = arrival.traced
        took_s = time.perf_counter() - arrival.started
        told = Context(
            arrival.uid, arrival.request_id, arrival.payer or key.id, arrival.attempt, self._scopes.salt(scope), model,
            arrival.batch, round(took_s, 6), chosen.reason, traced.traceparent if traced is not None else "", keep,
            turns.turn_of(wish, arrival, key, worker.beat.id, self._settings),
        )
        self._metrics.took(took_s)
        if traced is not None:
            traced.note(key=key.id, model=model or ask.model, worker=worker.beat.id, reason=chosen.reason)
        if arrival.from_nginx:
            self._metrics.note(arrival.batch, arrival.route, "fast")
            return Accelerate(worker, told)
        self._metrics.note(arrival.batch, arrival.route, "relay")
        assert arrival.body is not None  # noqa: S101 - read in step 3
        return Relay(worker, told, ask, arrival.body, scope, traced)

    def _replay(
        self, arrival: Arrival, key: ApiKey, question: Question, document: dict[str, object], said: bytes
    ) -> Replay:
        """From memory: it leaves a record like every other."""
        self._metrics.note(arrival.batch, arrival.route, "answer")
        usage, choices, took_s = document["usage"], document["choices"], time.perf_counter() - arrival.started
        assert isinstance(usage, dict)  # noqa: S101 - else it was not rendered
        assert isinstance(choices, list)  # noqa: S101 - as above
        record = Record(
            id=arrival.uid, request_id=arrival.request_id, key=arrival.payer or key.id, model=str(document["model"]),
            route=arrival.route, worker=ANSWER_CACHE, started_at=time.time() - took_s, stream=question.stream,
            batch=arrival.batch, outcome="ok", status=200, finish_reason=choices[0]["finish_reason"],
            prompt_tokens=usage["prompt_tokens"], cached_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"], decision_s=round(took_s, 6), ttft_s=round(took_s, 6),
            duration_s=round(took_s, 6),
        )
        self._meter.begin(record)
        self._meter.end(record)
        return Replay(arrival.request_id, question.stream, said, took_s)

    def _refuse(self, arrival: Arrival, error: errors.ApiError) -> Refuse:
        if arrival.answer is not None and self._answers is not None:
            self._answers.failed(arrival.answer, arrival.uid)
        if arrival.traced is not None:
            arrival.traced.failed(error.status, error.code)
        return self._refused(arrival.path, arrival.request_id, arrival.batch, error)

    def _refused(self, path: str, request_id: str, batch: bool, error: errors.ApiError) -> Refuse:
        """Count an error, log it, and make it the decision."""
        route = ROUTES[path][0]
        self._metrics.note(batch, route, str(error.status))
        logger.log("WARNING" if error.status >= 500 else "INFO", "refused", request_id=request_id, path=path,
                   status=error.status, code=error.code)
        return Refuse(error, request_id, route)

    def again(self, relay: Relay, path: str, tried: Attempts) -> Decision:
        """After a relay's early failure: another worker, or an error."""
        try:
            self._refuse_poison(tried, relay.body)
            told = relay.context
            name = told.model or relay.ask.model
            able = self._chooser.able(path, relay.body, name)
            chosen = self._chooser.choose(relay.ask, name, able, relay.cache_scope, tried)
        except errors.ApiError as error:
            return self.give_up(relay, path, error)
        chosen.worker.sent += 1
        keep = told.keep
        if keep is not None:
            if relay.worker.revision(name) == chosen.worker.revision(name):
                keep = msgspec.structs.replace(keep, worker=chosen.worker.beat.id)
                if self._answers is not None:
                    self._answers.moved(keep.name, told.uid, chosen.worker.beat.id)
            else:  # another model by now: its answer is none to the question that was named
                if self._answers is not None:
                    self._answers.failed(keep.name, told.uid)
                keep = None
        if (turn := told.turn) is not None:
            turn = msgspec.structs.replace(turn, id=turns.response_id(told.uid, chosen.worker.beat.id))
        told = msgspec.structs.replace(told, attempt=told.attempt + 1, reason=chosen.reason, keep=keep, turn=turn)
        return relay._replace(worker=chosen.worker, context=told)

    def give_up(self, relay: Relay, path: str, error: errors.ApiError) -> Refuse:
        """After a relay's last failure."""
        told = relay.context
        if told.keep is not None and self._answers is not None:
            self._answers.failed(told.keep.name, told.uid)
        return self._refused(path, told.request_id, told.batch, error)
