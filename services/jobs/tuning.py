"""The fine-tuning API: jobs are written down, checked and queued here; `services/trainer` runs them.

https://platform.openai.com/docs/api-reference/fine-tuning

    validating_files ─▶ queued ─▶ running ─▶ succeeded | failed | cancelled
                          ▲  ▲       │
                          │  └ paused◀
                          └──────┘
"""

import secrets
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis
from sqlalchemy import ColumnElement, Connection, Table, select

from common import errors
from common.adapters import read_registry
from common.database import Database
from common.files import is_id, new_id
from common.redis.names import ADAPTERS
from common.tuning import FINISHED, MAX_EVENTS, Job, Status, event
from services.jobs import tables
from services.jobs.files import find

Auto = Literal["auto"]


class Hyperparameters(BaseModel):
    """Numbers or "auto"."""

    model_config = ConfigDict(extra="forbid")
    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto = "auto"
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=20)] | Auto = "auto"


class Supervised(BaseModel):
    """The only method there is."""

    model_config = ConfigDict(extra="forbid")
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(BaseModel):
    """`{"type": "supervised", "supervised": {"hyperparameters": …}}`."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["supervised"]
    supervised: Supervised = Supervised()


class CreateJob(BaseModel):
    """The body of POST /v1/fine_tuning/jobs."""

    model_config = ConfigDict(extra="forbid")
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    integrations: list[Any] | None = Field(None, max_length=0)


class Tuning:
    """Fine-tuning jobs of all owners. `base_models` says which models can be tuned now."""

    def __init__(
        self, database: Database, redis: Redis, base_models: Callable[[], frozenset[str]], max_waiting: int,
        trained: Callable[[], set[str]] = set,
    ) -> None:
        self._database, self._redis, self._base_models = database, redis, base_models
        self._trained = trained
        self._max_waiting = max_waiting

    async def create(self, asked: CreateJob, owner: str) -> Job:
        """Write a job down; its files are checked next."""
        known = self._base_models()
        if trained := self._trained():  # else no trainer has said yet what it trains
            known &= trained
        if not known:
            raise errors.Unavailable("No worker is ready, so no model can be tuned yet.", retry_after_s=5)
        if asked.model not in known:
            raise errors.NotFound(
                f"The model {asked.model!r} cannot be tuned. There are: {', '.join(sorted(known))}.",
                param="model",
                code="model_not_found",
            )
        chosen = (asked.method.supervised.hyperparameters if asked.method else None) or asked.hyperparameters
        job = Job(
            id=new_id("ftjob"),
            owner=owner,
            status="validating_files",
            created_at=int(time.time()),
            model=asked.model,
            training_file=asked.training_file,
            validation_file=asked.validation_file,
            suffix=asked.suffix,
            seed=secrets.randbelow(2**31) if asked.seed is None else asked.seed,
            hyperparameters=(chosen or Hyperparameters()).model_dump(),
            metadata=asked.metadata,
        )
        await self._database.run(lambda c: self._begin(c, job))
        return job

    def _begin(self, c: Connection, job: Job) -> None:
        for param, file_id in (("training_file", job.training_file), ("validation_file", job.validation_file)):
            if file_id is not None and find(c, file_id, job.owner, param).purpose != "fine-tune":
                raise errors.InvalidRequest(
                    f"The file {file_id!r} was not uploaded with purpose 'fine-tune'.", param=param
                )
        jobs = tables.jobs.c
        waiting = tables.count(c, tables.jobs, jobs.owner == job.owner, jobs.status.not_in(FINISHED))
        if waiting >= self._max_waiting:
            raise errors.InvalidRequest(
                f"{waiting} jobs are not finished yet (MAX_WAITING_JOBS={self._max_waiting}); wait or cancel some.",
                code="too_many_jobs",
            )
        tables.add(c, tables.jobs, job)
        tables.say(c, job.id, [event(f"Created fine-tuning job: {job.id}")])
        tables.forget_old(c, tables.jobs, job.owner, FINISHED)

    async def get(self, job_id: str, owner: str) -> Job:
        """A job of this owner. Raises NotFound."""
        job = None
        if is_id(job_id, "ftjob"):
            job = await self._database.run(lambda c: tables.find(c, tables.jobs, Job, job_id, owner))
        if job is None:
            raise errors.NotFound(f"There is no fine-tuning job {job_id!r}.", code="job_not_found")
        return job

    async def owned(self, owner: str) -> list[Job]:
        """An owner's jobs, newest first."""
        return await self._database.run(lambda c: tables.listed(c, tables.jobs, Job, owner))

    async def cancel(self, job: Job) -> Job:
        """At once, or as soon as the trainer hears of it."""
        over = {"status": "cancelled", "finished_at": int(time.time()), "wish": ""}
        return await self._change(
            job,
            [
                (("validating_files", "queued", "paused"), over, "cancelled"),
                (("running",), {"wish": "cancel"}, "cancelling"),
            ],
        )

    async def pause(self, job: Job) -> Job:
        """Keep the place: `resume` goes on where it was."""
        return await self._change(
            job,
            [
                (("queued",), {"status": "paused"}, "paused"),
                (("running",), {"wish": "pause"}, "pausing"),
            ],
            only=tables.jobs.c.wish != "cancel",  # that was accepted before
        )

    async def resume(self, job: Job) -> Job:
        """Back to the end of the queue."""
        queued = {"status": "queued", "wish": "", "queued_at": time.time(), "attempts": 0}
        return await self._change(job, [(("paused",), queued, "resumed")])

    async def events(self, job: Job) -> list[dict[str, Any]]:
        """Newest first."""
        return await self._bodies(tables.job_events, job)

    async def checkpoints(self, job: Job) -> list[dict[str, Any]]:
        """Newest first."""
        return await self._bodies(tables.checkpoints, job)

    async def _bodies(self, table: Table, job: Job) -> list[dict[str, Any]]:
        query = select(table.c.body).where(table.c.job_id == job.id).order_by(table.c.n.desc()).limit(MAX_EVENTS)
        return await self._database.run(lambda c: list(c.execute(query).scalars()))

    async def delete_model(self, name: str, owner: str) -> None:
        """Take a tuned model out of the registry: within seconds no worker has it. Raises NotFound."""
        adapter = read_registry(await self._redis.hgetall(ADAPTERS)).get(name)
        if adapter is None or adapter.owner != owner:
            raise errors.NotFound(
                f"There is no tuned model {name!r} of yours.", param="model", code="model_not_found"
            )
        await self._redis.hdel(ADAPTERS, name)

    async def queued(self) -> int:
        """Jobs that wait for a trainer."""
        return await self._database.run(lambda c: tables.count(c, tables.jobs, tables.jobs.c.status == "queued"))

    async def _change(
        self, job: Job, ways: list[tuple[tuple[Status, ...], dict[str, Any], str]],
        only: ColumnElement[bool] | None = None,
    ) -> Job:
        """The first way whose states fit. Raises InvalidRequest when none does."""

        def change(c: Connection) -> str:
            status: str = job.status
            for allowed, fields, word in ways:
                if (status := tables.move(c, tables.jobs, job.id, allowed, only=only, **fields)) == "ok":
                    tables.say(c, job.id, [event(f"The job is {word}.")])
                    break
            return status

        if (status := await self._database.run(change)) != "ok":
            raise errors.InvalidRequest(f"The job {job.id} is {status}; that cannot be done now.", code="wrong_state")
        return await self.get(job.id, job.owner)
