"""The trainer's side of the queue in redis: a job is taken, held by a lease, told about, and let go of."""

import json
import time
from typing import Any

from redis import Redis

from common.files import new_id
from common.jobstore import LEASE_MS, MAX_EVENTS, Job, Status, event, move, unpack
from common.redis.names import FT_QUEUE, FT_TAKEN, checkpoints_key, events_key, job_key, lease_key


class Queue:
    """One trainer's jobs, one at a time. Methods raise RedisError."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._held = ""

    def claim(self) -> Job | None:
        """A job whose trainer is gone, else the next one of the queue, else None after a second."""
        for job_id in map(str, self._redis.lrange(FT_TAKEN, 0, -1)):
            taken = self._redis.set(lease_key(job_id), "1", nx=True, px=LEASE_MS)
            if taken and (job := self._start(job_id)) is not None:
                return job
        next_id = self._redis.blmove(FT_QUEUE, FT_TAKEN, 1, "RIGHT", "LEFT")
        if next_id is None:
            return None
        self._redis.set(lease_key(str(next_id)), "1", px=LEASE_MS)
        return self._start(str(next_id))

    def _start(self, job_id: str) -> Job | None:
        if self._redis.eval(*move(job_id, ("queued", "running"), status="running")) != "ok":
            self._drop(job_id)
            return None
        self._held = job_id
        return unpack(self._redis.hgetall(job_key(job_id)), Job)

    def _drop(self, job_id: str) -> None:
        """This job is nobody's any more."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.lrem(FT_TAKEN, 0, job_id)
            pipe.delete(lease_key(job_id))
            pipe.execute()

    def keep(self) -> None:
        """Renew the lease."""
        self._redis.set(lease_key(self._held), "1", px=LEASE_MS)

    def let_go(self) -> None:
        """Whoever starts next takes the job up again."""
        self._redis.delete(lease_key(self._held))

    def wish(self, job: Job) -> str:
        """What its owner wants of it: cancel, pause or nothing."""
        return str(self._redis.hget(job_key(job.id), "wish") or "")

    def note(self, job: Job, **fields: Any) -> None:
        """Set fields of a running job."""
        self._redis.eval(*move(job.id, ("running",), **fields))

    def say(self, job: Job, message: str, level: str = "info", data: dict[str, Any] | None = None) -> None:
        """One event."""
        self.report(job, [event(message, level, data)])

    def report(self, job: Job, events: list[str]) -> None:
        """Events in a row; the oldest beyond MAX_EVENTS go."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.rpush(events_key(job.id), *events)
            pipe.ltrim(events_key(job.id), -MAX_EVENTS, -1)
            pipe.execute()

    def checkpoint(self, job: Job, step: int, metrics: dict[str, Any], name: str) -> None:
        """List a checkpoint, in OpenAI's shape."""
        self._redis.rpush(checkpoints_key(job.id), json.dumps({
            "id": new_id("ftckpt"), "object": "fine_tuning.job.checkpoint", "created_at": int(time.time()),
            "fine_tuning_job_id": job.id, "step_number": step, "metrics": {"step": step} | metrics,
            "fine_tuned_model_checkpoint": name,
        }))

    def pause(self, job: Job) -> None:
        """Its place is kept: `resume` queues it again."""
        self.note(job, status="paused", wish="")
        self.say(job, "The job is paused.")
        self._drop(job.id)

    def end(self, job: Job, status: Status, **fields: Any) -> None:
        """The last word on a job."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.eval(*move(job.id, ("running",), status=status, wish="", finished_at=int(time.time()), **fields))
            if fields.get("error"):
                pipe.rpush(events_key(job.id), event(fields["error"]["message"], "error"))
            last = "The job is cancelled." if status == "cancelled" else f"The job has {status}."
            pipe.rpush(events_key(job.id), event(last))
            pipe.execute()
        self._drop(job.id)
