"""Checks of training files: each in a process of its own, then its job is queued, or failed with what is wrong."""

import asyncio
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger
from sqlalchemy import Connection

from common.database import Database
from common.tasks import end_tasks
from common.tuning import Job, event, invalid_file, problem_events
from services.jobs import tables
from services.jobs.files import Files
from services.jobs.leases import Leases

AT_ONCE = 1
MAX_ATTEMPTS = 3
"""A file that takes this service down with it is not tried for ever."""
TIMEOUT_S = 600.0


class Checks:
    """The checks of this process."""

    def __init__(self, database: Database, files: Files) -> None:
        self._database, self._files = database, files
        self._leases = Leases(database, tables.jobs, ("validating_files",))
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def look(self) -> None:
        """Begin the checks that nobody makes, keep those that run. Raises DatabaseAway."""
        held = await self._leases.renew()
        for job_id, task in list(self._tasks.items()):
            if held.get(job_id) != "validating_files":
                task.cancel()
        for job_id, attempts in (await self._leases.take(AT_ONCE - len(self._tasks))).items():
            task = self._tasks[job_id] = asyncio.create_task(self._check(job_id, attempts))
            task.add_done_callback(partial(self._over, job_id))

    async def close(self) -> None:
        """Checks are begun again at the next start."""
        ids = list(self._tasks)
        await end_tasks(self._tasks.values())
        for job_id in ids:
            await self._leases.let_go(job_id)

    def _over(self, job_id: str, _: asyncio.Task[None]) -> None:
        self._tasks.pop(job_id, None)
        self._leases.held.discard(job_id)

    async def _check(self, job_id: str, attempts: int) -> None:
        job = await self._database.run(lambda c: tables.find(c, tables.jobs, Job, job_id))
        assert job is not None  # noqa: S101 - leased
        report = failed("check_failed", "The file could not be checked; the log of the jobs service says why.")
        if attempts > MAX_ATTEMPTS:
            logger.error("a training file was given up", job=job_id, attempts=attempts)
        else:
            paths = [self._files.folder / file for file in (job.training_file, job.validation_file) if file]
            try:
                report = await run_check(paths)
            except Killed as error:  # for want of memory, maybe not its own: again, once the lease is over
                logger.error("a check was killed", job=job_id, error=str(error))
                return
            except (OSError, RuntimeError) as error:
                logger.error("a training file could not be checked", job=job_id, error=str(error) or "no end")
        await self._database.run(lambda c: self._conclude(c, job_id, report))

    def _conclude(self, c: Connection, job_id: str, report: dict[str, Any]) -> None:
        problems, said = report["problems"], [event(text, "warn") for text in report["warnings"]]
        ends: dict[str, Any] = {"leased_until": 0.0, "attempts": 0}
        if problems:
            error = invalid_file(problems, report["summary"])
            ends |= {"status": "failed", "finished_at": int(time.time()), "error": error}
            said += problem_events(problems)
        else:
            ends |= {"status": "queued", "queued_at": time.time()}
            said.append(event("Files validated, moving job to queued state"))
        if tables.move(c, tables.jobs, job_id, ("validating_files",), self._leases.token, **ends) == "ok":
            tables.say(c, job_id, said)


class Killed(Exception):
    """The process of a check was ended by somebody."""


def failed(code: str, text: str) -> dict[str, Any]:
    """A report that there is none."""
    return {"problems": [{"param": "training_file", "code": code}], "warnings": [], "summary": text}


async def run_check(paths: list[Path]) -> dict[str, Any]:
    """`services.jobs.check` on files. Raises RuntimeError when it fails, Killed, TimeoutError when it does not end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.jobs.check", *map(str, paths), stdout=asyncio.subprocess.PIPE
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode is not None and process.returncode < 0:
        raise Killed(f"by signal {-process.returncode}")
    if process.returncode:
        raise RuntimeError(f"services.jobs.check ended with {process.returncode}")
    return dict(json.loads(out))
