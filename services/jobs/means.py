"""What the runs of all batches share."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from redis.asyncio import Redis

from common.database import Database
from services.jobs.files import Files
from services.jobs.front_door import Answer
from services.jobs.metrics import JobsMetrics

Ask = Callable[[str, bytes, str, str, str], Awaitable[Answer]]
"""(endpoint, body, owner, request id, who pays instead) -> the answer."""


@dataclass
class Means:
    """What all runs share. `room` says whether one more request may start, with so many in flight."""

    database: Database
    files: Files
    redis: Redis
    ask: Ask
    models: Callable[[], set[str]]
    room: Callable[[int], bool]
    metrics: JobsMetrics
    in_flight: int = 0
    freed: asyncio.Event = field(default_factory=asyncio.Event)
