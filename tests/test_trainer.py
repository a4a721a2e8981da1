"""The trainer: what it and the jobs service say to each other over real HTTP, and a job with a scripted run.

What training itself does is tested with the real thing in `test_lifecycle.py`.
"""

import asyncio
import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from redis.exceptions import ConnectionError as RedisAway

from common.database import Database
from common.files import File, new_id
from common.serving import make_api
from common.tuning import Job, Report
from services.jobs import tables
from services.jobs.internal import add_internal
from services.jobs.trainers import Trainers
from services.jobs.tuning import Tuning
from services.trainer import gate, publish, runner
from services.trainer.__main__ import Trainer, remove_old
from services.trainer.jobs import Jobs, LeaseLost, Work
from services.trainer.runner import Runner, Stopped
from services.trainer.settings import TrainerSettings
from tests.harness import free_ports, wait_for
from tests.jobs_service import database

TOKEN = "t" * 40
RESULT = {"valid_loss": 1.0, "base_valid_loss": 2.0, "trained_tokens": 7.0}


class Service:
    """The jobs service's internal routes behind a real server, which can go and come back."""

    def __init__(self, kept: Database) -> None:
        self.kept, self.port = kept, free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        self.tuning = Tuning(kept, None, frozenset, 5)  # type: ignore[arg-type]
        self.start()

    def start(self) -> None:
        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            app.state.trainers = Trainers(self.kept)
            yield

        api = make_api(lifespan)
        add_internal(api, TOKEN)
        self.server = uvicorn.Server(uvicorn.Config(api, port=self.port, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        wait_for(lambda: httpx.get(self.url + "/health").status_code == 200, "up")

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    def add(self, **fields: Any) -> Job:
        job = Job(**{"id": new_id("ftjob"), "owner": "owner", "status": "queued", "created_at": 1, "model": "m",
                     "training_file": new_id("file"), "seed": 1, "hyperparameters": {}, **fields})
        self.kept.transact(lambda c: tables.add(c, tables.jobs, job))
        return job

    def find(self, job: Job) -> Job:
        found = self.kept.transact(lambda c: tables.find(c, tables.jobs, Job, job.id))
        assert found is not None
        return found

    def messages(self, job: Job) -> list[str]:
        return [e["message"] for e in asyncio.run(self.tuning.events(job))][::-1]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    kept = database(tmp_path)
    made = Service(kept)
    yield made
    made.stop()
    kept.close()


@pytest.fixture
def jobs(service: Service) -> Jobs:
    return Jobs(service.url, TOKEN, "m")


class TestWords:
    def test_nobody_without_the_token(self, service: Service) -> None:
        for token in ("y", "x" * 40):
            with pytest.raises(httpx.HTTPStatusError, match="401"):
                Jobs(service.url, token, "m").claim()
        assert httpx.post(service.url + "/internal/tuning/lease", content=b"{", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 400

    def test_from_lease_to_end(self, service: Service, jobs: Jobs) -> None:
        job = service.add()
        assert jobs.claim() is not None, "the job"
        assert jobs.claim() is None
        assert jobs.unfinished() == {job.id}

    def test_what_was_said_while_the_service_was_away_comes_later_and_once(self, service: Service, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("services.trainer.jobs.REPORT_EVERY_S", 0.0)
        job = service.add()
        work = jobs.claim()
        assert work is not None
        work.say("one")
        work.keep()
        service.stop()
        for text in ("two", "three"):
            work.say(text)
            work.keep()  # nothing is raised: the run goes on
        service.start()
        work.say("four")
        work.keep()
        work.keep()
        assert service.messages(job) == ["one", "two", "three", "four"]
        assert work.end("failed", error={"message": "no", "code": "x", "param": None})
        assert service.messages(job)[-2:] == ["no", "The job has failed."]

    def test_a_report_whose_answer_was_lost_is_taken_once(self, service: Service, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("services.trainer.jobs.REPORT_EVERY_S", 0.0)
        job = service.add()
        work = jobs.claim()
        assert work is not None
        report, lost = Jobs.report, []

        def loses_the_first(self: Jobs, job: Job, said: Report) -> Any:
            answer = report(self, job, said)
            if not lost:
                lost.append(said)
                raise httpx.ReadError("reset")
            return answer

        monkeypatch.setattr(Jobs, "report", loses_the_first)
        work.say("one")
        work.keep()
        work.say("two")
        work.keep()
        work.keep()
        assert service.messages(job) == ["one", "two"]

    def test_a_lease_that_is_lost_ends_it(self, service: Service, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("services.trainer.jobs.REPORT_EVERY_S", 0.0)
        service.add()
        first = jobs.claim()
        assert first is not None
        now = time.time()
        monkeypatch.setattr("services.jobs.trainers.time.time", lambda: now + 16)
        assert jobs.claim() is not None
        first.say("late")
        with pytest.raises(LeaseLost):
            first.keep()
        with pytest.raises(LeaseLost):
            first.end("succeeded")


class ScriptedRun:
    """A run that says what it is told to and then ends."""

    script: ClassVar[list[Any]] = []
    during: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, folder: Any) -> None:
        self.folder, self.result, self.rejected, self.status = folder, RESULT, None, 0
        self.killed = False

    def __enter__(self) -> "ScriptedRun":
        self.left = [*self.script, None, ...]
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.metrics.write_text("step\n")
        self.folder.run.write_text(json.dumps({"result": self.result}))

    def go(self) -> None:
        self.went = True

    def next(self, _: float) -> Any:
        self.during()
        said = self.left.pop(0)
        return dict(said) if isinstance(said, dict) else said

    def kill(self) -> None:
        self.result, self.left, self.status = None, [...], -9

    def stop(self) -> None:
        self.result = None


class Redis:
    """The registry of adapters, which can be away."""

    def __init__(self) -> None:
        self.adapters: dict[str, Any] = {}
        self.away = 0

    def hsetnx(self, _: str, name: str, adapter: bytes) -> int:
        if self.away:
            self.away -= 1
            raise RedisAway("away")
        self.adapters.setdefault(name, adapter)
        return 1

    def hget(self, _: str, name: str) -> Any:
        return self.adapters.get(name)

    def hdel(self, _: str, name: str) -> None:
        self.adapters.pop(name, None)


class Everything:
    """Models of every name."""

    def __iter__(self) -> Iterator[Any]:
        return iter([SimpleNamespace(id=EveryName(), max_model_len=100)])


class EveryName:
    def __eq__(self, other: object) -> bool:
        return True


class ScriptedEngine:
    """Says how likely it finds a prompt's tokens, by model (the first letters of its name)."""

    def __init__(self, logprobs: dict[str, float], takes_s: float = 0.0) -> None:
        api = FastAPI()
        self.asked = self.answered = 0

        @api.post("/v1/completions")
        async def complete(asked: dict[str, Any]) -> dict[str, Any]:
            self.asked += 1
            await asyncio.sleep(takes_s)
            self.answered += 1
            value = next(value for name, value in logprobs.items() if asked["model"].startswith(name))
            said = [None, *({str(token): {"logprob": value, "rank": 1, "decoded_token": "x"}} for token in asked["prompt"][1:])]
            return {"choices": [{"index": 0, "text": "", "prompt_logprobs": said}]}

        port = free_ports(1)[0]
        self.address = f"127.0.0.1:{port}"
        self.server = uvicorn.Server(uvicorn.Config(api, port=port, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> "ScriptedEngine":
        self.thread.start()
        wait_for(lambda: httpx.get(f"http://{self.address}/").status_code == 404, "up")
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()


class TestJob:
    @pytest.fixture(autouse=True)
    def scripted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "Run", ScriptedRun)
        monkeypatch.setattr(runner, "AGAIN_S", 0.02)
        monkeypatch.setattr(ScriptedRun, "script", [])
        monkeypatch.setattr(ScriptedRun, "during", staticmethod(lambda: None))
        for module in ("services.trainer.jobs.REPORT_EVERY_S", "services.trainer.jobs.RENEW_EVERY_S"):
            monkeypatch.setattr(module, 0.0)
        worker = SimpleNamespace(address="w:1", models=Everything())
        monkeypatch.setattr(publish, "ready_workers", lambda redis, model: [worker])
        monkeypatch.setattr(publish, "check_tokens", lambda prompts, *_: len(prompts))
        monkeypatch.setattr(publish, "place", lambda source, folder: "digest")

    @pytest.fixture
    def start(self, service: Service, jobs: Jobs, tmp_path: Path) -> Callable[..., tuple[Job, Runner]]:
        secret = tmp_path / "secret"
        secret.write_text(TOKEN)
        settings = TrainerSettings(  # type: ignore[call-arg]
            redis_url="redis://x", redis_password_file=secret, worker_token_file=secret, trainer_token_file=secret, jobs_url=service.url,
            model="m", files_dir=tmp_path / "files", runs_dir=tmp_path / "runs", adapters_dir=tmp_path / "adapters")
        (tmp_path / "files").mkdir()
        self.redis, self.stopping = Redis(), threading.Event()

        def begin(**fields: Any) -> tuple[Job, Runner]:
            job = service.add(**fields)
            (tmp_path / "files" / job.training_file).touch()
            work = jobs.claim()
            assert isinstance(work, Work)
            folder = tmp_path / "runs" / job.id
            folder.mkdir(parents=True)
            (folder / "prompts.json").write_text("[]")
            return job, Runner(settings, self.redis, work, self.stopping)  # type: ignore[arg-type]

        return begin

    def test_trained_published_succeeded(self, service: Service, start: Any, tmp_path: Path) -> None:
        job, run = start(suffix="mine")
        run.run()
        found = service.find(job)
        assert (found.status, found.trained_tokens) == ("succeeded", 7)
        assert list(self.redis.adapters) == [found.fine_tuned_model]
        file = service.kept.transact(lambda c: tables.listed(c, tables.files, File, "owner"))[0]
        assert (found.result_files, (tmp_path / "files" / file.id).read_text()) == ([file.id], "step\n")

    def test_a_quantised_base_is_refused_before_anything_is_loaded(
        self, service: Service, start: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runner.checkpoint, "config", lambda model, revision: {"quantization_config": {"quant_method": "awq"}})
        monkeypatch.setattr(runner, "Run", None)
        job, run = start()
        run.run()
        found = service.find(job)
        assert found.status == "failed"
        assert found.error == {"code": "base_quantized", "param": "model",
                               "message": "The base m is awq: a LoRA run needs its weights in 16 bits."}

    @pytest.mark.parametrize(("verb", "status"), [("cancel", "cancelled"), ("pause", "paused")])
    @pytest.mark.parametrize("when", ["training", "before", "loading", "at the end"])
    def test_a_wish_is_done_whenever_it_comes(
        self, service: Service, start: Any, monkeypatch: pytest.MonkeyPatch, verb: str, status: str, when: str
    ) -> None:
        """After training it was ignored for up to six minutes, and for good (A12)."""
        job, run = start()

        def wish() -> None:
            asyncio.run(getattr(service.tuning, verb)(service.find(job)))

        def once(then: Any) -> Any:
            done: list[int] = []

            def call(*args: Any) -> Any:
                if not done:
                    done.append(1)
                    wish()
                return then(*args)
            return call

        if when == "training":
            monkeypatch.setattr(ScriptedRun, "during", staticmethod(once(lambda: time.sleep(0.01))))
        if when == "before":
            monkeypatch.setattr(publish, "place", once(lambda source, folder: "digest"))
        if when == "loading":
            monkeypatch.setattr(publish, "wait_until_served", once(lambda redis, adapter, still: still() or 1))
        if when == "at the end":
            monkeypatch.setattr(Runner, "_results_file", once(Runner._results_file))
        run.run()
        assert service.find(job).status == status
        assert self.redis.adapters == {}, "nobody is served what was cancelled"

    @pytest.mark.parametrize("what", ["cancel", "stop"])
    def test_a_run_that_talks_all_the_time_is_still_told(
        self, service: Service, start: Any, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        """With ten steps a second the lease ran out, and nobody heard a cancel, or a SIGTERM, for minutes."""
        step = {"kind": "message", "message": "step", "level": "info"}
        monkeypatch.setattr(ScriptedRun, "script", [step] * 10_000)
        job, run = start()
        if what == "cancel":
            asyncio.run(service.tuning.cancel(service.find(job)))
            run.run()
            assert service.find(job).status == "cancelled"
        else:
            threading.Timer(0.3, self.stopping.set).start()
            with pytest.raises(Stopped):
                run.run()
        assert service.messages(job).count("step") < 9000

    @pytest.mark.parametrize("how", ["killed, then cancelled", "no worker has it", "redis away at the end"])
    def test_only_a_job_that_succeeded_leaves_a_model(
        self, service: Service, start: Any, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        """Registered by an earlier life, or refused after that, it was served for ever."""
        job, run = start()
        if how == "killed, then cancelled":
            monkeypatch.setattr(publish, "wait_until_served", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):  # as good as kill -9: nothing of ours goes on
                run.run()
            assert self.redis.adapters
            asyncio.run(service.tuning.cancel(service.find(job)))
            now = time.time()
            monkeypatch.setattr("services.jobs.trainers.time.time", lambda: now + 16)
            again = jobs.claim()
            assert again is not None
            Runner(run._settings, self.redis, again, self.stopping).run()  # type: ignore[arg-type]
        elif how == "no worker has it":
            monkeypatch.setattr(publish, "ready_workers", lambda redis, model: [] if model.startswith("ft:") else [SimpleNamespace(address="w:1")])
            monkeypatch.setattr(publish, "LOAD_PATIENCE_S", 0.1)
            run.run()
        else:
            away = iter([RedisAway("away")] * 3)

            def withdraw(redis: Any, name: str, folder: str, then: Any = publish.withdraw) -> None:
                for error in away:
                    raise error
                then(redis, name, folder)

            monkeypatch.setattr(publish, "withdraw", withdraw)
            monkeypatch.setattr(publish, "wait_until_served", lambda *_: (_ for _ in ()).throw(publish.Refused("not_loaded", "no")))
            run.run()
        assert service.find(job).status == ("cancelled" if "cancelled" in how else "failed")
        assert self.redis.adapters == {}

    def test_redis_that_is_away_for_a_while_costs_no_training(self, service: Service, start: Any) -> None:
        job, run = start()
        self.redis.away = 3
        run.run()
        assert service.find(job).status == "succeeded"
        assert sum("validation loss" in text for text in service.messages(job)) == 1

    def test_redis_that_stays_away_ends_it(self, service: Service, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Errors there were tried again for ever (A12)."""
        monkeypatch.setattr(runner, "PATIENCE_S", 0.1)
        job, run = start()
        self.redis.away = 10**6
        run.run()
        found = service.find(job)
        assert found.error is not None
        assert (found.status, found.error["code"]) == ("failed", "not_published")

    def test_told_to_stop_it_goes_on_at_the_next_start(self, service: Service, start: Any, jobs: Jobs) -> None:
        job, run = start()
        self.stopping.set()
        with pytest.raises(Stopped):
            run.run()
        assert service.find(job).status == "running"
        assert jobs.claim() is not None, "at once"

    def test_a_template_that_differs_is_found_before_training(self, service: Service, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """It cost the whole run (D2)."""
        said = {"kind": "data", "rows": 9, "tokens": 9, "learnt_tokens": 3, "validation_rows": 1, "longest": []}
        monkeypatch.setattr(ScriptedRun, "script", [said, {"kind": "message", "message": "training", "level": "info"}])

        def differs(*_: Any) -> int:
            raise publish.Refused("tokens_differ", "they differ")

        monkeypatch.setattr(publish, "check_tokens", differs)
        job, run = start()
        run.run()
        found = service.find(job)
        assert found.error is not None
        assert (found.status, found.error["code"]) == ("failed", "tokens_differ")
        assert "training" not in service.messages(job)

    def test_a_model_that_is_worse_as_served_is_taken_back(self, service: Service, start: Any, tmp_path: Path) -> None:
        """The gate looked at the trainer's own model only (D5)."""
        with ScriptedEngine({"m": -1.0, "ft": -1.5}) as engine:
            job, run = start(suffix="mine")
            publish.ready_workers(None, "")[0].address = engine.address  # type: ignore[arg-type]
            (tmp_path / "runs" / job.id / "gate.json").write_text(json.dumps([{"tokens": [5, 6, 7], "learnt": [1, 2]}] * 3))
            run.run()
        found = service.find(job)
        assert found.error is not None
        assert (found.status, found.error["code"]) == ("failed", "worse_than_base")
        assert "1.5000 nats a token, the base model 1.0000, on 3 rows" in found.error["message"]
        assert self.redis.adapters == {}, "nobody is served it"

    def test_better_as_served_is_said(self, service: Service, start: Any, tmp_path: Path) -> None:
        with ScriptedEngine({"m": -2.0, "ft": -1.0}) as engine:
            job, run = start()
            publish.ready_workers(None, "")[0].address = engine.address  # type: ignore[arg-type]
            (tmp_path / "runs" / job.id / "gate.json").write_text(json.dumps([{"tokens": [5, 6, 7], "learnt": [1, 2]}] * 30))
            run.run()
        assert service.find(job).status == "succeeded"
        assert "as served: 1.0000 nats a token, the base model 2.0000, on 30 rows" in service.messages(job)

    def test_a_busy_worker_is_waited_for_and_the_lease_is_kept(
        self, service: Service, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A row that waited longer than 12 s behind people was asked again, at the end of the queue; after ten minutes the training was lost."""
        kept = []
        monkeypatch.setattr(gate, "LOOK_EVERY_S", 0.05)
        with ScriptedEngine({"m": -2.0, "ft": -1.0}, takes_s=0.6) as engine:
            job, run = start()
            keep = run._work.keep
            monkeypatch.setattr(run._work, "keep", lambda: (kept.append(time.monotonic()), keep()))
            publish.ready_workers(None, "")[0].address = engine.address  # type: ignore[arg-type]
            (tmp_path / "runs" / job.id / "gate.json").write_text(json.dumps([{"tokens": [5, 6, 7], "learnt": [1, 2]}] * 2))
            run.run()
            assert engine.asked == 4
        assert service.find(job).status == "succeeded"
        assert max(b - a for a, b in itertools.pairwise(kept)) < 0.5

    def test_a_cancel_while_a_row_waits_ends_it(self, service: Service, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gate, "LOOK_EVERY_S", 0.05)
        with ScriptedEngine({"m": -2.0, "ft": -1.0}, takes_s=20) as engine:
            job, run = start()
            publish.ready_workers(None, "")[0].address = engine.address  # type: ignore[arg-type]
            (tmp_path / "runs" / job.id / "gate.json").write_text(json.dumps([{"tokens": [5, 6, 7], "learnt": [1, 2]}] * 2))
            running = threading.Thread(target=run.run)
            running.start()
            wait_for(lambda: engine.asked, "the first row asked")
            asyncio.run(service.tuning.cancel(service.find(job)))
            running.join(5)
            assert not running.is_alive()
            assert engine.answered == 0
        assert service.find(job).status == "cancelled"
        assert self.redis.adapters == {}

    def test_another_model_than_the_trained_one_is_noticed(
        self, service: Service, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(RESULT, "gate_loss", 1.0)
        with ScriptedEngine({"m": -2.0, "ft": -1.5}) as engine:
            job, run = start()
            publish.ready_workers(None, "")[0].address = engine.address  # type: ignore[arg-type]
            (tmp_path / "runs" / job.id / "gate.json").write_text(json.dumps([{"tokens": [5, 6, 7], "learnt": [1, 2]}] * 30))
            run.run()
        assert service.find(job).status == "succeeded", "a warning: it is better than its base"
        assert any("otherwise than it was trained" in message for message in service.messages(job))

    def test_a_bug_ends_one_job(self, service: Service, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def bug(*_: Any) -> None:
            raise KeyError("x")

        monkeypatch.setattr(publish, "place", bug)
        job, run = start()
        run.run()
        found = service.find(job)
        assert found.error is not None
        assert (found.status, found.error["code"]) == ("failed", "trainer_failed")


def test_runs_of_jobs_that_are_over_leave_the_disk(tmp_path: Path) -> None:
    """With the prompts of deleted files in them (B15)."""
    for name, age_s in (("ftjob-over", 7200), ("ftjob-failed", 7200), ("ftjob-just-over", 10), ("ftjob-running", 7200)):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "prompts.json").touch()
        if name != "ftjob-failed":
            (tmp_path / name / "run.json").touch()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    remove_old(tmp_path, {"ftjob-running"}, keep="run.json")
    everything = ["checkpoints", "prompts.json", "run.json"]
    assert {folder.name: sorted(path.name for path in folder.iterdir()) for folder in tmp_path.iterdir()} == {
        "ftjob-over": ["run.json"], "ftjob-just-over": everything, "ftjob-running": everything}


def test_an_empty_registry_is_no_reason_to_delete_every_model(tmp_path: Path) -> None:
    """A redis without its data, and ten minutes later all weights were gone."""
    class Registry:
        entries: ClassVar[list[str]] = []

        def hvals(self, _: str) -> list[str]:
            return self.entries

    for name in ("ftjob-a", "ftjob-b"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    trainer = object.__new__(Trainer)
    trainer._settings = SimpleNamespace(adapters_dir=tmp_path, runs_dir=tmp_path / "ftjob-a")  # type: ignore[assignment]
    trainer._redis, trainer._jobs = Registry(), SimpleNamespace(unfinished=set)  # type: ignore[assignment]
    for entries, left in (([], ["ftjob-a", "ftjob-b"]), (['{"name": "ft:odd", "folder": "ftjob-a"'], ["ftjob-a"])):
        Registry.entries, trainer._tidy_at = entries, 0.0
        trainer._tidy()
        assert sorted(path.name for path in tmp_path.iterdir()) == left
