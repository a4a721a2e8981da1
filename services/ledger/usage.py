"""Usage per key and day, added up from the `usage` stream: every record once, whatever is killed.

    used:{day}:{key}   hash, `{model}|{kind}` -> count; KINDS below; key ALL is everybody     kept KEPT_DAYS
    ledger:cursor      the stream entry up to which everything is in the hashes

Hashes and cursor change in one script, so a crash leaves both or neither behind. Days are UTC. Knows no money and no
prices: `costs.py` does.
"""

from collections import Counter as Bag
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import msgspec
from loguru import logger
from redis.asyncio import Redis

from common.records import Record
from common.redis.names import LEDGER_CURSOR, USAGE, used_key
from common.redis.scripts import APPLY

ALL = "all"
KINDS = ("requests", "failed", "prompt_tokens", "cached_tokens", "completion_tokens")
KEPT_DAYS = 400
ENTRIES_AT_ONCE = 500
BLOCK_MS = 500
FAILED = frozenset({"upstream_error", "stream_error"})

Entry = tuple[str, dict[str, str]]

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


def add_up(records: Iterable[Record]) -> dict[str, Bag[str]]:
    """What records add to which hash: hash name -> field -> increment."""
    sums: dict[str, Bag[str]] = {}
    for record in records:
        day = datetime.fromtimestamp(record.started_at + record.duration_s, UTC).date()
        counts = (1, record.outcome in FAILED, record.prompt_tokens, record.cached_tokens, record.completion_tokens)
        for key in (record.key, ALL):
            bag = sums.setdefault(used_key(day, key), Bag())
            for kind, count in zip(KINDS, counts, strict=True):
                if count:
                    bag[f"{record.model}|{kind}"] += int(count)
    return sums


def by_model(raw: dict[str, str]) -> dict[str, dict[str, int]]:
    """A hash as model -> kind -> count, every kind there."""
    found: dict[str, dict[str, int]] = {}
    for field, count in raw.items():
        model, _, kind = field.rpartition("|")
        found.setdefault(model, dict.fromkeys(KINDS, 0))[kind] = int(count)
    return dict(sorted(found.items()))


def total(models: dict[str, dict[str, int]]) -> dict[str, int]:
    """All models together."""
    return {kind: sum(counts[kind] for counts in models.values()) for kind in KINDS}


class Books:
    """The hashes in redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def next_records(self) -> list[Record]:
        """Add up what came into the stream, and return it; waits up to BLOCK_MS. Raises RedisError: call again then."""
        cursor = await self._redis.get(LEDGER_CURSOR) or "0-0"
        read: Any = await self._redis.xread({USAGE: cursor}, count=ENTRIES_AT_ONCE, block=BLOCK_MS)
        entries: list[Entry] = read[0][1] if read else []
        if not entries:
            return []
        records = records_in(entries)
        sums = add_up(records)
        changes = [
            text for number, bag in enumerate(sums.values(), 2) for field, count in bag.items()
            for text in (str(number), field, str(count))
        ]
        applied = await self._redis.eval(
            APPLY, 1 + len(sums), LEDGER_CURSOR, *sums, cursor, entries[-1][0], str(KEPT_DAYS * 86400), *changes
        )
        return records if applied else []

    async def close(self) -> None:
        """Give the connection back."""
        await self._redis.aclose()

    async def days(self, key: str, count: int) -> list[tuple[date, dict[str, dict[str, int]]]]:
        """The last `count` days of a key, today first; days without usage left out."""
        last = today()
        wanted = [last - timedelta(days=back) for back in range(count)]
        async with self._redis.pipeline(transaction=False) as pipe:
            for day in wanted:
                pipe.hgetall(used_key(day, key))
            answers = await pipe.execute()
        return [(day, by_model(raw)) for day, raw in zip(wanted, answers, strict=True) if raw]
