"""One job, from its lease to its end: trained, gated, published. What its owner wishes meanwhile is done."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import httpx
import msgspec
from loguru import logger
from redis import Redis
from redis.exceptions import RedisError

from common import checkpoint
from common.adapters import Adapter, model_name
from common.files import File, new_id, pieces, sync_folder, write_whole
from common.tuning import invalid_file, problem_events
from services.trainer import gate, metrics, publish
from services.trainer.jobs import LeaseLost, Work
from services.trainer.place import Place
from services.trainer.plan import DATA_AT_FAULT, PAUSED, Folder, Plan
from services.trainer.process import Run
from services.trainer.settings import TrainerSettings

POLL_S = 0.2
PATIENCE_S = 600.0
"""How long redis, a worker or the disk may be away while a trained model is published."""
AGAIN_S = 1.0


class Stopped(Exception):
    """The trainer was told to stop; the job goes on at the next start."""


class Wished(Exception):
    """Its owner wants it cancelled or paused."""


class Runner:
    """Works on one job. `stopping` says when the trainer is told to stop."""

    def __init__(self, settings: TrainerSettings, redis: Redis, work: Work, stopping: threading.Event) -> None:
        self._settings, self._redis, self._work, self._stopping = settings, redis, work, stopping
        self._job = work.job
        self._folder = Folder(settings.runs_dir / work.job.id)
        self._place = Place(redis, settings)

    def run(self) -> None:
        """To the end. Raises LeaseLost, Stopped."""
        self._folder.root.mkdir(parents=True, exist_ok=True)
        logger.info("job starts", job=self._job.id)
        self._work.say("Fine-tuning job started")
        metrics.jobs_running.set(1)
        try:
            result = self._train()
            if result is not None:
                publish.check_loss(result)
                losses = f"validation loss {result['valid_loss']:.4f}, the base model's {result['base_valid_loss']:.4f}"
                self._work.say(losses)
                self._patiently(lambda: self._publish(result))
        except publish.Refused as refused:
            self._withdraw()
            self._end("failed", error={"code": refused.code, "param": None, "message": str(refused)})
        except Wished:
            self._withdraw()
            self._end("cancelled" if self._work.wish == "cancel" else "paused")
        except Stopped:
            self._work.end("running")
            raise
        except LeaseLost:
            raise
        except Exception as error:  # a bug of ours ends this job, not all that wait behind it
            logger.exception("a job failed", job=self._job.id)
            self._withdraw()
            text = f"The trainer failed ({type(error).__name__}); its log says why."
            self._end("failed", error={"code": "trainer_failed", "param": None, "message": text})
        finally:
            metrics.jobs_running.set(0)

    def _still(self) -> None:
        """Keep the lease. Raises LeaseLost, Stopped, Wished."""
        self._work.keep()
        if self._stopping.is_set():
            raise Stopped
        if self._work.wish:
            raise Wished

    def _withdraw(self) -> None:
        """Whatever ends a job but success: nobody is served its model, also if an earlier life had published it."""
        while self._folder.published.exists():
            try:
                publish.withdraw(self._redis, self._name, self._job.id)
                self._folder.published.unlink()
            except (RedisError, OSError) as error:
                logger.warning("a model waits to be withdrawn", job=self._job.id, error=str(error))
                self._work.keep()
                if self._stopping.wait(AGAIN_S):
                    raise Stopped from None

    # --- trained -------------------------------------------------------------------------------

    def _train(self) -> dict[str, float] | None:
        """Run it to its end. Returns the figures; None when the job has ended or paused without any."""
        folder, job, work = self._folder, self._job, self._work
        folder.pause.unlink(missing_ok=True)
        if folder.run.exists():  # trained already; a crash came before it was published
            return dict(json.loads(folder.run.read_text())["result"])
        base, revision = checkpoint.original(self._settings.model, self._settings.model_revision)
        if base != self._settings.model and not checkpoint.config(base, revision):
            text = f"The base {self._job.model} was quantised from {base}, which is not here: it is what a run trains."
            self._end("failed", error={"code": "base_quantized", "param": "model", "message": text})
            return None
        if checkpoint.config(base, revision).get("quantization_config"):
            method = checkpoint.format_name(base, revision)
            text = f"The base {self._job.model} is {method}: a LoRA run needs its weights in 16 bits."
            self._end("failed", error={"code": "base_quantized", "param": "model", "message": text})
            return None
        for param, file_id in (("training_file", job.training_file), ("validation_file", job.validation_file)):
            if file_id and not (self._settings.files_dir / file_id).exists():
                gone = [{"param": param, "code": "file_not_found"}]
                self._end("failed", error=invalid_file(gone, f"The file {file_id} is gone from the disk."))
                return None
        folder.plan.write_bytes(msgspec.json.encode(self._plan()))
        wish = ""
        with contextlib.ExitStack() as taken, Run(folder) as run:
            while (said := run.next(POLL_S)) is not ...:
                if said is not None and said["kind"] == "ready":  # it has read and checked everything
                    taken.enter_context(self._place.taken(self._still, work.say))
                    run.go()
                elif said is not None:
                    self._hear(said)
                work.keep()  # however much it has to say
                if not wish and (wish := work.wish):
                    run.kill() if wish == "cancel" else folder.pause.touch()
                if self._stopping.is_set():
                    run.stop()
                    raise Stopped
        if run.result is not None:
            return run.result
        if run.status == DATA_AT_FAULT:
            rejected = run.rejected or {"problems": [{"param": "training_file", "code": "rejected"}], "summary": ""}
            work.tell(problem_events(rejected["problems"]))
            self._end("failed", error=invalid_file(rejected["problems"], rejected["summary"]))
        elif wish == "cancel" or run.status == PAUSED:
            raise Wished
        else:
            self._end("failed", error={"code": "training_failed", "param": None, "message": run.explain()})
        return None

    def _plan(self) -> Plan:
        files, job = self._settings.files_dir, self._job
        base, revision = checkpoint.original(self._settings.model, self._settings.model_revision)
        return msgspec.convert(
            {
                "job": job.id,
                "base": base,
                "revision": revision,
                "seed": job.seed,
                "max_tokens": self._settings.train_max_tokens,
                "training_file": str(files / job.training_file),
                "four_bit": self._settings.train_four_bit,
                "gpu": self._settings.shared_place.startswith("gpu-"),
                "validation_file": str(files / job.validation_file) if job.validation_file else None,
                **job.hyperparameters,
            },
            Plan,
        )

    def _hear(self, said: dict[str, Any]) -> None:
        """Pass on what the run says. Raises Refused when its prompts are not what the server would make of them."""
        work, kind = self._work, said.pop("kind")
        if kind == "message":
            work.say(said["message"], said["level"])
        elif kind == "data":
            longest = ", ".join(f"line {line} ({tokens} tokens)" for line, tokens in said["longest"])
            work.say(
                f"{said['rows']} training rows with {said['tokens']} tokens, {said['learnt_tokens']} of them learnt; "
                f"{said['validation_rows']} validation rows; longest: {longest}"
            )
            self._compare_early()
        elif kind == "resolved":
            work.note(hyperparameters=said)
        elif kind == "metrics":
            metrics.hear(said)
            loss = said.get("train_loss")
            what, loss = ("training", loss) if loss is not None else ("full validation", said["full_valid_loss"])
            work.say(f"Step {said['step']}/{said['total_steps']}: {what} loss={loss:.4f}", data=said)
            if "eta_s" in said:
                work.note(estimated_finish=int(time.time() + said["eta_s"]))
        elif kind == "checkpoint":
            work.checkpoint(said["step"], said["metrics"], f"{self._name}:ckpt-step-{said['step']}")

    # --- gated and published -------------------------------------------------------------------

    def _compare_early(self) -> None:
        """Before hours of training, not after; later if no worker is there now. Raises Refused."""
        try:
            if workers := publish.ready_workers(self._redis, self._job.model):
                self._compare(workers[0].address)
        except (RedisError, httpx.HTTPError) as error:
            logger.warning("prompts are compared later", job=self._job.id, error=str(error) or type(error).__name__)

    def _compare(self, address: str) -> None:
        """Trained and served token ids, once a run: templates may write the date. Raises Refused, HTTPError."""
        if self._folder.compared.exists():
            return
        prompts = json.loads(self._folder.prompts.read_text())
        count = publish.check_tokens(prompts, address, self._job.model, self._settings.worker_token, self._work.keep)
        self._folder.compared.touch()
        self._work.say(f"{count} prompts: trained and served token ids are the same")

    def _patiently(self, work: Callable[[], None]) -> None:
        """Again while redis, a worker or the disk is away. Raises Refused after PATIENCE_S."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return work()
            except (RedisError, OSError, httpx.HTTPError) as error:
                if time.monotonic() > deadline:
                    text = f"The model is trained; it could not be published within {PATIENCE_S:g} s: {error}"
                    raise publish.Refused("not_published", text) from error
                logger.warning("publishing waits", job=self._job.id, error=str(error) or type(error).__name__)
            self._stopping.wait(AGAIN_S)
            self._still()

    def _publish(self, result: dict[str, float]) -> None:
        """To the workers, and compared there; then the job has succeeded. Whatever comes in between undoes it."""
        job, settings = self._job, self._settings
        self._compare(publish.await_worker(self._redis, job.model, self._still).address)
        digest = publish.place(self._folder.adapter, settings.adapters_dir / job.id)
        adapter = Adapter(self._name, job.id, job.model, digest, job.owner, int(time.time()))
        self._still()
        self._folder.published.touch()
        sync_folder(self._folder.root)
        publish.register(self._redis, adapter)
        have = publish.wait_until_served(self._redis, adapter, self._still)
        self._compare_served(adapter.name, result.get("gate_loss"))
        self._work.say(f"{adapter.name} is served by {have} worker{'s' if have > 1 else ''}")
        file = self._results_file()
        if not self._end("succeeded", model=adapter.name, tokens=int(result["trained_tokens"]), file=file):
            raise Wished

    def _compare_served(self, name: str, trained: float | None) -> None:
        """The tuned model against its base, as workers serve them. Raises Refused, HTTPError."""
        rows = json.loads(self._folder.gate.read_text()) if self._folder.gate.exists() else []  # an older release's run
        if rows:
            worker = publish.await_worker(self._redis, name, self._still)
            most = next(model.max_model_len for model in worker.models if model.id == name)
            rows, token = [row for row in rows if len(row["tokens"]) < most], self._settings.worker_token
        if rows:
            verdict = gate.check_served(rows, worker.address, self._job.model, name, token, self._still)
            self._work.say(str(verdict))
            if trained is not None and (warning := gate.differs(verdict, trained)):
                self._work.say(warning, "warn")

    def _results_file(self) -> File:
        """The run's figures, for the Files API."""
        source = self._folder.metrics
        file = File(new_id("file"), self._job.owner, source.name, "fine-tune-results", 0, int(time.time()))
        with open(source, "rb") as bytes_:
            file.bytes = write_whole(pieces(bytes_), self._settings.files_dir / file.id)
        return file

    def _end(self, status: Literal["succeeded", "failed", "cancelled", "paused"], **fields: Any) -> bool:
        """The last word on a job, as soon as the jobs service hears it. False: its owner wished something before."""
        while True:
            try:
                if not self._work.end(status, **fields):
                    return False
                break
            except httpx.TransportError as error:
                logger.warning("the jobs service is away", job=self._job.id, error=str(error) or type(error).__name__)
            except httpx.HTTPStatusError as error:
                if error.response.status_code < 500:
                    raise
                logger.warning("the jobs service cannot take a job's end", job=self._job.id, error=str(error))
            if self._stopping.wait(AGAIN_S):
                raise Stopped
        if status != "paused":
            metrics.jobs_ended.labels(status).inc()
        logger.info("job ends", job=self._job.id, status=status, error=(fields.get("error") or {}).get("code"))
        return True

    @property
    def _name(self) -> str:
        return model_name(self._job.model, self._job.suffix, self._job.id)
