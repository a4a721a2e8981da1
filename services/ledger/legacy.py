"""State of releases before the database: sums and money lived in redis. It is moved at the start, once.

Goes with the next release.
"""

from datetime import date

from loguru import logger
from redis import Redis
from sqlalchemy import Connection

from common.database import Database
from services.ledger import tables


def move_in(redis: Redis, database: Database) -> int:
    """Move what an older release left in redis. Returns how many keys that were. Raises RedisError, DatabaseAway."""
    keys = [key for pattern in ("used:*", "ledger:*") for key in redis.scan_iter(match=pattern, count=1000)]
    if not keys:
        return 0
    database.transact(lambda c: _take_over(c, redis, keys))
    redis.delete(*keys)
    logger.info("moved an older release's usage from redis into the database", count=len(keys))
    return len(keys)


def _take_over(c: Connection, redis: Redis, keys: list[str]) -> None:
    tables.take_turn(c)
    if tables.read_mark(c, "cursor") is not None:
        return  # it was done, and died before it deleted them
    for key in keys:
        kind, _, rest = key.partition(":")
        if kind == "used":
            day, _, who = rest.partition(":")
            found: dict[str, str] = redis.hgetall(key)  # type: ignore[assignment]  # ours is text
            for field, count in found.items():
                model, _, what = field.rpartition("|")
                where = {"day": date.fromisoformat(day), "key": who, "model": model}
                tables.raise_by(c, tables.usage, where, dict.fromkeys(tables.KINDS, 0) | {what: int(count)})
        elif rest.startswith("cost:"):
            tables.put(c, tables.costs, {"day": date.fromisoformat(rest[5:])}, {"usd": float(redis.get(key) or 0)})
        elif rest in ("cursor", "tick"):
            tables.write_mark(c, rest, str(redis.get(key)))
    if tables.read_mark(c, "cursor") is None:
        tables.write_mark(c, "cursor", "0-0")
