"""The trainer's side of what it and the jobs service say to each other (`common/tuning.py`): one job at a time, leased.

What a run says is kept here until the service has taken it down. While the service is away the run goes on.
"""

import time
from typing import Any, Literal, TypeVar

import httpx
import msgspec
from loguru import logger

from common.files import File, new_id
from common.tuning import MAX_EVENTS, End, Job, Leased, Report, Wanted, Wish, event

TIMEOUT_S = 10.0
REPORT_EVERY_S = 0.5
RENEW_EVERY_S = 2.0

Kind = TypeVar("Kind")


class LeaseLost(Exception):
    """The job is somebody else's now, or is no more: nothing more is said or done about it."""


class Jobs:
    """The jobs service. Raises httpx.HTTPError when it does not answer, or not well."""

    def __init__(self, url: str, token: str, model: str) -> None:
        self._http = httpx.Client(base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=TIMEOUT_S)
        self._model = model

    def claim(self) -> "Work | None":
        """A job to work on."""
        answer = self._post("/internal/tuning/lease", Wanted(self._model))
        if answer.status_code == 204:
            return None
        leased = msgspec.json.decode(answer.content, type=Leased)
        return Work(self, leased.job, leased.token)

    def unfinished(self) -> set[str]:
        """The ids of all jobs that are not over."""
        return msgspec.json.decode(self._post("/internal/tuning/unfinished", {}).content, type=set[str])

    def report(self, job: Job, report: Report) -> Wish:
        """Raises LeaseLost."""
        return msgspec.json.decode(self._post(f"/internal/tuning/jobs/{job.id}", report).content, type=Wish)

    def end(self, job: Job, end: End) -> Wish:
        """Raises LeaseLost."""
        return msgspec.json.decode(self._post(f"/internal/tuning/jobs/{job.id}/end", end).content, type=Wish)

    def _post(self, path: str, body: object) -> httpx.Response:
        answer = self._http.post(path, content=msgspec.json.encode(body))
        if answer.status_code == 409:
            raise LeaseLost
        return answer.raise_for_status()


class Work:
    """A job in work: what is said about it, and what its owner wishes."""

    def __init__(self, jobs: Jobs, job: Job, token: str) -> None:
        self._jobs, self.job, self._token = jobs, job, token
        self.wish: Literal["", "cancel", "pause"] = job.wish
        self._waiting = Report(token, 1)
        self._sent: Report | None = None
        """A report whose answer is not known: it is sent as it was before anything else."""
        self._reported_at = 0.0
        self._away = False

    def say(self, message: str, level: str = "info", data: dict[str, Any] | None = None) -> None:
        """One event."""
        self.tell([event(message, level, data)])

    def tell(self, events: list[dict[str, Any]]) -> None:
        """Events in a row; of those that wait, the oldest beyond MAX_EVENTS go."""
        self._waiting.events = [*self._waiting.events, *events][-MAX_EVENTS:]

    def note(self, *, hyperparameters: dict[str, Any] | None = None, estimated_finish: int | None = None) -> None:
        """What became of `auto`, and when it will be done (Unix time)."""
        self._waiting.hyperparameters = hyperparameters or self._waiting.hyperparameters
        self._waiting.estimated_finish = estimated_finish or self._waiting.estimated_finish

    def checkpoint(self, step: int, metrics: dict[str, Any], name: str) -> None:
        """List a checkpoint, in OpenAI's shape."""
        self._waiting.checkpoints.append({
            "id": new_id("ftckpt"), "object": "fine_tuning.job.checkpoint", "created_at": int(time.time()),
            "fine_tuning_job_id": self.job.id, "step_number": step, "metrics": {"step": step} | metrics,
            "fine_tuned_model_checkpoint": name,
        })

    def keep(self) -> None:
        """Renew the lease and bring what waits; call it often. An absent service is waited for. Raises LeaseLost."""
        waits = self._sent is not None or self._waiting.events or self._waiting.checkpoints
        if time.monotonic() - self._reported_at < (REPORT_EVERY_S if waits else RENEW_EVERY_S):
            return
        try:
            self._report()
            self._away = False
        except httpx.HTTPError as error:
            self._reported_at = time.monotonic()
            if not self._away:
                logger.warning("the jobs service is away; the run goes on", error=str(error) or type(error).__name__)
            self._away = True

    def end(
        self, status: Literal["succeeded", "failed", "cancelled", "paused", "running"], *,
        error: dict[str, Any] | None = None, model: str | None = None, tokens: int | None = None,
        file: File | None = None,
    ) -> bool:
        """Give the lease back with its last word. False: its owner wished something before. Raises LeaseLost."""
        while self._sent is not None or self._waiting.events or self._waiting.checkpoints:
            self._report()
        wish = self._jobs.end(self.job, End(self._token, status, error, model, tokens, file)).wish
        self.wish = wish or self.wish
        return not wish

    def _report(self) -> None:
        if self._sent is None:
            self._sent, self._waiting = self._waiting, Report(self._token, self._waiting.number + 1)
        wish = self._jobs.report(self.job, self._sent).wish
        self._sent = None
        self.wish, self._reported_at = wish or self.wish, time.monotonic()
