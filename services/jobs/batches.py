"""The Batch API: a file of requests, answered when the engines have nothing better to do.

https://platform.openai.com/docs/api-reference/batch

    validating ─▶ in_progress ─▶ finalizing ─▶ completed          cancelling ─▶ cancelled
        └▶ failed       └─────────────┴▶ expired

Here they are made, shown, cancelled and leased; `batch_run.py` answers one.
"""

import asyncio
import time
from typing import Any

from loguru import logger
from redis.exceptions import RedisError
from sqlalchemy import Connection

from common import errors
from common.files import is_id, new_id
from common.tasks import end_tasks
from services.jobs import tables
from services.jobs.batch import OVER, Batch, CreateBatch
from services.jobs.batch_run import BatchRun
from services.jobs.files import find
from services.jobs.leases import LeaseLost, Leases
from services.jobs.means import Means

WINDOW_S = 24 * 3600
RUNNING_AT_ONCE = 16
"""Others wait in the database: a running one has its 50,000 lines in memory."""
AGAIN_S = 5.0
AGAIN_AT_MOST_S = 60.0


class Batches:
    """Batches of all owners, and the runs of those that this process has leased."""

    def __init__(self, means: Means, leases: Leases, max_waiting: int = 100) -> None:
        self._means, self._leases, self._max_waiting = means, leases, max_waiting
        self._runs: dict[str, BatchRun] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        metrics = means.metrics
        metrics.active.set_function(lambda: len(self._runs))
        metrics.in_flight.set_function(lambda: means.in_flight)
        metrics.waiting.set_function(lambda: sum(run.waiting for run in self._runs.values()))

    async def create(self, asked: CreateBatch, owner: str) -> Batch:
        """Write a batch down and start it."""
        now = int(time.time())
        batch = Batch(
            id=new_id("batch"), owner=owner, status="validating", endpoint=asked.endpoint,
            input_file_id=asked.input_file_id, completion_window=asked.completion_window, created_at=now,
            expires_at=now + WINDOW_S, metadata=asked.metadata, results=new_id("file"), failures=new_id("file"),
        )  # fmt: skip

        def begin(c: Connection) -> None:
            if find(c, asked.input_file_id, owner, "input_file_id").purpose != "batch":
                raise errors.InvalidRequest(
                    f"The file {asked.input_file_id!r} was not uploaded with purpose 'batch'.", param="input_file_id"
                )
            table = tables.batches.c
            waiting = tables.count(c, tables.batches, table.owner == owner, table.status.not_in(OVER))
            if waiting >= self._max_waiting:
                text = f"{waiting} batches are not over yet (MAX_WAITING_BATCHES={self._max_waiting})"
                raise errors.InvalidRequest(f"{text}; wait or cancel some.", code="too_many_batches")
            tables.add(c, tables.batches, batch)
            tables.forget_old(c, tables.batches, owner, OVER)

        await self._means.database.run(begin)
        await self._take()
        return batch

    async def get(self, batch_id: str, owner: str) -> Batch:
        """A batch of this owner. Raises NotFound."""
        batch = await self._find(batch_id, owner) if is_id(batch_id, "batch") else None
        if batch is None:
            raise errors.NotFound(f"There is no batch {batch_id!r}.", code="batch_not_found")
        return batch

    async def owned(self, owner: str) -> list[Batch]:
        """An owner's batches, newest first."""
        return await self._means.database.run(lambda c: tables.listed(c, tables.batches, Batch, owner))

    async def cancel(self, batch_id: str, owner: str) -> Batch:
        """No further request starts; what runs is kept. Raises NotFound, InvalidRequest when it is over."""
        batch = await self.get(batch_id, owner)
        fields: dict[str, Any] = {"status": "cancelling", "cancelling_at": int(time.time())}
        status = await self._means.database.run(
            lambda c: tables.move(c, tables.batches, batch_id, ("validating", "in_progress"), **fields)
        )
        if status not in ("ok", "cancelling"):
            text = f"The batch {batch.id} is {status}; it cannot be cancelled."
            raise errors.InvalidRequest(text, code="wrong_state")
        if run := self._runs.get(batch_id):
            run.cancelled = True
        return await self.get(batch_id, owner)

    async def look(self) -> None:
        """Keep the leases, take up batches that nobody works on. Call it every RENEW_EVERY_S. Raises DatabaseAway."""
        for batch_id, status in (await self._leases.renew()).items():
            if run := self._runs.get(batch_id):
                run.cancelled |= status == "cancelling"
                run.lost |= status == ""
        await self._take()

    async def close(self) -> None:
        """Stop; whoever takes the batches goes on."""
        ids = list(self._tasks)
        await end_tasks(self._tasks.values())
        for batch_id in ids:
            await self._leases.let_go(batch_id)

    async def _take(self) -> None:
        """Begin what nobody works on, as far as there is room."""
        for batch_id, attempts in (await self._leases.take(RUNNING_AT_ONCE - len(self._tasks))).items():
            self._begin(batch_id, attempts)

    # --- one batch -----------------------------------------------------------------------------

    async def _find(self, batch_id: str, owner: str | None = None) -> Batch | None:
        return await self._means.database.run(lambda c: tables.find(c, tables.batches, Batch, batch_id, owner))

    def _begin(self, batch_id: str, attempts: int) -> None:
        if batch_id not in self._tasks:
            task = self._tasks[batch_id] = asyncio.create_task(self._keep_running(batch_id, attempts))
            task.add_done_callback(lambda _: self._over(batch_id))

    def _over(self, batch_id: str) -> None:
        self._tasks.pop(batch_id, None)
        self._runs.pop(batch_id, None)
        self._leases.held.discard(batch_id)

    async def _keep_running(self, batch_id: str, attempts: int) -> None:
        again_s = AGAIN_S
        while True:
            try:
                if (batch := await self._find(batch_id)) is not None and batch.status not in OVER:
                    run = self._runs[batch_id] = BatchRun(batch, self._means, self._leases.token)
                    await run.run(attempts)
                return
            except LeaseLost:
                logger.warning("a batch is somebody else's now", batch=batch_id)
                return
            except (RedisError, OSError) as error:
                logger.warning("a batch waits", batch=batch_id, error=str(error))
            except Exception:
                logger.exception("a batch failed and starts again", batch=batch_id)
            await asyncio.sleep(again_s)
            again_s = min(2 * again_s, AGAIN_AT_MOST_S)
