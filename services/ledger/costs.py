"""What the machine costs: HOURLY_USD for every hour in which the stack runs, per UTC day, durable.

A gap of more than MAX_GAP_S between two ticks counts as switched off. A machine that is paid for while the stack is
down costs more than this says; docs/observability.md says so too.
"""

import time
from calendar import monthrange
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection, select

from common.database import Database
from services.ledger import tables

MAX_GAP_S = 300.0


@dataclass(frozen=True)
class Spent:
    """USD of today and of this calendar month, today included."""

    today: float = 0.0
    month: float = 0.0


class Costs:
    """The clock that adds up money."""

    def __init__(
        self, database: Database, hourly_usd: float, budget_usd: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self.hourly_usd = hourly_usd
        self.budget_usd = budget_usd
        self._clock = clock
        self.spent = Spent()

    async def tick(self) -> None:
        """Count the time since the last tick, and read what the month has cost. Raises DatabaseAway."""
        self.spent = await self._database.run(self._count)

    def _count(self, c: Connection) -> Spent:
        tables.take_turn(c)
        now, mark = self._clock(), tables.read_mark(c, "tick")
        last = now if mark is None else float(mark)
        today = datetime.fromtimestamp(now, UTC).date()
        if 0 < now - last <= MAX_GAP_S:
            tables.raise_by(c, tables.costs, {"day": today}, {"usd": (now - last) * self.hourly_usd / 3600})
        if not 0 < last - now <= MAX_GAP_S:  # a clock that was set back a little: those seconds are counted already
            tables.write_mark(c, "tick", f"{now:.3f}")
        query = select(tables.costs).where(tables.costs.c.day >= today.replace(day=1), tables.costs.c.day <= today)
        days = {row.day: float(row.usd) for row in c.execute(query)}
        return Spent(days.get(today, 0.0), sum(days.values()))

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
