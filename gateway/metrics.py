"""What the decision path observes."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

DECISION_BUCKETS_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1)


class GatewayMetrics:
    """What the decision path observes.

    Decisions are noted in plain numbers, and counted when somebody reads them or a second is over (`count`): a locked
    counter and a histogram are a fifth of what a decision costs.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._noted: dict[tuple[bool, str, str], int] = {}
        self._took_s: list[float] = []
        self.decisions = Counter(
            "gateway_decisions", "Decisions by route and result: fast, relay, answer, an error's status; no batches.",
            ("route", "result"), registry=registry,
        )
        self.batch_decisions = Counter(
            "gateway_batch_decisions", "The same of batches' requests, which ask again while nobody is there.",
            ("route", "result"), registry=registry,
        )
        self.decision_seconds = Histogram(
            "gateway_decision_seconds", "Time the gateway spends on a request before it is forwarded.",
            buckets=DECISION_BUCKETS_S, registry=registry,
        )
        self.retries = Counter(
            "gateway_retries", "Requests a worker did not finish: refused, failed (answered an error) or died.",
            ("reason",), registry=registry
        )
        self.workers = Gauge(
            "gateway_workers", "Workers by state, as this gateway sees them.", ("state",), registry=registry,
            multiprocess_mode="mostrecent",
        )
        self.workers_lost = Counter(
            "gateway_workers_lost", "Workers that went without having drained: killed, cut off, or their engine died.",
            registry=registry,
        )
        self.answers = Counter(
            "gateway_answers", "Questions that may be answered from memory: hit, joined (the same was being answered), "
            "miss.", ("result",), registry=registry,
        )
        self.lost_requests = Counter(
            "gateway_lost_requests", "Requests that were running on a worker when it was lost.", registry=registry
        )

    def note(self, batch: bool, route: str, result: str) -> None:
        """A decision was made."""
        key = (batch, route, result)
        self._noted[key] = self._noted.get(key, 0) + 1

    def took(self, seconds: float) -> None:
        """How long the gateway had a request before it was forwarded."""
        self._took_s.append(seconds)

    def count(self) -> None:
        """Count what was noted."""
        noted, self._noted = self._noted, {}
        took_s, self._took_s = self._took_s, []
        for (batch, route, result), times in noted.items():
            (self.batch_decisions if batch else self.decisions).labels(route, result).inc(times)
        for seconds in took_s:
            self.decision_seconds.observe(seconds)
