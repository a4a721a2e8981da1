"""The Batch API: a file of requests, answered when the engines have nothing better to do.

https://platform.openai.com/docs/api-reference/batch

    validating ─▶ in_progress ─▶ finalizing ─▶ completed          cancelling ─▶ cancelled
        └▶ failed       └─────────────┴▶ expired

A result is a line in a results file, on disk before it is counted. After a crash the lines that are there are not asked
again; all others are. Requests go in by the gateway's door (`front_door.py`), in their owner's name.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from common import errors
from common.auth import HOUSE
from common.files import File, is_id, new_id
from common.jobstore import move_key, pack, unpack
from common.redis.names import BATCHES_ACTIVE, batch_key, batches_key
from common.tasks import end_tasks
from services.jobs import batch_input
from services.jobs.batch import Batch, CreateBatch, State
from services.jobs.batch_paid import Paid
from services.jobs.batch_results import EXPIRED, UNREADABLE, Result, Results, row
from services.jobs.files import Files
from services.jobs.front_door import Answer
from services.jobs.metrics import JobsMetrics

WINDOW_S = 24 * 3600
MAX_TRIES = 4
RETRY_S = 0.5
WRITE_EVERY_S = 0.1
POLL_S = 0.1
RETRIED = (429, 502, 503, 504)

Ask = Callable[[str, bytes, str, str, str], Awaitable[Answer]]
"""(endpoint, body, owner, request id, who pays instead) -> the answer."""


class Batches:
    """Batches of all owners. `room` says whether one more request may start now."""

    def __init__(
        self, redis: Redis, files: Files, folder: Path, ask: Ask, models: Callable[[], set[str]],
        room: Callable[[int], bool], metrics: JobsMetrics,
    ) -> None:
        self._redis, self._files, self._folder = redis, files, folder
        self._ask, self._models, self._room = ask, models, room
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._waiting: dict[str, int] = {}
        self.in_flight = 0
        self._metrics = metrics
        metrics.active.set_function(lambda: len(self._tasks))
        metrics.in_flight.set_function(lambda: self.in_flight)
        metrics.waiting.set_function(lambda: sum(self._waiting.values()))
        self._freed = asyncio.Event()
        folder.mkdir(parents=True, exist_ok=True)

    async def create(self, asked: CreateBatch, owner: str) -> Batch:
        """Write a batch down and start it."""
        file = await self._files.get(asked.input_file_id, owner, "input_file_id")
        if file.purpose != "batch":
            raise errors.InvalidRequest(
                f"The file {file.id!r} was not uploaded with purpose 'batch'.", param="input_file_id"
            )
        now = int(time.time())
        batch = Batch(
            id=new_id("batch"), owner=owner, status="validating", endpoint=asked.endpoint, input_file_id=file.id,
            completion_window=asked.completion_window, created_at=now, expires_at=now + WINDOW_S,
            metadata=asked.metadata, results=new_id("file"), failures=new_id("file"),
        )  # fmt: skip
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(batch_key(batch.id), mapping=pack(msgspec.to_builtins(batch)))
            pipe.zadd(batches_key(owner), {batch.id: time.time()})
            pipe.sadd(BATCHES_ACTIVE, batch.id)
            await pipe.execute()
        self._begin(batch.id)
        return batch

    async def get(self, batch_id: str, owner: str) -> Batch:
        """A batch of this owner. Raises NotFound."""
        raw = await self._redis.hgetall(batch_key(batch_id)) if is_id(batch_id, "batch") else {}
        if not raw or (batch := unpack(raw, Batch)).owner != owner:
            raise errors.NotFound(f"There is no batch {batch_id!r}.", code="batch_not_found")
        return batch

    async def owned(self, owner: str) -> list[Batch]:
        """An owner's batches, newest first."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for batch_id in await self._redis.zrevrange(batches_key(owner), 0, -1):
                pipe.hgetall(batch_key(str(batch_id)))
            return [unpack(raw, Batch) for raw in await pipe.execute() if raw]

    async def cancel(self, batch: Batch) -> Batch:
        """No further request starts; what runs is kept. Raises InvalidRequest when it is over."""
        status = await self._move(
            batch, ("validating", "in_progress"), status="cancelling", cancelling_at=int(time.time())
        )
        if status not in ("ok", "cancelling"):
            text = f"The batch {batch.id} is {status}; it cannot be cancelled."
            raise errors.InvalidRequest(text, code="wrong_state")
        return await self.get(batch.id, batch.owner)

    async def go_on(self) -> None:
        """Take up what a crash of this service interrupted."""
        for batch_id in await self._redis.smembers(BATCHES_ACTIVE):
            self._begin(str(batch_id))

    async def close(self) -> None:
        """Stop; `go_on` goes on."""
        await end_tasks(self._tasks.values())

    # --- one batch -----------------------------------------------------------------------------

    def _begin(self, batch_id: str) -> None:
        if batch_id not in self._tasks:
            task = self._tasks[batch_id] = asyncio.create_task(self._keep_running(batch_id))
            task.add_done_callback(lambda _: self._tasks.pop(batch_id, None))

    async def _keep_running(self, batch_id: str) -> None:
        while True:
            try:
                if raw := await self._redis.hgetall(batch_key(batch_id)):
                    await self._run(unpack(raw, Batch))
                await self._redis.srem(BATCHES_ACTIVE, batch_id)
                return
            except (RedisError, OSError) as error:
                logger.warning("a batch waits", batch=batch_id, error=str(error))
            except Exception:
                logger.exception("a batch failed and starts again", batch=batch_id)
            await asyncio.sleep(5.0)

    async def _run(self, batch: Batch) -> None:
        """From whatever state it is in to the end."""
        try:
            source = self._files.path(await self._files.get(batch.input_file_id, batch.owner))
        except errors.NotFound as error:
            gone = [batch_input.problem(None, "file_not_found", error.message, "input_file_id")]
            unfinished = ("validating", "in_progress", "cancelling", "finalizing")
            await self._move(batch, unfinished, status="failed", errors=gone, failed_at=int(time.time()))
            self._metrics.ended.labels("failed").inc()
            return
        models: set[str] | None = None  # judged once: later a model may only be away for a moment
        if batch.status == "validating":
            while not (models := self._models()) and not await self._is_cancelled(batch):  # noqa: ASYNC110 - no news of it
                await asyncio.sleep(0.5)
        found, problems, used = await asyncio.to_thread(batch_input.check, source, batch.endpoint, models)
        now = int(time.time())
        if batch.status == "validating":
            if problems:
                await self._move(batch, ("validating",), status="failed", errors=problems, failed_at=now)
                self._metrics.ended.labels("failed").inc()
                return
            model = used.pop() if len(used) == 1 else None
            await self._move(
                batch, ("validating",), status="in_progress", in_progress_at=now, total=len(found), model=model
            )
        if batch.status in ("failed", "completed", "cancelled", "expired"):
            return
        results = Results(self._where(batch.results), self._where(batch.failures))
        await asyncio.to_thread(results.recover)
        pending = [line for line in found if line.custom_id not in results.ids]
        paid = Paid(self._redis, batch)
        if batch.status == "in_progress":
            await paid.look()
        ended: State = await self._answer(batch, source, pending, results, paid)
        await self._finish(batch, results, ended)

    async def _answer(
        self, batch: Batch, source: Path, pending: list[batch_input.Line], results: Results, paid: Paid
    ) -> State:
        """Ask every pending line, as there is room. Returns how it ended; raises when one fails by our fault."""
        ended: State = "completed"
        writing = asyncio.create_task(self._write(batch, results))
        try:
            async with asyncio.TaskGroup() as group:
                waiting = pending[::-1]
                while waiting:
                    if await self._is_cancelled(batch):
                        ended = "cancelled"
                        break
                    if time.time() > batch.expires_at:
                        ended = "expired"
                        break
                    while waiting and self._room(self.in_flight):
                        self.in_flight += 1
                        task = group.create_task(self._one(batch, source, waiting.pop(), results, paid))
                        task.add_done_callback(self._free)
                    self._waiting[batch.id] = len(waiting)
                    self._freed.clear()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._freed.wait(), POLL_S)
            if ended == "completed" and await self._is_cancelled(batch):
                ended = "cancelled"  # while the last lines were on their way
            elif ended == "completed" and time.time() > batch.expires_at:
                ended = "expired"
            if ended == "expired":
                for line in waiting:
                    results.add(Result(False, row(batch.id, line, error=EXPIRED)))
        finally:
            self._waiting.pop(batch.id, None)
            await end_tasks([writing])
            await asyncio.to_thread(results.flush)
        return ended

    async def _is_cancelled(self, batch: Batch) -> bool:
        try:
            return str(await self._redis.hget(batch_key(batch.id), "status")) == "cancelling"
        except (RedisError, OSError):
            return False  # answers go to the disk; redis will hear of them

    def _free(self, _: asyncio.Task[None]) -> None:
        self.in_flight -= 1
        self._freed.set()

    async def _one(self, batch: Batch, source: Path, line: batch_input.Line, results: Results, paid: Paid) -> None:
        """One request, tried again while only the moment is at fault."""
        request_id = f"{batch.id}-{line.number}"
        body = await asyncio.to_thread(batch_input.body, source, line)
        for attempt in range(1, MAX_TRIES + 1):
            answer = await self._ask_line(batch, body, request_id, paid)
            while answer.status == 503 and time.time() < batch.expires_at:  # nobody is there: that costs no try
                if await self._is_cancelled(batch):
                    return
                await asyncio.sleep(RETRY_S)
                answer = await self._ask_line(batch, body, request_id, paid)
            if answer.status not in RETRIED or attempt == MAX_TRIES:
                break
            await asyncio.sleep(RETRY_S * 2**attempt)
            if answer.document is None:  # it broke off: computed and recorded, maybe
                await paid.look_patiently()
        if answer.status == 503 and time.time() >= batch.expires_at:
            results.add(Result(False, row(batch.id, line, error=EXPIRED)))
            return
        good = answer.status == 200 and answer.document is not None
        response = {"status_code": answer.status, "request_id": request_id, "body": answer.document}
        results.add(Result(good, row(batch.id, line, response=response, error=None if answer.document else UNREADABLE)))
        self._metrics.lines.labels("completed" if good else "failed").inc()

    async def _ask_line(self, batch: Batch, body: bytes, request_id: str, paid: Paid) -> Answer:
        # The answer was lost after its owner's usage had been recorded: the house pays for another.
        return await self._ask(batch.endpoint, body, batch.owner, request_id, HOUSE if request_id in paid else "")

    async def _write(self, batch: Batch, results: Results) -> None:
        """Bring results to disk several times a second, then count them."""
        while True:
            await asyncio.sleep(WRITE_EVERY_S)
            try:
                written = await asyncio.to_thread(results.flush)
            except OSError as error:
                logger.warning("results wait for the disk", batch=batch.id, error=str(error))
                continue
            if written:
                with contextlib.suppress(RedisError, OSError):
                    await self._count(batch, results)

    async def _count(self, batch: Batch, results: Results) -> None:
        await self._move(
            batch, ("in_progress", "cancelling", "finalizing"), completed=results.completed, failed=results.failed,
            usage=results.usage,
        )  # fmt: skip

    async def _finish(self, batch: Batch, results: Results, ended: State) -> None:
        """Show the files, then the last state. Every step can be done twice."""
        await asyncio.to_thread(results.flush)
        await self._count(batch, results)
        now = int(time.time())
        await self._move(batch, ("in_progress",), status="finalizing", finalizing_at=now)
        shown: dict[str, Any] = {}
        for param, file_id, name in (
            ("output_file_id", batch.results, "output"), ("error_file_id", batch.failures, "error")
        ):  # fmt: skip
            where = self._where(file_id)
            if where.exists():
                shown_name, size = f"{batch.id}_{name}.jsonl", where.stat().st_size
                file = File(file_id, batch.owner, shown_name, "batch_output", size, now)
                await self._files.adopt(where, file)
                shown[param] = file_id
        await self._move(
            batch, ("finalizing", "cancelling"), status=ended, **shown, **{f"{ended}_at": int(time.time())}
        )
        self._metrics.ended.labels(ended).inc()
        logger.info("batch ends", batch=batch.id, status=ended, completed=results.completed, failed=results.failed)

    async def _move(self, batch: Batch, allowed: tuple[str, ...], **fields: Any) -> str:
        return str(await self._redis.eval(*move_key(batch_key(batch.id), allowed, **fields)))

    def _where(self, file_id: str) -> Path:
        """A results file: among the files once the batch was finished, before that in a folder of its own."""
        finished = self._files.folder / file_id
        return finished if finished.exists() else self._folder / file_id
