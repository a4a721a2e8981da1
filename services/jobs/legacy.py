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
from sqlalchemy import Connection, Table, insert, select

from common.database import Database
from common.files import File
from common.tuning import Job
from services.jobs import tables
from services.jobs.batch import Batch

OLD = ("file:*", "files:*", "ftjob:*", "ftjobs:*", "ftevents:*", "ftcheckpoints:*", "bt:*", "bts:*")
LISTS = ("ftqueue", "fttaken", "btactive")
LEASES = "ftlease:*"

Kind = TypeVar("Kind", bound=msgspec.Struct)


def move_in(redis: Redis, database: Database, files_dir: Path) -> int:
    """Move what an older release left in redis. Returns how many things that were. Raises RedisError, DatabaseAway."""
    keys = [key for pattern in OLD for key in redis.scan_iter(match=pattern, count=1000)]
    if not keys:
        return 0
    count = database.transact(lambda c: _take_over(c, redis, keys, files_dir))
    for key in [*keys, *LISTS, *redis.scan_iter(match=LEASES)]:
        redis.delete(key)
    logger.info("moved an older release's state from redis into the database", count=count)
    return count


def _take_over(c: Connection, redis: Redis, keys: list[str], files_dir: Path) -> int:
    files = [msgspec.json.decode(redis.get(key) or b"null", type=File) for key in keys if key.startswith("file:")]
    jobs = [_unpack(redis.hgetall(key), Job) for key in keys if key.startswith("ftjob:")]
    batches = [_unpack(redis.hgetall(key), Batch) for key in keys if key.startswith("bt:")]
    queue = [str(i) for i in redis.lrange("ftqueue", 0, -1)][::-1]
    for file in _new(c, tables.files, files):
        tables.add(c, tables.files, file)
    for job in _new(c, tables.jobs, jobs):
        place = queue.index(job.id) if job.id in queue else len(queue)
        tables.add(c, tables.jobs, job, queued_at=time.time() + place)
        tables.say(c, job.id, map(json.loads, redis.lrange(f"ftevents:{job.id}", 0, -1)))
        points = map(json.loads, redis.lrange(f"ftcheckpoints:{job.id}", 0, -1))
        if rows := [{"job_id": job.id, "body": body} for body in points]:
            c.execute(insert(tables.checkpoints), rows)
    for batch in _new(c, tables.batches, batches):
        _take_over_batch(c, batch, files_dir)
    return len(files) + len(jobs) + len(batches)


def _take_over_batch(c: Connection, batch: Batch, files_dir: Path) -> None:
    """A batch, and the results that were on disk: a last line that was not written whole is asked again."""
    rows: list[dict[str, Any]] = []
    for good, file_id in ((True, batch.results), (False, batch.failures)):
        path = files_dir / "batches" / file_id
        if path.exists():
            for raw in path.read_bytes().split(b"\n")[:-1]:
                line = int(json.loads(raw)["id"].rpartition("_")[2])
                rows.append({"batch_id": batch.id, "line": line, "good": good, "row": raw.decode()})
    if rows:
        batch.completed = sum(row["good"] for row in rows)
        batch.failed = len(rows) - batch.completed
    tables.add(c, tables.batches, batch)
    if rows:
        c.execute(insert(tables.batch_results), rows)


def _new(c: Connection, table: Table, things: list[Any]) -> list[Any]:
    """Those that are not in the table yet, oldest first."""
    known = set(c.execute(select(table.c.id)).scalars())
    return sorted((thing for thing in things if thing.id not in known), key=lambda thing: (thing.created_at, thing.id))


def _unpack(raw: Any, kind: type[Kind]) -> Kind:
    """From a hash whose fields are JSON, but for two."""
    return msgspec.convert({n: v if n in ("status", "wish") else json.loads(v) for n, v in raw.items()}, kind)
