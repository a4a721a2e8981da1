"""What the ledger exports: usage per key, and money. Labels are bounded: MAX_KEYS keys have series of their own."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge

from common.records import Record
from services.ledger.costs import Costs

MAX_KEYS = 200
OTHERS = "others"


class LedgerMetrics:
    """Counters begin with the process; the sums in the database do not."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._named: set[str] = set()
        self.requests = Counter("owngpt_key_requests", "Requests by API key.", ("key",), registry=registry)
        self.tokens = Counter(
            "owngpt_key_tokens", "Tokens by API key and kind: prompt, cached (part of prompt), completion.",
            ("key", "kind"), registry=registry,
        )
        self.hourly = Gauge("owngpt_cost_usd_per_hour", "What the machine costs an hour, as HOURLY_USD says.",
                            registry=registry)
        self.today = Gauge("owngpt_cost_today_usd", "Spent on this day, UTC.", registry=registry)
        self.month = Gauge("owngpt_cost_month_usd", "Spent in this calendar month, UTC.", registry=registry)
        self.forecast = Gauge(
            "owngpt_cost_month_forecast_usd", "What the month will have cost if the stack keeps running.",
            registry=registry,
        )
        self.budget = Gauge("owngpt_budget_month_usd", "The month's budget (BUDGET_USD); 0: none.", registry=registry)
        self.lost = Gauge(
            "owngpt_ledger_lost_records", "Usage records that were trimmed off the stream before they were added up.",
            registry=registry,
        )
        self.behind = Gauge(
            "owngpt_ledger_last_read_timestamp_seconds", "When the usage stream was last read to its end.",
            registry=registry,
        )

    def count(self, records: Iterable[Record]) -> None:
        """Add what ended."""
        for record in records:
            key = self._label(record.key)
            self.requests.labels(key).inc()
            self.tokens.labels(key, "prompt").inc(record.prompt_tokens or 0)
            self.tokens.labels(key, "cached").inc(record.cached_tokens or 0)
            self.tokens.labels(key, "completion").inc(record.completion_tokens or 0)

    def show(self, costs: Costs) -> None:
        """Refresh the money."""
        self.hourly.set(costs.hourly_usd)
        self.budget.set(costs.budget_usd)
        self.today.set(costs.spent.today)
        self.month.set(costs.spent.month)
        self.forecast.set(costs.month_forecast_usd())

    def _label(self, key: str) -> str:
        if key not in self._named and len(self._named) < MAX_KEYS:
            self._named.add(key)
        return key if key in self._named else OTHERS
