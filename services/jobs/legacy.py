"""State of releases before the database: jobs, batches and files lived in redis. It is moved at the start, once.

What is in the database already stays; a key is deleted once everything is committed. Goes with the next release.
"""

import json
import time
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from loguru import logger
from redis import Redis
from sqlalchemy import Connection, Table, delete, insert, select
from sqlalchemy.exc import IntegrityError

from common.database import Database
from common.files import File
from common.tuning import Job
from services.jobs import tables
from services.jobs.batch import OVER, Batch
from services.jobs.batch_results import NOTHING_USED, used_by

OLD = ("file:*", "files:*", "ftjob:*", "ftjobs:*", "ftevents:*", "ftcheckpoints:*", "bt:*", "bts:*")
LISTS = ("ftqueue", "fttaken", "btactive")
LEASES = "ftlease:*"

Kind = TypeVar("Kind", bound=msgspec.Struct)


def move_in(redis: Redis, database: Database, files_dir: Path) -> int:
    """Move what an older release left in redis. Returns how many things that were. Raises RedisError, DatabaseAway.

    What cannot be read stays in redis, is named in the log, and is tried again at the next start.
    """
    keys = [key for pattern in OLD for key in redis.scan_iter(match=pattern, count=1000)]
    if not keys:
        return 0
    odd: set[str] = set()
    count = database.transact(lambda c: _take_over(c, redis, keys, files_dir, odd))
    for key in [*keys, *LISTS, *redis.scan_iter(match=LEASES)]:
        if key not in odd:
            redis.delete(key)
    logger.info("moved an older release's state from redis into the database", count=count, odd=len(odd))
    return count


def _take_over(c: Connection, redis: Redis, keys: list[str], files_dir: Path, odd: set[str]) -> int:
    queue = [str(i) for i in redis.lrange("ftqueue", 0, -1)][::-1]

    def file(key: str) -> None:
        thing = msgspec.json.decode(redis.get(key) or b"", type=File)
        if _is_new(c, tables.files, thing.id):
            tables.add(c, tables.files, thing)

    def job(key: str) -> None:
        thing = _unpack(redis.hgetall(key), Job)
        if not _is_new(c, tables.jobs, thing.id):
            return
        place = queue.index(thing.id) if thing.id in queue else len(queue)
        tables.add(c, tables.jobs, thing, queued_at=time.time() + place)
        tables.say(c, thing.id, map(json.loads, redis.lrange(f"ftevents:{thing.id}", 0, -1)))
        points = map(json.loads, redis.lrange(f"ftcheckpoints:{thing.id}", 0, -1))
        if rows := [{"job_id": thing.id, "body": body} for body in points]:
            c.execute(insert(tables.checkpoints), rows)

    def batch(key: str) -> None:
        thing = _unpack(redis.hgetall(key), Batch)
        if _is_new(c, tables.batches, thing.id):
            _take_over_batch(c, thing, files_dir)

    count = 0
    for prefix, take in (("file:", file), ("ftjob:", job), ("bt:", batch)):
        for key in sorted((key for key in keys if key.startswith(prefix)), key=lambda key: _created(redis, key)):
            try:
                with c.begin_nested():
                    take(key)
                count += 1
            except (msgspec.MsgspecError, ValueError, KeyError, TypeError, AttributeError, IntegrityError) as error:
                logger.error("an older release's state cannot be read; it stays in redis", key=key, error=str(error))
                odd.add(key)
    return count


def _created(redis: Redis, key: str) -> float:
    """When a thing was made, for their order."""
    try:
        if key.startswith("file:"):
            return float(json.loads(redis.get(key) or b"{}").get("created_at", 0))
        return float(json.loads(redis.hget(key, "created_at") or b"0"))
    except (ValueError, TypeError, AttributeError):
        return 0.0


def _take_over_batch(c: Connection, batch: Batch, files_dir: Path) -> None:
    """A batch, and the results on disk of one that is not over, the first of each line; the rest is asked again.

    Killed while it showed its files, an older release may have moved one of them, and registered it.
    """
    if batch.status in OVER:
        tables.add(c, tables.batches, batch)
        return
    rows: dict[int, dict[str, Any]] = {}
    for good, file_id in ((True, batch.results), (False, batch.failures)):
        for path in (files_dir / "batches" / file_id, files_dir / file_id):
            if not path.exists():
                continue
            for raw in path.read_bytes().split(b"\n")[:-1]:
                try:
                    line = int(json.loads(raw)["id"].rpartition("_")[2])
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue
                rows.setdefault(line, {"batch_id": batch.id, "line": line, "good": good, "row": raw.decode()})
    batch.completed = sum(row["good"] for row in rows.values())
    batch.failed = len(rows) - batch.completed
    used = [used_by(json.loads(row["row"])) for row in rows.values()]
    batch.usage = {kind: sum(each[kind] for each in used) for kind in NOTHING_USED}
    if batch.status == "finalizing":
        batch.status = "in_progress"  # it will be again, as soon as nothing is open
    c.execute(delete(tables.files).where(tables.files.c.id.in_((batch.results, batch.failures))))
    tables.add(c, tables.batches, batch)
    if rows:
        c.execute(insert(tables.batch_results), list(rows.values()))


def _is_new(c: Connection, table: Table, id_: str) -> bool:
    return c.execute(select(table.c.id).where(table.c.id == id_)).one_or_none() is None


def _unpack(raw: Any, kind: type[Kind]) -> Kind:
    """From a hash whose fields are JSON, but for two."""
    return msgspec.convert({n: v if n in ("status", "wish") else json.loads(v) for n, v in raw.items()}, kind)
