"""What trainers ask (`common/tuning.py`): a job to work on, its events taken down, its end."""

import secrets
import time
from typing import Any

from loguru import logger
from sqlalchemy import Connection, and_, insert, or_, select, update

from common import errors
from common.database import Database
from common.tuning import FINISHED, LEASE_S, End, Job, Leased, Report, Wish, event
from services.jobs import tables

TRAINED_S = 60.0
MAX_ATTEMPTS = 5
"""A job whose trainers end so often without getting it further has failed."""


class Trainers:
    """The jobs that trainers work on. The token of a lease is shown with every word about its job."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._trained: dict[str, float] = {}
        """The models that trainers have asked for work on, and when last."""

    async def lease(self, model: str) -> Leased | None:
        """A job whose trainer is gone, else the next one of the queue, else None."""
        self._trained[model] = time.time()
        return await self._database.run(lambda c: self._lease(c, model))

    @property
    def trained(self) -> set[str]:
        """The models that trainers train now, as far as they have said; empty: none has asked lately."""
        return {model for model, asked_at in self._trained.items() if time.time() - asked_at < TRAINED_S}

    def _lease(self, c: Connection, model: str) -> Leased | None:
        jobs, now = tables.jobs.c, time.time()
        free = and_(
            jobs.model == model, or_(jobs.status == "queued", and_(jobs.status == "running", jobs.leased_until < now))
        )
        query = select(jobs.id, jobs.attempts).where(free).order_by(jobs.status.desc(), jobs.queued_at, jobs.n)
        for row in c.execute(query).all():  # "running" sorts after "queued"
            if row.attempts >= MAX_ATTEMPTS:
                self._give_up(c, row.id)
                continue
            token = secrets.token_hex(16)
            taken = {"status": "running", "lease": token, "leased_until": now + LEASE_S, "attempts": row.attempts + 1,
                     "reported": 0}
            if c.execute(update(tables.jobs).where(jobs.id == row.id, free).values(taken)).rowcount:
                job = tables.find(c, tables.jobs, Job, row.id)
                assert job is not None  # noqa: S101 - just changed
                return Leased(job, token)
        return None

    def _give_up(self, c: Connection, job_id: str) -> None:
        text = f"The trainer ended {MAX_ATTEMPTS} times at this job without getting it further; its log says why."
        error = {"code": "trainer_lost", "param": None, "message": text}
        last: dict[str, Any] = {
            "status": "failed", "error": error, "finished_at": int(time.time()), "wish": "",
            "leased_until": 0.0, "estimated_finish": None,
        }
        if tables.move(c, tables.jobs, job_id, ("queued", "running"), **last) != "ok":
            return
        tables.say(c, job_id, [event(text, "error")])
        logger.error("a job was given up", job=job_id, attempts=MAX_ATTEMPTS)

    async def report(self, job_id: str, report: Report) -> Wish:
        """Take down what a run has said, and renew its lease. Raises Conflict: the job is somebody else's."""

        def take_down(c: Connection) -> Wish:
            job = leased(c, job_id, report.token)
            fields: dict[str, object] = {"leased_until": time.time() + LEASE_S}
            if report.number > job.reported:
                fields["reported"] = report.number
                tables.say(c, job_id, report.events)
                if report.checkpoints:
                    rows = [{"job_id": job_id, "body": body} for body in report.checkpoints]
                    c.execute(insert(tables.checkpoints), rows)
                    fields["attempts"] = 1  # it gets further
                for name in ("hyperparameters", "estimated_finish"):
                    if (value := getattr(report, name)) is not None:
                        fields[name] = value
            c.execute(update(tables.jobs).where(tables.jobs.c.id == job_id).values(fields))
            return Wish(job.wish)

        return await self._database.run(take_down)

    async def end(self, job_id: str, end: End) -> Wish:
        """The last word of a lease; twice is once. A cancel or pause that was accepted before comes first: it is
        returned, and nothing has ended. Raises Conflict: the job is somebody else's."""

        def conclude(c: Connection) -> Wish:
            jobs = tables.jobs.c
            over = c.execute(select(jobs.status).where(jobs.id == job_id, jobs.lease == end.token)).scalar()
            if over == end.status != "running" or (over == "cancelled" and end.status == "paused"):
                return Wish()  # the first answer was lost
            job = leased(c, job_id, end.token)
            if job.wish and end.status == "succeeded":
                return Wish(job.wish)
            if job.wish == "cancel" and end.status == "paused":
                end.status = "cancelled"  # it was accepted after the pause
            if end.status == "running":  # told to stop: that is no failed try
                fields = {"leased_until": 0.0, "attempts": job.attempts - 1}
            else:
                fields = {"leased_until": 0.0, "status": end.status, "wish": "", "estimated_finish": None}
                tables.say(c, job_id, last_words(end))
            if end.status in FINISHED:
                fields |= {"finished_at": int(time.time()), "error": end.error, "trained_tokens": end.trained_tokens,
                           "fine_tuned_model": end.fine_tuned_model}
            if end.file is not None:
                tables.add(c, tables.files, end.file)
                fields["result_files"] = [end.file.id]
            tables.move(c, tables.jobs, job_id, ("running",), end.token, **fields)
            return Wish()

        return await self._database.run(conclude)

    async def unfinished(self) -> list[str]:
        """The ids of all jobs that are not over."""
        query = select(tables.jobs.c.id).where(tables.jobs.c.status.not_in(FINISHED))
        return await self._database.run(lambda c: list(c.execute(query).scalars()))


def leased(c: Connection, job_id: str, token: str) -> Any:
    """The row of a running job, which stays as it is until the transaction is over. Raises Conflict."""
    jobs = tables.jobs.c
    row = c.execute(
        select(jobs.wish, jobs.reported, jobs.attempts)
        .where(jobs.id == job_id, jobs.lease == token, jobs.status == "running").with_for_update()
    ).one_or_none()
    if row is None:
        raise errors.Conflict(f"The job {job_id} is not yours to work on any more.", code="lease_lost")
    return row


def last_words(end: End) -> list[dict[str, Any]]:
    """The events that end a job, or its stay with a trainer."""
    said = [event(end.error["message"], "error")] if end.error else []
    words = {"cancelled": "The job is cancelled.", "paused": "The job is paused."}
    return [*said, event(words.get(end.status, f"The job has {end.status}."))]
