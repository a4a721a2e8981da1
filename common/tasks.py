"""Background tasks."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from loguru import logger
from prometheus_client import CollectorRegistry, Counter
from redis.exceptions import RedisError

Work = Callable[[], Awaitable[bool | None]]
RETRY_S = 1.0
"""At least this long after something failed."""


def failures_counter(registry: CollectorRegistry) -> Counter:
    """How often a bug ended a round of something that `repeat` does; an alert says so."""
    text = "Rounds of background work that a bug ended."
    return Counter("owngpt_background_failures", text, ("what",), registry=registry)


async def repeat(what: str, work: Work, every_s: float, failures: Counter | None = None) -> None:
    """Do something again and again, until cancelled. What it raises ends nothing.

    While redis, or a disk, is away that is said once; a bug is said each time, and counted. Work that returns False had
    nothing to do that could have failed: no sign that redis is back.
    """
    away = False
    if failures is not None:
        failures.labels(what)
    while True:
        pause_s = max(every_s, RETRY_S)
        try:
            tried = await work() is not False
            pause_s = every_s
            if tried and away:
                logger.info("goes on", what=what)
                away = False
        except (RedisError, OSError) as error:
            if not away:
                logger.warning("put off", what=what, error=str(error) or type(error).__name__)
            away = True
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            _failed(what, failures)  # something that it awaited was cancelled
        except Exception:
            _failed(what, failures)
        await asyncio.sleep(pause_s)


def start_all(failures: Counter, *works: tuple[str, Work, float]) -> list[asyncio.Task[None]]:
    """A task for each (what, work, every so many seconds)."""
    return [asyncio.create_task(repeat(what, work, every_s, failures)) for what, work, every_s in works]


def _failed(what: str, failures: Counter | None) -> None:
    logger.exception("failed; it is tried again", what=what)
    if failures is not None:
        failures.labels(what).inc()


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
