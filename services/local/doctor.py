"""`make doctor`: looks at a stack, running or not, names what is wrong, and says what to do.

Every check returns findings and raises nothing: a stack that is half-way down is what it is for.
"""

import contextlib
import os
import shutil
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
from redis import Redis
from redis.exceptions import RedisError

from common import gpus as gpu
from common.sizing import fit
from common.sizing.cards import CannotSay
from services.local.errors import UserError
from services.local.plan import Dials, is_free
from services.local.running import inner, last_words, process_states
from services.local.state_server import find_redis

LOW_DISK_BYTES = 2 * 1024**3
FULL_SHARE = 0.8
LATE_S = 120.0
"""A lease that ran out so long ago, a job that waits so long: nobody takes it."""
CLOCK_S = 60.0


class Finding(NamedTuple):
    """One thing that was looked at. `do` is empty when it is well."""

    what: str
    said: str
    do: str = ""


def examine(dials: Dials) -> Iterator[Finding]:
    """Everything, cheap things first."""
    states = process_states(dials)
    yield from disk(dials)
    yield from memory()
    yield from ports(dials, running=bool(states))
    yield from redis_program(dials)
    yield from programs(dials, states)
    if states:
        yield from state_redis(dials)
        yield from workers(dials)
    yield from jobs_database(dials, time.time())
    yield from clock(dials, time.time())
    yield from gpus()


def disk(dials: Dials) -> Iterator[Finding]:
    """Room where the state is."""
    place = next(path for path in (dials.state, *dials.state.parents) if path.exists())
    free = shutil.disk_usage(place).free
    low = free < LOW_DISK_BYTES
    yield Finding(
        "disk", f"{free / 1e9:.1f} GB free at {place}", "make room: below 2 GB no upload is taken" if low else ""
    )


def memory() -> Iterator[Finding]:
    """What the kernel could still give."""
    with open("/proc/meminfo") as meminfo:
        lines = dict(line.split(":") for line in meminfo)
    available, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    low = available < 0.05 * total
    yield Finding(
        "memory",
        f"{available / 1e9:.1f} of {total / 1e9:.1f} GB available",
        "the kernel kills the largest process next: stop other programs, or lower WORKERS" if low else "",
    )


def ports(dials: Dials, *, running: bool) -> Iterator[Finding]:
    """Whether PORT can be had, or is ours."""
    if running:
        with contextlib.suppress(OSError), socket.create_connection((dials.host, dials.port), 2):
            yield Finding("port", f"nginx listens on {dials.host}:{dials.port}")
            return
        yield Finding(
            "port", f"nobody listens on {dials.host}:{dials.port}", "the stack runs: was it started with another PORT?"
        )
    elif is_free(dials.port, dials.host):
        yield Finding("port", f"{dials.port} is free")
    else:
        yield Finding(
            "port", f"{dials.port} is another program's", f"start with another one: make up PORT={dials.port + 100}"
        )


def redis_program(dials: Dials) -> Iterator[Finding]:
    """Whether some redis server here can read the state."""
    try:
        yield Finding("redis program", find_redis(dials.state / "redis"))
    except UserError as error:
        yield Finding("redis program", "none fits", str(error))


def programs(dials: Dials, states: dict[str, str]) -> Iterator[Finding]:
    """What supervisord says of its programs."""
    if not states:
        yield Finding("stack", f"not running from {dials.state}")
    for name, state in states.items():
        log = dials.state / "logs" / f"{name}.log"
        words = f"{last_words(log) if log.exists() else 'no log'} ({log})"
        yield Finding(name, state.lower(), "" if state in ("RUNNING", "STARTING") else f"its last words: {words}")


def state_redis(dials: Dials) -> Iterator[Finding]:
    """Whether the state redis answers, writes and has room."""
    try:
        password = (dials.secrets / "monitor/redis_password").read_text().strip()
        with Redis.from_url(
            dials.redis_url, username="monitor", password=password, decode_responses=True, socket_timeout=2
        ) as redis:
            info = redis.info()
    except (RedisError, OSError) as error:
        yield Finding(
            "state redis",
            f"does not answer: {error}",
            f"see {dials.state}/logs/redis.log, and docs/runbooks/RedisDown.md",
        )
        return
    share = int(info["used_memory"]) / (int(info["maxmemory"]) or float("inf"))
    yield Finding(
        "state redis",
        f"{share:.0%} of its memory in use",
        "docs/runbooks/RedisMemory.md: at 100 % it takes no new key or record" if share > FULL_SHARE else "",
    )
    if info.get("aof_last_write_status") != "ok":
        yield Finding(
            "state redis", "cannot write its log", "make room on the disk; docs/runbooks/RedisNotPersisting.md"
        )


def workers(dials: Dials) -> Iterator[Finding]:
    """What the gateway knows of the workers."""
    try:
        answer = httpx.get(f"{inner(dials)}/ready", timeout=3)
        counts: dict[str, int] = answer.json().get("workers", {})
    except (httpx.HTTPError, ValueError, UserError) as error:
        yield Finding(
            "gateway", f"does not answer: {type(error).__name__}", f"see {dials.state}/logs/gateway.log and nginx.log"
        )
        return
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none"
    if counts.get("ready"):
        yield Finding("workers", said, "docs/runbooks/EngineStalled.md" if counts.get("stalled") else "")
    else:
        yield Finding("workers", said, f"a first start takes a minute; else see {dials.state}/logs/worker-1.log")


def jobs_database(dials: Dials, now: float) -> Iterator[Finding]:
    """Whether the database is whole, and whether something in it waits for nobody."""
    path = dials.state / "jobs.db"
    if not path.exists():
        yield Finding(
            "jobs",
            "no database yet" if not os.environ.get("JOBS_DATABASE_URL") else "in JOBS_DATABASE_URL: not looked at",
        )
        return
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as jobs:
            whole = jobs.execute("PRAGMA quick_check").fetchone()[0]
            late = jobs.execute(
                "SELECT 'job ' || id FROM jobs WHERE (status = 'running' AND leased_until < :late) "
                "OR (status = 'queued' AND queued_at < :late AND NOT EXISTS "
                "(SELECT 1 FROM jobs WHERE status = 'running')) "
                "OR (status = 'validating_files' AND created_at < :late AND leased_until < :late) "
                "UNION ALL SELECT 'batch ' || id FROM batches WHERE leased_until < :late AND created_at < :late "
                "AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling')",
                {"late": now - LATE_S},
            ).fetchall()
    except sqlite3.Error as error:
        yield Finding(
            "jobs", f"{path} cannot be read: {error}", "docs/backup.md: restore it, or move it away and begin anew"
        )
        return
    if whole != "ok":
        yield Finding("jobs", f"{path} is damaged: {whole}", "docs/backup.md: restore it")
    elif late:
        names = ", ".join(row[0] for row in late[:5]) + (", …" if len(late) > 5 else "")
        yield Finding(
            "jobs",
            f"{len(late)} wait for somebody to take them: {names}",
            f"is the stack running? Then see {dials.state}/logs/trainer.log and jobs.log",
        )
    else:
        yield Finding("jobs", "nothing is stuck")


def clock(dials: Dials, now: float) -> Iterator[Finding]:
    """Whether the clock is behind what was written down before."""
    newest = max(
        (path.stat().st_mtime for path in (dials.state / "logs", dials.state / "ledger.db") if path.exists()),
        default=0.0,
    )
    behind = newest - now
    yield Finding(
        "clock",
        time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)),
        f"{behind:.0f} s behind what was written before: set it right, leases and days depend on it"
        if behind > CLOCK_S
        else "",
    )


def gpus() -> Iterator[Finding]:
    """Whether there is a GPU, and a driver that answers."""
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        yield Finding("GPU", "none: make up does without")
        return
    try:
        found = gpu.look()
    except gpu.GpusAway as error:
        yield Finding(
            "GPU", f"there is one, and its driver does not answer: {error}", "docs/runbooks/GpuUnreachable.md"
        )
        return
    try:
        fit.check_driver(found)
        old = ""
    except CannotSay as error:
        old = str(error)
    yield Finding("GPU", f"{', '.join(one.name for one in found.gpus)}, driver {found.driver}", old)
