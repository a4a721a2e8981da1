"""Both redis servers: how to connect, and every key and channel name in one place.

    worker:{id}    string, JSON `Heartbeat`, lives HEARTBEAT_TTL_MS      written by the worker's agent
    workers        set of worker ids that ever registered                 written by the agent, reaped by gateways
    running:{id}   hash record id -> JSON  `Record` begun on that worker  written by the metering middleware
    usage          stream, one entry per finished request, field `r`      written by whoever metered it
    key:{id}       string, JSON `ApiKey`                                  written by `python -m gateway.keys`
    adapters, aliases   see `gateway/adapters.py`
    used:*, ledger:*    see `services/ledger/books.py` and `costs.py`
    batch:{id}     string with a TTL: a batch of records that is already in    written by whoever metered it

And in redis-cache, where everything has a TTL and may be evicted:

    answer:{digest}         checksum and JSON document                    written by the gateway (`answers.py`)
    kv:{namespace}:{digest} header and bytes of a KV chunk                written by workers (`services/worker/kv`)
    kvseen:kv:...           a chunk that was computed but not admitted    written by workers
"""

import asyncio
from collections.abc import Iterable
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from gateway.settings import Settings, StateSettings

HEARTBEAT_TTL_MS = 3000
WORKERS = "workers"
USAGE = "usage"
USAGE_MAX_ENTRIES = 300_000
"""Some 650 bytes each: 200 MB of the state redis. Older ones are in the ledger's books."""

CHANNEL_WORKERS = "workers"
CHANNEL_KEYS = "keys"
CHANNEL_HELD = "held"


def worker_key(worker_id: str) -> str:
    """Where a worker's heartbeat lives."""
    return f"worker:{worker_id}"


def running_key(worker_id: str) -> str:
    """Where the requests begun on a worker live."""
    return f"running:{worker_id}"


def api_key_key(key_id: str) -> str:
    """Where an API key's record lives."""
    return f"key:{key_id}"


def batch_key(batch_id: str) -> str:
    """Where it is noted that a batch of records was written."""
    return f"batch:{batch_id}"


def connect(settings: StateSettings, *, timeout_s: float | None = 1.0) -> Redis:
    """A client of the state redis; `timeout_s` bounds every connect and command (None: wait, for subscriptions)."""
    # A half-open TCP connection is noticed by keepalive; a unix socket has none.
    tcp = {} if settings.redis_url.startswith("unix") else {"socket_keepalive": True}
    return Redis.from_url(
        settings.redis_url,
        username=settings.redis_user,
        password=settings.redis_password,
        decode_responses=True,
        socket_timeout=timeout_s,
        socket_connect_timeout=1.0,
        retry=Retry(NoBackoff(), 1),
        **tcp,
    )


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they are over.

    Once is not enough for one that talks to redis: redis-py sends with `asyncio.wait_for`, which in Python 3.11 forgets
    a cancel that comes in the moment in which the command is sent.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.05)


CACHE_TIMEOUT_S = 0.2
"""A cache that takes longer is no help."""


def connect_cache(settings: Settings) -> Redis:
    """A client of redis-cache, for the gateway's answers."""
    return Redis.from_url(
        settings.cache_redis_url,
        username=settings.redis_user,
        password=settings.redis_password,
        socket_timeout=CACHE_TIMEOUT_S,
        socket_connect_timeout=CACHE_TIMEOUT_S,
        retry=Retry(NoBackoff(), 1),
    )
