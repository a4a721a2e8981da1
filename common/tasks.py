"""Background tasks."""

import asyncio
from collections.abc import Iterable
from typing import Any


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
