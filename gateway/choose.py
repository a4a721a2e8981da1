"""Step 7 of the path: a worker for a request; or that it must wait for one that sleeps, or that there is none."""

from collections.abc import Awaitable

import msgspec
from loguru import logger

from common import engines, errors
from common.workers import WorkerTable
from gateway import attempts, routing
from gateway.attempts import Attempts
from gateway.decode import Ask
from gateway.metrics import GatewayMetrics
from gateway.waking import Waking

RETRY_AFTER_S = 2


class Chooser:
    """Chooses from the table of workers."""

    def __init__(self, table: WorkerTable, metrics: GatewayMetrics, waking: Waking) -> None:
        self._table, self._metrics, self._waking = table, metrics, waking
        self._holders = routing.Holders()

    def able(self, path: str, body: bytes, model: str) -> frozenset[str] | None:
        """The engines of a model that take all that is asked for; None: every one. Raises InvalidRequest: none does.

        What an engine would drop in silence is refused by its name.
        """
        found = self._table.engines(model)
        if found.isdisjoint(engines.LIMITED):
            return None
        try:
            asked = engines.asked(body)
        except msgspec.MsgspecError as error:  # a name that no text can hold
            raise errors.InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from error
        missing = {engine: engines.missing(engine, path, asked) for engine in sorted(found)}
        able = frozenset(engine for engine, what in missing.items() if not what)
        if able:
            return None if len(able) == len(missing) else able
        what = next(iter(missing.values()))
        if what == path:
            raise errors.InvalidRequest(f"The model {model!r} does not support {path}.", code="unsupported_endpoint")
        raise errors.InvalidRequest(
            f"{what}: the engine that runs {model!r} ({', '.join(missing)}) does not know it. Leave it out.",
            param=what, code="unsupported_parameter",
        )

    def waits(self, model: str, able: frozenset[str] | None) -> Awaitable[None] | None:
        """What is to be awaited before a worker for the model is chosen: that it wakes. Raises Unavailable."""
        if self._table.serving(model, able).workers or not (sleepers := self._table.sleeping(model, able)):
            return None
        return self._waking.wait(model, sleepers)

    def choose(
        self, ask: Ask, model: str, able: frozenset[str] | None, scope: str, tried: Attempts, last: str = "", *,
        woken: bool = False,
    ) -> routing.Route:
        """A worker that was not tried. `woken`: the model has just woken, so whoever was tried is another by now.

        Raises NotFound, Unavailable, UpstreamError.
        """
        for address in tried.tried[-1:]:
            if not woken:
                self._table.suspect(address)
            self._metrics.retries.labels(tried.reason).inc()
            logger.warning("worker failed a request", address=address, deaths=tried.deaths)
        pool = self._table.serving(model, able)
        if tried.tried and not woken:
            pool = pool.without(tried.tried)
        elif not pool.workers:
            self._explain_nobody(model)
        if not pool.workers or len(tried.tried) >= attempts.MAX_ATTEMPTS:
            if tried.deaths:
                raise errors.UpstreamError("The worker died while it ran this request, and no other can take it.")
            raise errors.Unavailable("No worker could take the request.", retry_after_s=RETRY_AFTER_S)
        return routing.choose(pool, model, scope, ask.prefix, self._holders, last)

    def _explain_nobody(self, model: str) -> None:
        served = self._table.models()
        if served and model not in self._table.known_models:
            raise errors.NotFound(
                f"The model {model!r} does not exist. There are: {', '.join(sorted(served))}.",
                param="model", code="model_not_found",
            )
        raise errors.Unavailable("No worker is ready.", retry_after_s=RETRY_AFTER_S)
