"""One batch, from whatever state it is in to its end.

A result is a row of the database before it is counted, and each line has one. After a crash the lines that have theirs
are not asked again; all others are. Requests go in by the gateway's door (`front_door.py`), in their owner's name.
"""

import asyncio
import contextlib
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from loguru import logger
from sqlalchemy import Connection, delete

from common.auth import HOUSE
from common.files import File
from common.tasks import end_tasks
from services.jobs import batch_input, tables
from services.jobs.batch import Batch
from services.jobs.batch_paid import Paid
from services.jobs.batch_results import EXPIRED, UNREADABLE, Result, Results, row
from services.jobs.front_door import Answer
from services.jobs.leases import LeaseLost
from services.jobs.means import Means

MAX_TRIES, RETRY_S = 4, 0.5
WRITE_EVERY_S = 0.1
POLL_S = 0.1
RETRIED = (429, 502, 503, 504)
HELD_S = 65.0
"""A little longer than the gateway holds a request back that killed two workers (HOLD_BACK_S)."""
MAX_UNWRITTEN_BYTES = 64 * 1024 * 1024
"""Results that wait for the database; until it takes them, no further request starts."""
MAX_ATTEMPTS = 5
"""A batch that takes this service down so often without a single result is given up."""

Ends = Literal["completed", "expired", "cancelled", "failed"]


class BatchRun:
    """A batch that this process has leased with `token`. Its owner cancels with `cancelled`."""

    def __init__(self, batch: Batch, means: Means, token: str) -> None:
        self._batch, self._means, self._token = batch, means, token
        self._paid = Paid(means.redis, batch)
        self._results = Results(means.database, batch, token)
        self.cancelled = batch.status == "cancelling"
        self.lost = False
        self._lines: list[batch_input.Line] = []
        """Lines that are to be asked, the next one last."""
        self._open = 0
        """Requests on their way."""
        self._held: list[tuple[float, batch_input.Line]] = []
        """Lines that were on their way when workers died, and when they are tried once more, each alone."""
        self._deadly: set[int] = set()
        """The numbers of such lines."""
        self._tries: Counter[int] = Counter()
        self._not_before = 0.0
        """No request starts before this moment of the monotonic clock: there was nobody to answer it."""

    @property
    def waiting(self) -> int:
        """Lines that nobody has asked yet."""
        return len(self._lines)

    async def run(self, attempts: int = 1) -> None:
        """To the end. Raises OSError and RedisError: later again; LeaseLost."""
        batch = self._batch
        if attempts > MAX_ATTEMPTS:
            text = f"This batch ended the service {MAX_ATTEMPTS} times without getting further; its log says why."
            gave_up = [batch_input.problem(None, "given_up", text)]
            if batch.ends:  # its files cannot be written
                await self._abandon(gave_up)
                return
            await self._settle("failed", errors=gave_up)
        elif batch.in_progress_at is None and not batch.ends and not await self._validate():
            return
        lines: list[batch_input.Line] = []
        if batch.ends in ("", "expired"):
            lines, problems, _ = await self._read(None)
            answered = await asyncio.to_thread(self._results.lines)
            lines = [line for line in lines if line.number not in answered]
            if problems:  # the disk has lost it
                await self._settle("failed", errors=problems)
        if not batch.ends:
            await self._paid.look()
            lines, ends = await self._answer(lines)
            await self._settle(ends)
        if batch.ends == "expired":
            for line in lines:
                self._results.add(Result.of(line.number, False, row(batch.id, line, error=EXPIRED)))
        await self._write_all()
        await self._finish()

    async def _read(self, models: set[str] | None) -> batch_input.Found:
        """The input file. Without `models` any will do: later, one may only be away for a moment."""
        try:
            return await asyncio.to_thread(batch_input.check, self._source, self._batch.endpoint, models)
        except FileNotFoundError:
            gone = batch_input.problem(None, "file_not_found", "The bytes of the file are gone.", "input_file_id")
            return batch_input.Found([], [gone], set())

    @property
    def _source(self) -> Path:
        return self._means.files.folder / self._batch.input_file_id  # nobody deletes it before this is over

    def _interrupted(self) -> Literal["", "cancelled", "expired"]:
        if self.cancelled:
            return "cancelled"
        return "expired" if time.time() > self._batch.expires_at else ""

    # --- validating ----------------------------------------------------------------------------

    async def _validate(self) -> bool:
        """Read the file. False: that was its end."""
        while not (models := self._means.models()) and not self._interrupted():  # noqa: ASYNC110 - no news of it
            await asyncio.sleep(POLL_S)
        if not (ended := self._interrupted()):
            found, problems, used = await self._read(models)
            now = int(time.time())
            fields: dict[str, Any]
            if problems:
                fields = {"status": "failed", "failed_at": now, "errors": problems, "leased_until": 0.0}
            else:
                model = used.pop() if len(used) == 1 else None
                fields = {"status": "in_progress", "in_progress_at": now, "total": len(found), "model": model}
            if await self._move(("validating",), **fields) == "ok":
                if problems:
                    self._means.metrics.ended.labels("failed").inc()
                else:
                    self._paid = Paid(self._means.redis, self._batch)
                return not problems
            ended = "cancelled"
        await self._move(
            ("validating", "cancelling"), status=ended, leased_until=0.0, **{f"{ended}_at": int(time.time())}
        )
        self._means.metrics.ended.labels(ended).inc()
        return False

    # --- in_progress ---------------------------------------------------------------------------

    async def _answer(self, lines: list[batch_input.Line]) -> tuple[list[batch_input.Line], Ends]:
        """Ask every line, as there is room. Returns those that were not asked to the end, and how it ended."""
        means, self._lines = self._means, lines[::-1]
        ends: Ends | Literal[""] = ""
        writing = asyncio.create_task(self._write())
        try:
            async with asyncio.TaskGroup() as group:
                while (self._lines or self._open or self._held) and not (ends := self._interrupted()) and not self.lost:
                    while self._may_start():
                        line = self._lines.pop() if self._lines else self._held.pop()[1]
                        task = group.create_task(self._one(line))
                        means.in_flight, self._open = means.in_flight + 1, self._open + 1
                        task.add_done_callback(self._free)
                    means.freed.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(POLL_S):
                            await means.freed.wait()
        finally:
            await end_tasks([writing])
            with contextlib.suppress(OSError, LeaseLost):
                await asyncio.to_thread(self._results.flush)
        if self.lost:
            raise LeaseLost(self._batch.id)
        return [*self._lines, *(line for _, line in self._held)], ends or self._interrupted() or "completed"

    def _later(self, line: batch_input.Line) -> None:
        """Nobody has seen it."""
        if line.number in self._deadly:
            self._held.append((time.monotonic() + RETRY_S, line))
        else:
            self._lines.append(line)

    def _may_start(self) -> bool:
        now = time.monotonic()
        due = bool(self._lines) or (bool(self._held) and not self._open and now >= self._held[-1][0])
        return (
            due and now >= self._not_before and self._means.room(self._means.in_flight)
            and self._results.waiting_bytes < MAX_UNWRITTEN_BYTES
        )

    def _free(self, _: asyncio.Task[None]) -> None:
        self._means.in_flight, self._open = self._means.in_flight - 1, self._open - 1
        self._means.freed.set()

    async def _one(self, line: batch_input.Line) -> None:
        """One request, tried again while only the moment is at fault."""
        batch = self._batch
        request_id = f"{batch.id}-{line.number}"
        body = await asyncio.to_thread(batch_input.body, self._source, line)
        while True:
            self._tries[line.number] = attempt = self._tries[line.number] + 1
            answer = await self._ask(body, request_id)
            if answer.status == 503:  # nobody is there: that costs no try, and no other batch its place
                self._tries[line.number] -= 1
                self._later(line)
                self._not_before = time.monotonic() + RETRY_S
                return
            if answer.deadly and line.number not in self._deadly:  # or another one was, beside it
                self._deadly.add(line.number)
                self._held.append((time.monotonic() + HELD_S, line))
                return
            if answer.status not in RETRIED or answer.deadly or attempt == MAX_TRIES:
                break
            await asyncio.sleep(RETRY_S * 2**attempt)
            if answer.document is None:  # it broke off: computed and recorded, maybe
                await self._paid.look_patiently()
        good = answer.status == 200 and answer.document is not None
        response = {"status_code": answer.status, "request_id": request_id, "body": answer.document}
        error = None if answer.document else UNREADABLE
        self._results.add(Result.of(line.number, good, row(batch.id, line, response=response, error=error)))
        self._means.metrics.lines.labels("completed" if good else "failed").inc()

    async def _ask(self, body: bytes, request_id: str) -> Answer:
        # The answer was lost after its owner's usage had been recorded: the house pays for another.
        payer = HOUSE if request_id in self._paid else ""
        return await self._means.ask(self._batch.endpoint, body, self._batch.owner, request_id, payer)

    async def _write(self) -> None:
        """Bring results to the database several times a second, until cancelled."""
        while not self.lost:
            await asyncio.sleep(WRITE_EVERY_S)
            try:
                await asyncio.to_thread(self._results.flush)
            except OSError as error:
                logger.warning("results wait for the database", batch=self._batch.id, error=str(error))
                await asyncio.sleep(RETRY_S)
            except LeaseLost:
                self.lost = True

    async def _write_all(self) -> None:
        while self._results.waiting:
            try:
                await asyncio.to_thread(self._results.flush)
            except OSError as error:
                logger.warning("results wait for the database", batch=self._batch.id, error=str(error))
                await asyncio.sleep(RETRY_S)

    # --- finalizing ----------------------------------------------------------------------------

    async def _settle(self, ends: Ends, **fields: Any) -> None:
        """From now on it is sure how it ends."""
        await self._write_all()
        if ends != "cancelled":
            now = {"status": "finalizing", "finalizing_at": int(time.time()), "ends": ends, **fields}
            if await self._move(("validating", "in_progress", "finalizing"), **now) == "ok":
                return
        await self._move(("cancelling", "finalizing"), ends="cancelled")  # while the last lines were on their way

    async def _abandon(self, problems: list[dict[str, Any]]) -> None:
        """Over, without files."""
        last = {"status": "failed", "failed_at": int(time.time()), "errors": problems, "leased_until": 0.0}
        await self._move(("finalizing", "cancelling"), **last)
        self._means.metrics.ended.labels("failed").inc()

    async def _finish(self) -> None:
        """The files, then the last state with them. Every step can be done twice."""
        batch, results, folder = self._batch, self._results, self._means.files.folder
        answered = results.completed + results.failed
        if batch.ends in ("completed", "expired") and answered != batch.total:
            raise RuntimeError(f"{batch.id} has {batch.total} lines and {answered} results")
        now, made = int(time.time()), {}
        for good, file_id, shown, name in (
            (True, batch.results, "output_file_id", "output"), (False, batch.failures, "error_file_id", "error")
        ):  # fmt: skip
            if size := await asyncio.to_thread(results.write_file, good, folder / file_id):
                made[shown] = File(file_id, batch.owner, f"{batch.id}_{name}.jsonl", "batch_output", size, now)

        def conclude(c: Connection) -> str:
            ids = {shown: file.id for shown, file in made.items()}
            last: dict[str, Any] = {"status": batch.ends, f"{batch.ends}_at": now, "leased_until": 0.0, **ids}
            status = tables.move(c, tables.batches, batch.id, ("finalizing", "cancelling"), self._token, **last)
            if status == "ok":
                for file in made.values():
                    tables.add(c, tables.files, file)
                c.execute(delete(tables.batch_results).where(tables.batch_results.c.batch_id == batch.id))
            return status

        if await self._means.database.run(conclude) != "ok":
            raise LeaseLost(batch.id)
        self._means.metrics.ended.labels(batch.ends).inc()
        logger.info("batch ends", batch=batch.id, status=batch.ends, completed=results.completed, failed=results.failed)

    async def _move(self, allowed: tuple[str, ...], **fields: Any) -> str:
        """Change the batch, in the database and here. Raises LeaseLost."""
        status = await self._means.database.run(
            lambda c: tables.move(c, tables.batches, self._batch.id, allowed, self._token, **fields)
        )
        if status in ("leased", ""):
            raise LeaseLost(self._batch.id)
        if status == "ok":
            for name in fields.keys() & set(Batch.__struct_fields__):
                setattr(self._batch, name, fields[name])
        return status
