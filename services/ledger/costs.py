"""What the machine costs: HOURLY_USD for every hour in which the stack runs, per UTC day, durable.

    ledger:cost:{day}   USD spent on that day                kept KEPT_DAYS
    ledger:tick         Unix time up to which it is counted

A gap of more than MAX_GAP_S between two ticks counts as switched off. A machine that is paid for while the stack is
down costs more than this says; docs/observability.md says so too.
"""

import time
from calendar import monthrange
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from redis.asyncio import Redis

from common.redis.names import LEDGER_TICK, cost_key
from common.redis.scripts import ACCRUE
from services.ledger.usage import KEPT_DAYS

MAX_GAP_S = 300.0


@dataclass(frozen=True)
class Spent:
    """USD of today and of this calendar month, today included."""

    today: float = 0.0
    month: float = 0.0


class Costs:
    """The clock that adds up money."""

    def __init__(
        self, redis: Redis, hourly_usd: float, budget_usd: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._redis = redis
        self.hourly_usd = hourly_usd
        self.budget_usd = budget_usd
        self._clock = clock
        self.spent = Spent()

    async def tick(self) -> None:
        """Count the time since the last tick, and read what the month has cost. Raises RedisError."""
        now = self._clock()
        day = datetime.fromtimestamp(now, UTC).date()
        await self._redis.eval(
            ACCRUE, 2, LEDGER_TICK, cost_key(day), f"{now:.3f}", repr(self.hourly_usd / 3600), str(MAX_GAP_S),
            str(KEPT_DAYS * 86400),
        )
        days = [day.replace(day=number) for number in range(1, day.day + 1)]
        costs = [float(text or 0) for text in await self._redis.mget([cost_key(d) for d in days])]
        self.spent = Spent(costs[-1], sum(costs))

    def month_forecast_usd(self) -> float:
        """What this month will have cost if the stack keeps running."""
        now = datetime.fromtimestamp(self._clock(), UTC)
        left_h = (monthrange(now.year, now.month)[1] - now.day) * 24 + 24 - now.hour - now.minute / 60
        return self.spent.month + left_h * self.hourly_usd

    def public(self, tokens_today: int) -> dict[str, float | None] | None:
        """The cost part of the status; None when nobody said what the machine costs."""
        if not self.hourly_usd:
            return None
        return {
            "usd_per_hour": self.hourly_usd,
            "today_usd": round(self.spent.today, 6),
            "month_usd": round(self.spent.month, 6),
            "month_forecast_usd": round(self.month_forecast_usd(), 2),
            "budget_usd": self.budget_usd or None,
            "budget_left_usd": round(self.budget_usd - self.spent.month, 6) if self.budget_usd else None,
            "usd_per_1m_tokens_today": round(self.spent.today / tokens_today * 1e6, 4) if tokens_today else None,
        }
