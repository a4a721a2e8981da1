"""Step 7 of the path: a worker for a request; or that it must wait for one that sleeps, or that there is none."""

from collections.abc import Awaitable

from loguru import logger

from common import engines, errors
from common.workers import Pool, WorkerTable
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

    def waits(self, model: str) -> Awaitable[None] | None:
        """What is to be awaited before a worker for the model is chosen: that it wakes. Raises Unavailable."""
        if self._table.serving(model).workers or not (sleepers := self._table.sleeping(model)):
            return None
        return self._waking.wait(model, sleepers)

    def choose(
        self, path: str, body: bytes, ask: Ask, model: str, scope: str, tried: Attempts, last: str = "", *,
        woken: bool = False,
    ) -> routing.Route:
        """A worker that was not tried. `woken`: the model has just woken, so whoever was tried is another by now.

        Raises NotFound, InvalidRequest, Unavailable, UpstreamError.
        """
        for address in tried.tried[-1:]:
            if not woken:
                self._table.suspect(address)
            self._metrics.retries.labels(tried.reason).inc()
            logger.warning("worker failed a request", address=address, deaths=tried.deaths)
        pool = self._table.serving(model)
        if tried.tried and not woken:
            pool = pool.without(tried.tried)
        elif not pool.workers:
            self._explain_nobody(model)
        if pool.limited:
            pool = self._able(pool, path, body, model)
        if not pool.workers or len(tried.tried) >= attempts.MAX_ATTEMPTS:
            if tried.deaths:
                raise errors.UpstreamError("The worker died while it ran this request, and no other can take it.")
            raise errors.Unavailable("No worker could take the request.", retry_after_s=RETRY_AFTER_S)
        return routing.choose(pool, model, scope, ask.prefix, self._holders, last)

    def _able(self, pool: Pool, path: str, body: bytes, model: str) -> Pool:
        """Those whose engines take all that is asked for: what one would drop in silence is refused by its name.

        Raises InvalidRequest when no worker of the model could; Unavailable when one that could is not there now.
        """
        asked = engines.asked(body)
        missing = {worker.beat.id: engines.missing(worker.beat.engine, path, asked) for worker in pool.workers}
        able = [worker for worker in pool.workers if not missing[worker.beat.id]]
        if able or not pool.workers:
            return Pool(able)
        what = next(iter(missing.values()))
        for worker in self._table.workers.values():
            if model in worker.names and not engines.missing(worker.beat.engine, path, asked):
                raise errors.Unavailable(f"No worker that takes {what} is ready.", retry_after_s=RETRY_AFTER_S)
        if what == path:
            raise errors.InvalidRequest(f"The model {model!r} does not support {path}.", code="unsupported_endpoint")
        names = ", ".join(sorted({worker.beat.engine for worker in pool.workers}))
        raise errors.InvalidRequest(
            f"{what}: the engine that runs {model!r} ({names}) does not know it. Leave it out.",
            param=what, code="unsupported_parameter",
        )

    def _explain_nobody(self, model: str) -> None:
        served = self._table.models()
        if served and model not in self._table.known_models:
            raise errors.NotFound(
                f"The model {model!r} does not exist. There are: {', '.join(sorted(served))}.",
                param="model", code="model_not_found",
            )
        raise errors.Unavailable("No worker is ready.", retry_after_s=RETRY_AFTER_S)
