"""The fine-tuning API: jobs are written down, checked and queued here; `services/trainer` runs them.

https://platform.openai.com/docs/api-reference/fine-tuning

    validating_files ─▶ queued ─▶ running ─▶ succeeded | failed | cancelled
                          ▲  ▲       │
                          │  └ paused◀
                          └──────┘
"""

import asyncio
import json
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from loguru import logger
from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis

from common import errors
from common.adapters import read_registry
from common.files import is_id, new_id
from common.jobstore import FINISHED, MAX_EVENTS, Job, Status, event, invalid_file, move, pack, problem_events, unpack
from common.redis.names import ADAPTERS, FT_QUEUE, checkpoints_key, events_key, job_key, jobs_key
from common.tasks import end_tasks
from services.jobs.files import Files

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

    def __init__(self, redis: Redis, files: Files, base_models: Callable[[], frozenset[str]], max_waiting: int) -> None:
        self._redis, self._files, self._base_models = redis, files, base_models
        self._max_waiting = max_waiting
        self._checks: set[asyncio.Task[None]] = set()

    async def create(self, asked: CreateJob, owner: str) -> Job:
        """Write a job down and start checking its files."""
        known = self._base_models()
        if not known:
            raise errors.Unavailable("No worker is ready, so no model can be tuned yet.", retry_after_s=5)
        if asked.model not in known:
            raise errors.NotFound(
                f"The model {asked.model!r} cannot be tuned. There are: {', '.join(sorted(known))}.",
                param="model",
                code="model_not_found",
            )
        for param, file_id in (("training_file", asked.training_file), ("validation_file", asked.validation_file)):
            if file_id is not None and (await self._files.get(file_id, owner, param)).purpose != "fine-tune":
                raise errors.InvalidRequest(
                    f"The file {file_id!r} was not uploaded with purpose 'fine-tune'.", param=param
                )
        waiting = sum(job.status not in FINISHED for job in await self.owned(owner))
        if waiting >= self._max_waiting:
            raise errors.InvalidRequest(
                f"{waiting} jobs are not finished yet (MAX_WAITING_JOBS={self._max_waiting}); wait or cancel some.",
                code="too_many_jobs",
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
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(job_key(job.id), mapping=pack(msgspec.to_builtins(job)))
            pipe.zadd(jobs_key(owner), {job.id: time.time()})
            pipe.rpush(events_key(job.id), event(f"Created fine-tuning job: {job.id}"))
            await pipe.execute()
        self._check_soon(job)
        return job

    async def get(self, job_id: str, owner: str) -> Job:
        """A job of this owner. Raises NotFound."""
        raw = await self._redis.hgetall(job_key(job_id)) if is_id(job_id, "ftjob") else {}
        if not raw or (job := unpack(raw, Job)).owner != owner:
            raise errors.NotFound(f"There is no fine-tuning job {job_id!r}.", code="job_not_found")
        return job

    async def owned(self, owner: str) -> list[Job]:
        """An owner's jobs, newest first."""
        ids = await self._redis.zrevrange(jobs_key(owner), 0, -1)
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hgetall(job_key(str(job_id)))
            return [unpack(raw, Job) for raw in await pipe.execute() if raw]

    async def cancel(self, job: Job) -> Job:
        """At once, or as soon as the trainer hears of it."""
        return await self._change(
            job,
            [
                (
                    ("validating_files", "queued", "paused"),
                    {"status": "cancelled", "finished_at": int(time.time())},
                    "cancelled",
                ),
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
        )

    async def resume(self, job: Job) -> Job:
        """Back to the end of the queue."""
        return await self._change(job, [(("paused",), {"status": "queued", "wish": ""}, "resumed")], queue=True)

    async def events(self, job: Job) -> list[dict[str, Any]]:
        """Newest first."""
        return [json.loads(raw) for raw in await self._redis.lrange(events_key(job.id), -MAX_EVENTS, -1)][::-1]

    async def checkpoints(self, job: Job) -> list[dict[str, Any]]:
        """Newest first."""
        return [json.loads(raw) for raw in await self._redis.lrange(checkpoints_key(job.id), 0, -1)][::-1]

    async def delete_model(self, name: str, owner: str) -> None:
        """Take a tuned model out of the registry: within seconds no worker has it. Raises NotFound."""
        adapter = read_registry(await self._redis.hgetall(ADAPTERS)).get(name)
        if adapter is None or adapter.owner != owner:
            raise errors.NotFound(
                f"There is no tuned model {name!r} of yours.", param="model", code="model_not_found"
            )
        await self._redis.hdel(ADAPTERS, name)

    async def check_again(self) -> None:
        """Start the checks that a crash of this service interrupted."""
        async for key in self._redis.scan_iter(match=job_key("*"), count=1000):
            if (job := unpack(await self._redis.hgetall(key), Job)).status == "validating_files":
                self._check_soon(job)

    async def close(self) -> None:
        """Checks are begun again at the next start."""
        await end_tasks(self._checks)

    async def _change(
        self, job: Job, ways: list[tuple[tuple[Status, ...], dict[str, Any], str]], *, queue: bool = False
    ) -> Job:
        """The first way whose states fit. Raises InvalidRequest when none does."""
        status: str = job.status
        for allowed, fields, word in ways:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.eval(*move(job.id, allowed, **fields))
                if queue:  # a trainer skips what is not queued, so pushing too much does no harm
                    pipe.lpush(FT_QUEUE, job.id)
                status = str((await pipe.execute())[0])
            if status == "ok":
                await self._redis.rpush(events_key(job.id), event(f"The job is {word}."))
                return await self.get(job.id, job.owner)
        raise errors.InvalidRequest(f"The job {job.id} is {status}; that cannot be done now.", code="wrong_state")

    async def queued(self) -> int:
        """Jobs that wait for a trainer."""
        return len(await self._redis.lrange(FT_QUEUE, 0, -1))

    def _check_soon(self, job: Job) -> None:
        task = asyncio.create_task(self._check(job))
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    async def _check(self, job: Job) -> None:
        """Read the files in a process of their own; then queue the job, or fail it with everything that is wrong."""
        try:
            paths = [
                self._files.path(await self._files.get(i, job.owner))
                for i in (job.training_file, job.validation_file)
                if i
            ]
            report = await run_check(paths)
        except errors.NotFound as error:
            report = {
                "problems": [{"param": "training_file", "code": "file_not_found"}],
                "summary": error.message,
                "warnings": [],
            }
        except Exception:
            logger.exception("a training file could not be checked", job=job.id)
            report = {
                "problems": [{"param": "training_file", "code": "check_failed"}],
                "warnings": [],
                "summary": "The file could not be checked; the log of the jobs service says why.",
            }
        problems, lines = report["problems"], [event(text, "warn") for text in report["warnings"]]
        if not problems:
            lines.append(event("Files validated, moving job to queued state"))
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.eval(*move(job.id, ("validating_files",), status="queued"))
                pipe.rpush(events_key(job.id), *lines)
                pipe.lpush(FT_QUEUE, job.id)
                await pipe.execute()
            return
        lines += problem_events(problems)
        await self._redis.rpush(events_key(job.id), *lines)
        await self._redis.eval(
            *move(
                job.id,
                ("validating_files",),
                status="failed",
                finished_at=int(time.time()),
                error=invalid_file(problems, report["summary"]),
            )
        )


async def run_check(paths: list[Path]) -> dict[str, Any]:
    """`services.jobs.check` on files. Raises RuntimeError when it fails."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.jobs.check", *map(str, paths), stdout=asyncio.subprocess.PIPE
    )
    try:
        out, _ = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        raise
    if process.returncode:
        raise RuntimeError(f"services.jobs.check ended with {process.returncode}")
    return dict(json.loads(out))
