"""The trainer: takes fine-tuning jobs from the queue, one at a time: `python -m services.trainer`.

Each run is a process of its own (`run.py`), so that a crash or a cancel ends the run and nothing else. A job in work is
held by a lease; whoever starts after a crash takes it up again, and the run goes on from its last checkpoint.
"""

import json
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
from loguru import logger
from prometheus_client import start_http_server
from redis import Redis
from redis.exceptions import RedisError

from common import logs
from common.adapters import Adapter, model_name, read_registry
from common.files import File, new_id, registration, write_whole
from common.jobstore import Job, Status, invalid_file, problem_events
from common.redis.names import ADAPTERS
from common.settings import read_settings
from services.trainer import metrics, publish
from services.trainer.plan import DATA_AT_FAULT, PAUSED, Folder, Plan
from services.trainer.process import Run
from services.trainer.queue import Queue
from services.trainer.settings import TrainerSettings

POLL_S = 0.2
TIDY_EVERY_S = 600.0
DELETED_KEPT_S = 3600.0


class Stopped(Exception):
    """The trainer was told to stop; the job stays taken and goes on at the next start."""


class Trainer:
    """One trainer."""

    def __init__(self, settings: TrainerSettings) -> None:
        self._settings = settings
        self._redis = Redis.from_url(
            settings.redis_url,
            username=settings.redis_user,
            password=settings.redis_password,
            decode_responses=True,
            socket_timeout=10,
            health_check_interval=30,
        )
        self._queue = Queue(self._redis)
        self._stopping = threading.Event()
        self._tidy_at = 0.0

    def stop(self, *_: object) -> None:
        """Signal handler."""
        self._stopping.set()

    def serve(self) -> None:
        """Until told to stop."""
        logger.info("trainer up", model=self._settings.model)
        while not self._stopping.is_set():
            try:
                if time.monotonic() > self._tidy_at:
                    self._tidy_at = time.monotonic() + TIDY_EVERY_S
                    self._tidy()
                if (job := self._queue.claim()) is not None:
                    self._work(job)
            except (RedisError, OSError, httpx.HTTPError) as error:  # the job stays taken and is tried again
                logger.warning("redis or a worker is away; trying again", error=str(error))
                self._stopping.wait(1.0)
            except Stopped:
                break
        logger.info("trainer down")

    def _still(self) -> None:
        """Keep the lease. Raises Stopped."""
        self._queue.keep()
        if self._stopping.is_set():
            raise Stopped

    def _tidy(self) -> None:
        """Remove adapters that were deleted from the registry, once no worker can be reading them any more."""
        wanted = {adapter.folder for adapter in read_registry(self._redis.hgetall(ADAPTERS)).values()}
        for folder in self._settings.adapters_dir.iterdir():
            if folder.name not in wanted and folder.stat().st_mtime < time.time() - DELETED_KEPT_S:
                shutil.rmtree(folder, ignore_errors=True)

    # --- a job ---------------------------------------------------------------------------------

    def _work(self, job: Job) -> None:
        folder = Folder(self._settings.runs_dir / job.id)
        folder.root.mkdir(parents=True, exist_ok=True)
        logger.info("job starts", job=job.id)
        self._queue.say(job, "Fine-tuning job started")
        metrics.jobs_running.set(1)
        try:
            result = self._train(job, folder)
            if result is not None:
                self._publish(job, folder, result)
        except publish.Refused as refused:
            self._end(job, "failed", error={"code": refused.code, "param": None, "message": str(refused)})
        except Stopped:
            self._queue.let_go()
            raise
        except (RedisError, OSError, httpx.HTTPError):
            raise
        except Exception as error:  # a bug of ours ends this job, not all that wait behind it
            logger.exception("a job failed", job=job.id)
            text = f"The trainer failed ({type(error).__name__}); its log says why."
            self._end(job, "failed", error={"code": "trainer_failed", "param": None, "message": text})
        finally:
            metrics.jobs_running.set(0)

    def _train(self, job: Job, folder: Folder) -> dict[str, float] | None:
        """Run it to its end. Returns the figures; None when the job has ended or paused without any."""
        folder.pause.unlink(missing_ok=True)
        if folder.run.exists():  # trained already; a crash came before it was published
            return dict(json.loads(folder.run.read_text())["result"])
        for param, file_id in (("training_file", job.training_file), ("validation_file", job.validation_file)):
            if file_id and not (self._settings.files_dir / file_id).exists():
                gone = [{"param": param, "code": "file_not_found"}]
                self._end(job, "failed", error=invalid_file(gone, f"The file {file_id} was deleted."))
                return None
        folder.plan.write_bytes(msgspec.json.encode(self._plan(job)))
        wish = ""
        with Run(folder) as run:
            while (said := run.next(POLL_S)) is not ...:
                if said is not None:
                    self._hear(job, said)
                    continue
                self._queue.keep()
                if not wish and (wish := self._queue.wish(job)):
                    run.kill() if wish == "cancel" else folder.pause.touch()
                if self._stopping.is_set():
                    run.stop()
                    raise Stopped
        if run.result is not None:
            return run.result
        if run.status == DATA_AT_FAULT:
            rejected = run.rejected or {"problems": [{"param": "training_file", "code": "rejected"}], "summary": ""}
            self._queue.report(job, problem_events(rejected["problems"]))
            self._end(job, "failed", error=invalid_file(rejected["problems"], rejected["summary"]))
        elif wish == "cancel":
            self._end(job, "cancelled")
        elif run.status == PAUSED:
            self._queue.pause(job)
        else:
            self._end(job, "failed", error={"code": "training_failed", "param": None, "message": run.explain()})
        return None

    def _plan(self, job: Job) -> Plan:
        files = self._settings.files_dir
        return msgspec.convert(
            {
                "job": job.id,
                "base": self._settings.model,
                "seed": job.seed,
                "max_tokens": self._settings.train_max_tokens,
                "training_file": str(files / job.training_file),
                "four_bit": self._settings.train_four_bit,
                "validation_file": str(files / job.validation_file) if job.validation_file else None,
                **job.hyperparameters,
            },
            Plan,
        )

    def _hear(self, job: Job, said: dict[str, Any]) -> None:
        """Pass on what the run says."""
        kind = said.pop("kind")
        if kind == "message":
            self._queue.say(job, said["message"], said["level"])
        elif kind == "data":
            self._queue.say(
                job,
                f"{said['rows']} training rows with {said['tokens']} tokens, {said['learnt_tokens']} of them learnt; "
                f"{said['validation_rows']} validation rows; longest: "
                + ", ".join(f"line {line} ({tokens} tokens)" for line, tokens in said["longest"]),
            )
        elif kind == "resolved":
            self._queue.note(job, hyperparameters=said)
        elif kind == "metrics":
            metrics.hear(said)
            loss = said.get("train_loss")
            text = (
                f"training loss={loss:.4f}"
                if loss is not None
                else f"full validation loss={said['full_valid_loss']:.4f}"
            )
            self._queue.say(job, f"Step {said['step']}/{said['total_steps']}: {text}", data=said)
            if "eta_s" in said:
                self._queue.note(job, estimated_finish=int(time.time() + said["eta_s"]))
        elif kind == "checkpoint":
            name = f"{self._name(job)}:ckpt-step-{said['step']}"
            self._queue.checkpoint(job, said["step"], said["metrics"], name)

    def _publish(self, job: Job, folder: Folder, result: dict[str, float]) -> None:
        """Through the gate and to the workers; then the job has succeeded."""
        publish.check_loss(result)
        losses = f"validation loss {result['valid_loss']:.4f}, the base model's {result['base_valid_loss']:.4f}"
        self._queue.say(job, losses)
        deadline = time.monotonic() + publish.WORKER_PATIENCE_S
        while not (workers := publish.ready_workers(self._redis, job.model)):
            if time.monotonic() > deadline:
                raise publish.Refused(
                    "no_worker", f"No worker was ready within {publish.WORKER_PATIENCE_S:g} s to check the model with."
                )
            self._still()
            time.sleep(0.5)
        count = publish.check_tokens(
            json.loads(folder.prompts.read_text()), workers, job.model, self._settings.worker_token
        )
        self._queue.say(job, f"{count} prompts: trained and served token ids are the same")
        digest = publish.place(folder.adapter, self._settings.adapters_dir / job.id)
        adapter = Adapter(self._name(job), job.id, job.model, digest, job.owner, int(time.time()))
        publish.register(self._redis, adapter)
        have = publish.wait_until_served(self._redis, adapter, self._still)
        self._queue.say(job, f"{adapter.name} is served by {have} worker{'s' if have > 1 else ''}")
        self._end(
            job,
            "succeeded",
            fine_tuned_model=adapter.name,
            trained_tokens=int(result["trained_tokens"]),
            result_files=[self._keep(job, folder.metrics)],
            estimated_finish=None,
        )

    def _keep(self, job: Job, source: Path) -> str:
        """Offer a file of the run through the Files API. Returns its id."""
        file = File(new_id("file"), job.owner, source.name, "fine-tune-results", 0, int(time.time()))
        with open(source, "rb") as bytes_:
            file.bytes = write_whole(bytes_, self._settings.files_dir / file.id)
        self._redis.eval(*registration(file))
        return file.id

    def _end(self, job: Job, status: Status, **fields: Any) -> None:
        """The last word on a job."""
        self._queue.end(job, status, **fields)
        metrics.jobs_ended.labels(status).inc()
        logger.info("job ends", job=job.id, status=status, error=(fields.get("error") or {}).get("code"))

    def _name(self, job: Job) -> str:
        return model_name(job.model, job.suffix, job.id)


def main() -> None:
    """Check the settings, serve."""
    settings = read_settings(TrainerSettings, "trainer")
    logs.configure("trainer", settings.log_level)
    for folder in (settings.runs_dir, settings.adapters_dir, settings.files_dir):
        folder.mkdir(parents=True, exist_ok=True)
    if settings.trainer_metrics_port:
        start_http_server(settings.trainer_metrics_port, settings.trainer_metrics_host)
    trainer = Trainer(settings)
    signal.signal(signal.SIGTERM, trainer.stop)
    signal.signal(signal.SIGINT, trainer.stop)
    trainer.serve()


if __name__ == "__main__":
    main()
