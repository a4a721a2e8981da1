"""Usage per key and day, added up from the `usage` stream: every record once, whatever is killed.

Sums and the place in the stream change in one transaction, so a crash leaves both or neither behind. Days are UTC.
Knows no money and no prices: `costs.py` does.
"""

import time
from collections import Counter as Bag
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import msgspec
from loguru import logger
from redis.asyncio import Redis
from sqlalchemy import Connection, select

from common.database import Database
from common.records import Record
from common.redis.names import USAGE
from services.ledger import tables
from services.ledger.tables import ALL, KEPT_DAYS, KINDS

ENTRIES_AT_ONCE = 500
BLOCK_MS = 500
AWAY_S = 5.0
"""After so long without reading, it is looked whether the stream was trimmed meanwhile."""
FAILED = frozenset({"upstream_error", "stream_error"})

Entry = tuple[str, dict[str, str]]
Place = tuple[date, str, str]
"""(day, key, model)"""

_decode = msgspec.json.Decoder(Record).decode


def today() -> date:
    """The present day, UTC."""
    return datetime.now(UTC).date()


def records_in(entries: Iterable[Entry]) -> list[Record]:
    """The records of stream entries; what is no record is logged and left out."""
    found = []
    for entry_id, fields in entries:
        try:
            found.append(_decode(fields["r"]))
        except (KeyError, msgspec.MsgspecError) as error:
            logger.warning("ignored a malformed usage record", entry=entry_id, error=str(error))
    return found


def add_up(records: Iterable[Record]) -> dict[Place, Bag[str]]:
    """What records add to which row, by kind."""
    sums: dict[Place, Bag[str]] = {}
    for record in records:
        day = datetime.fromtimestamp(record.started_at + record.duration_s, UTC).date()
        counts = (1, record.outcome in FAILED, record.prompt_tokens, record.cached_tokens, record.completion_tokens)
        for key in (record.key, ALL):
            bag = sums.setdefault((day, key, record.model[:256]), Bag(dict.fromkeys(KINDS, 0)))
            for kind, count in zip(KINDS, counts, strict=True):
                bag[kind] += int(count or 0)
    return sums


def total(models: dict[str, dict[str, int]]) -> dict[str, int]:
    """All models together."""
    return {kind: sum(counts[kind] for counts in models.values()) for kind in KINDS}


class Books:
    """The sums in the database. `lost` counts records that were trimmed off the stream before they were read."""

    def __init__(self, redis: Redis, database: Database) -> None:
        self._redis, self._database = redis, database
        self.lost = 0
        self._read_at = float("-inf")
        self._forgot_on: date | None = None

    async def next_records(self) -> list[Record]:
        """Add up what came into the stream, and return it; waits up to BLOCK_MS. Raises RedisError, DatabaseAway."""
        cursor = await self._database.run(lambda c: tables.read_mark(c, "cursor")) or "0-0"
        if time.monotonic() - self._read_at > AWAY_S:
            await self._look_for_a_gap()
        read: Any = await self._redis.xread({USAGE: cursor}, count=ENTRIES_AT_ONCE, block=BLOCK_MS)
        self._read_at = time.monotonic()
        entries: list[Entry] = read[0][1] if read else []
        if not entries:
            return []
        records = records_in(entries)
        applied = await self._database.run(lambda c: self._apply(c, cursor, entries, records))
        return records if applied else []

    def _apply(self, c: Connection, cursor: str, entries: list[Entry], records: list[Record]) -> bool:
        tables.take_turn(c)
        if (tables.read_mark(c, "cursor") or "0-0") != cursor:
            return False  # another ledger was faster
        for (day, key, model), bag in add_up(records).items():
            tables.raise_by(c, tables.usage, {"day": day, "key": key, "model": model}, dict(bag))
        tables.write_mark(c, "cursor", str(entries[-1][0]))
        if (had := tables.read_mark(c, "entries")) is not None:
            tables.write_mark(c, "entries", str(int(had) + len(entries)))
        if self._forgot_on != today():
            self._forgot_on = today()
            tables.forget(c, today() - timedelta(days=KEPT_DAYS))
        return True

    async def _look_for_a_gap(self) -> None:
        """Whether entries that nobody has read were trimmed while this ledger was away: they are in no sum."""
        if not await self._redis.exists(USAGE):
            return
        info: Any = await self._redis.xinfo_stream(USAGE)
        added = int(info["entries-added"])
        gone = added - int(info["length"])

        def compare(c: Connection) -> int:
            tables.take_turn(c)
            mark, cursor = tables.read_mark(c, "entries"), tables.read_mark(c, "cursor")
            had = -1 if mark is None else int(mark)
            if had == -1 and cursor is None:
                now = gone  # what was trimmed before there was a ledger is none of its business
            elif not 0 <= had <= added:
                now = added  # counted from here on: an older release did not, or the stream has begun anew
            else:
                now = max(had, gone)
            tables.write_mark(c, "entries", str(now))
            return now - had if 0 <= had <= added else 0

        if missed := await self._database.run(compare):
            self.lost += missed
            logger.error("usage records were trimmed before they were added up", count=missed)

    async def close(self) -> None:
        """Give the connection back."""
        await self._redis.aclose()

    async def days(self, key: str, count: int) -> list[tuple[date, dict[str, dict[str, int]]]]:
        """The last `count` days of a key, today first, as model -> kind -> count; days without usage left out."""
        table, since = tables.usage.c, today() - timedelta(days=count - 1)
        query = select(tables.usage).where(table.key == key, table.day >= since).order_by(table.day.desc(), table.model)
        found: dict[date, dict[str, dict[str, int]]] = {}
        for row in await self._database.run(lambda c: c.execute(query).all()):
            found.setdefault(row.day, {})[row.model] = {kind: int(getattr(row, kind)) for kind in KINDS}
        return list(found.items())
