"""Clients of both redis servers."""

from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from common.redis.pipelined import PipelinedRedis
from common.settings import StateSettings


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


BLOCKING_TIMEOUT_S = 10.0


def blocking(settings: StateSettings) -> BlockingRedis:
    """A client of the state redis for programs and moments without an event loop."""
    return BlockingRedis.from_url(
        settings.redis_url, username=settings.redis_user, password=settings.redis_password, decode_responses=True,
        socket_timeout=BLOCKING_TIMEOUT_S, health_check_interval=30,
    )


CACHE_TIMEOUT_S = 0.2
"""A cache that takes longer is no help."""


def connect_cache(settings: StateSettings, url: str) -> PipelinedRedis:
    """A client of redis-cache at `url`; whoever takes longer than CACHE_TIMEOUT_S is away."""
    return PipelinedRedis(url, settings.redis_user, settings.redis_password, CACHE_TIMEOUT_S)
