"""Every metric about requests, defined once: what is observed at the worker and at the relay.

Names follow OpenTelemetry's gen_ai conventions where there is one (status: development), so they live here only.
Labels are bounded: routes and outcomes are closed sets, models are those that workers serve.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from common.records import Record

disable_created_metrics()  # type: ignore[no-untyped-call]
"""A `_created` beside every counter and histogram would make a third of all series, and nobody asks for them."""
TTFT_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0)
DURATION_BUCKETS_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84)
TPOT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class RequestMetrics:
    """What the metering class observes, at the worker and at the relay."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("gen_ai_request_model", "route")
        self.requests = Counter(
            "owngpt_requests", "Requests by how they ended.", (*labels, "outcome"), registry=registry
        )
        self.ttft = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From a streamed request's arrival to the first byte of its answer; batches left out.",
            labels,
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.tpot = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time between the tokens of one streamed answer, after the first; batches left out.",
            labels,
            buckets=TPOT_BUCKETS_S,
            registry=registry,
        )
        self.duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From the request's arrival to its end.",
            labels,
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self.tokens = Counter(
            "owngpt_tokens", "Tokens by kind: prompt, cached (part of prompt), completion.",
            ("gen_ai_request_model", "kind"), registry=registry,
        )
        self.answers = Counter(
            "owngpt_answers_kept", "Answers for redis-cache: stored, not_kept (too large, an error, an unknown shape), "
            "damaged when read.", ("result",), registry=registry,
        )
        self.dropped = Gauge("owngpt_usage_records_dropped", "Usage records lost while redis was away.",
                             registry=registry, multiprocess_mode="sum")

        self._of: dict[tuple[str, str], _Children] = {}

    def observe(self, record: Record) -> None:
        """Count one finished request."""
        of = self._of.get((record.model, record.route))
        if of is None:
            of = self._of[record.model, record.route] = _Children(self, record.model, record.route)
        of.outcome(record.outcome).inc()
        of.duration.observe(record.duration_s)
        if record.ttft_s is not None and record.stream and not record.batch:
            # The exemplar leads from a slow dot on a panel to the lines of that very request.
            of.ttft.observe(record.ttft_s, {"request_id": record.request_id})
            tokens = record.completion_tokens or 0
            if record.outcome == "ok" and tokens > 1 and record.duration_s > record.ttft_s:
                of.tpot.observe((record.duration_s - record.ttft_s) / (tokens - 1))
        of.prompt.inc(record.prompt_tokens or 0)
        of.cached.inc(record.cached_tokens or 0)
        of.completion.inc(record.completion_tokens or 0)


class _Children:
    """The series of one model and route, looked up once."""

    def __init__(self, metrics: RequestMetrics, model: str, route: str) -> None:
        self._requests, self._labels = metrics.requests, (model, route)
        self._outcomes: dict[str, Counter] = {}
        self.duration = metrics.duration.labels(model, route)
        self.ttft = metrics.ttft.labels(model, route)
        self.tpot = metrics.tpot.labels(model, route)
        self.prompt, self.cached, self.completion = (
            metrics.tokens.labels(model, kind) for kind in ("prompt", "cached", "completion")
        )

    def outcome(self, name: str) -> Counter:
        """The counter of requests that ended so."""
        if name not in self._outcomes:
            self._outcomes[name] = self._requests.labels(*self._labels, name)
        return self._outcomes[name]
