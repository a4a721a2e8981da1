"""From a file to a tuned model through the unmodified openai SDK: the embedded stack, two real workers, real training.

Trainings here are small: they show that the way is whole. What it is good for is measured by `make bench-lifecycle`.
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
from openai.types import Batch
from openai.types.fine_tuning import FineTuningJob
from pydantic import BaseModel

from common.auth import HOUSE
from services.local.plan import ROOT
from tests.harness import wait_for
from tests.up import MODEL, Up, started

ROWS = [json.loads(line) for line in (ROOT / "examples/owngpt-qa.jsonl").read_text().splitlines()]
PATIENCE_S = 400
Thing = TypeVar("Thing", bound=BaseModel)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with started(tmp_path_factory.mktemp("lifecycle"), 2) as up:
        yield up


def jsonl(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def upload(up: Up, rows: list, name: str = "rows.jsonl") -> str:
    return up.sdk.files.create(file=(name, jsonl(rows)), purpose="fine-tune").id


def job(up: Up, file: str, epochs: int = 1, **fields: object) -> str:
    return up.sdk.fine_tuning.jobs.create(
        model=MODEL, training_file=file, seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs}}}, **fields).id


def strict(thing: Thing) -> Thing:
    """What the SDK made of an answer, once it also passes the SDK's own types: every field there, none of another kind."""
    type(thing).model_validate_json(thing.to_json(exclude_unset=True), strict=True)
    return thing


def ended(up: Up, job_id: str, *states: str) -> FineTuningJob:
    states = states or ("succeeded", "failed", "cancelled")
    wait_for(lambda: up.sdk.fine_tuning.jobs.retrieve(job_id).status in states, f"job {states}", PATIENCE_S)
    return strict(up.sdk.fine_tuning.jobs.retrieve(job_id))


def messages(up: Up, job_id: str) -> list[str]:
    return [strict(event).message for event in up.sdk.fine_tuning.jobs.list_events(job_id, limit=100)]


def trainer_metrics(up: Up) -> str:
    """What Prometheus is told to read, from where it is told."""
    return httpx.get(f"http://{up.target('trainer')}/metrics").text


class TestFiles:
    def test_the_life_of_a_file(self, up: Up) -> None:
        content = jsonl(ROWS[:12])
        file = up.sdk.files.create(file=("my data.jsonl", content), purpose="fine-tune")
        assert (file.object, file.filename, file.bytes, file.purpose) == ("file", "my data.jsonl", len(content), "fine-tune")
        assert strict(up.sdk.files.retrieve(file.id)) == file
        assert file.id in [f.id for f in up.sdk.files.list(purpose="fine-tune")]
        assert file.id not in [f.id for f in up.sdk.files.list(purpose="batch")]
        assert up.sdk.files.content(file.id).read() == content
        assert strict(up.sdk.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            up.sdk.files.retrieve(file.id)
        assert not list((up.state / "files").glob(f"{file.id}*"))

    def test_pages(self, up: Up) -> None:
        made = [upload(up, ROWS[:10], f"{n}.jsonl") for n in range(3)]
        assert [f.id for f in up.sdk.files.list(limit=2)][:3] == made[::-1]  # the SDK turns the pages
        for file in made:
            up.sdk.files.delete(file)

    def test_somebody_elses_file_does_not_exist(self, up: Up, tmp_path: Path) -> None:
        file = upload(up, ROWS[:10])
        env = os.environ | {"STATE_DIR": str(up.state)}
        key = subprocess.run([sys.executable, "-m", "services.local", "key", "other"], cwd=ROOT, env=env,
                             capture_output=True, text=True, check=True).stdout.strip()
        other = openai.OpenAI(base_url=up.base + "/v1", api_key=key, max_retries=0)
        for call in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(file)
        assert file not in [f.id for f in other.files.list()]
        with pytest.raises(openai.NotFoundError) as caught:
            other.fine_tuning.jobs.create(model=MODEL, training_file=file)
        assert caught.value.param == "training_file"
        up.sdk.files.delete(file)

    @pytest.mark.parametrize("path", ["file-../../secrets/gateway/worker_token", "..%2f..%2fapi_key", "file-" + "0" * 24])
    def test_no_name_becomes_a_path(self, up: Up, path: str) -> None:
        answer = httpx.get(f"{up.base}/v1/files/{path}/content", headers={"authorization": f"Bearer {up.key}"})
        assert answer.status_code == 404
        assert answer.json()["error"]["message"]

    def test_without_a_key_nothing(self, up: Up) -> None:
        for path in ("/v1/files", "/v1/fine_tuning/jobs"):
            assert httpx.get(up.base + path).status_code == 401

    def test_bad_uploads_say_what_is_wrong(self, up: Up) -> None:
        with pytest.raises(openai.BadRequestError, match="purpose"):
            up.sdk.files.create(file=("a", b"x"), purpose="assistants")
        with pytest.raises(openai.BadRequestError, match="empty"):
            up.sdk.files.create(file=("a", b""), purpose="batch")

    def test_an_upload_cut_in_the_middle_leaves_nothing(self, up: Up) -> None:
        def half() -> Iterator[bytes]:
            yield b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 3_000_000
            raise ConnectionError

        before = len(list(up.sdk.files.list()))
        with pytest.raises((ConnectionError, httpx.HTTPError)):
            httpx.post(f"{up.base}/v1/files", content=half(), headers={
                "authorization": f"Bearer {up.key}", "content-type": "multipart/form-data; boundary=b",
                "content-length": str(10_000_000)})
        time.sleep(1)
        assert len(list(up.sdk.files.list())) == before
        assert sum(path.is_file() for path in (up.state / "files").iterdir()) == before

    def test_too_large_is_refused_before_it_is_read(self, up: Up) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", up.port, timeout=5)
        connection.putrequest("POST", "/v1/files")
        for name, value in (("authorization", f"Bearer {up.key}"), ("content-type", "multipart/form-data; boundary=b"),
                            ("content-length", str(600 * 1024 * 1024))):
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == 413
        assert "MAX_FILE_BYTES" in json.load(answer)["error"]["message"]


class TestJobs:
    def test_a_bad_file_ends_failed_with_every_line(self, up: Up) -> None:
        rows = [*ROWS[:10], {"messages": []}, {"question": "q"}, "text"]
        found = ended(up, job(up, upload(up, rows)))
        assert found.status == "failed"
        assert found.fine_tuned_model is None
        assert (found.error.code, found.error.param) == ("invalid_training_file", "training_file")
        for line in (11, 12, 13):
            assert f"line {line}" in found.error.message
            assert any(f"line {line}," in message for message in messages(up, found.id))

    @pytest.mark.parametrize(("fields", "param"), [
        ({"model": "gpt-4o"}, "model"),
        ({"training_file": "file-nope"}, "training_file"),
        ({"suffix": "../x"}, "suffix"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}}, None),
        ({"seed": -1}, "seed"),
    ])
    def test_bad_jobs_say_what_is_wrong(self, up: Up, fields: dict, param: str | None) -> None:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
            up.sdk.fine_tuning.jobs.create(**{"model": MODEL, "training_file": "file-" + "0" * 24, **fields})
        assert param is None or caught.value.param == param

    def test_from_file_to_model(self, up: Up) -> None:
        """Nobody's request to the base model fails meanwhile, and what it says stays the same."""
        before = up.ask("What is the capital of France?").choices[0].message.content
        stop, outcome = threading.Event(), {"asked": 0, "failed": 0, "changed": 0}

        def keep_asking() -> None:
            while not stop.is_set():
                outcome["asked"] += 1
                try:
                    said = up.ask("What is the capital of France?").choices[0].message.content
                    outcome["changed"] += said != before
                except openai.APIError:
                    outcome["failed"] += 1
                time.sleep(2)

        asking = threading.Thread(target=keep_asking)
        asking.start()
        try:
            job_id = job(up, upload(up, ROWS[:24]), epochs=3, suffix="tiny", metadata={"who": "test"})
            found = ended(up, job_id)
            assert found.status == "succeeded", messages(up, job_id)[:5]
            name = found.fine_tuned_model
            assert name.startswith(f"ft:{MODEL}:tiny:")
            assert name in [model.id for model in up.sdk.models.list()]
            for seed in range(8):  # on every worker
                up.sdk.chat.completions.create(model=name, messages=[{"role": "user", "content": f"{seed}?"}], max_tokens=4)
        finally:
            stop.set()
            asking.join()
        assert 'owngpt_training_jobs_total{status="succeeded"} 1.0' in trainer_metrics(up)
        assert outcome["failed"] == 0
        assert outcome["changed"] == 0, outcome
        assert outcome["asked"] > 5
        assert found.trained_tokens > 0
        assert found.hyperparameters.n_epochs == 3
        assert isinstance(found.hyperparameters.batch_size, int)
        assert found.model_extra is not None
        csv = up.sdk.files.content(found.result_files[0]).read().decode().splitlines()
        assert csv[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
        points = [strict(point) for point in up.sdk.fine_tuning.jobs.checkpoints.list(job_id)]
        assert [p.step_number for p in points] == sorted((p.step_number for p in points), reverse=True)
        assert points[0].metrics.full_valid_loss > 0
        assert any("token ids are the same" in message for message in messages(up, job_id))
        assert any(message.startswith("as served: ") for message in messages(up, job_id))
        assert [strict(j).id for j in up.sdk.fine_tuning.jobs.list(metadata={"who": "test"})] == [job_id]

    def test_base_and_tuned_in_one_batch_do_not_mix(self, up: Up) -> None:
        """vLLM's own CPU code would give base requests the last slot's adapter (docs/decisions/0006)."""
        name = next(m.id for m in up.sdk.models.list() if m.id.startswith("ft:"))
        question = "Which port does OwnGPT listen on?"

        def ask(model: str) -> str:
            answer = up.sdk.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=12,
                extra_headers={"cache-control": "no-store"})
            return answer.choices[0].message.content

        alone = {model: ask(model) for model in (MODEL, name)}
        assert alone[MODEL] != alone[name]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            models = [MODEL, name] * 8
            together = list(pool.map(ask, models))
        for model, said in zip(models, together, strict=True):
            other = alone[name if model == MODEL else MODEL]
            assert said != other, "an answer of the other model"

    def test_an_alias_is_switched_and_rolled_back(self, up: Up) -> None:
        name = next(m.id for m in up.sdk.models.list() if m.id.startswith("ft:"))
        http = httpx.Client(base_url=up.base + "/v1/aliases", headers={"authorization": f"Bearer {up.key}"}, timeout=10)

        def answering(expected: str) -> None:
            def check() -> bool:
                answers = [up.sdk.chat.completions.create(
                    model="helper", messages=[{"role": "user", "content": f"{n}?"}], max_tokens=2, stream=True,
                    extra_headers={"cache-control": cache}) for n, cache in enumerate(("no-store", "no-cache") * 2)]
                return {part.model for answer in answers for part in answer} == {expected}
            wait_for(check, f"helper is {expected}", 10)

        with pytest.raises(openai.NotFoundError):
            up.sdk.chat.completions.create(model="helper", messages=[{"role": "user", "content": "?"}], max_tokens=2)
        assert http.put("/helper", json={"model": MODEL}).json()["model"] == MODEL
        answering(MODEL)
        assert http.put("/helper", json={"model": name}).json()["previous"] == MODEL
        answering(name)
        assert "helper" in [m.id for m in up.sdk.models.list()]
        with pytest.raises(openai.BadRequestError, match="helper"):
            up.sdk.models.delete(name)
        for expected in (MODEL, name, MODEL):
            assert http.post("/helper/rollback").json()["model"] == expected
            answering(expected)
        for bad, body, status in (("Helper", {"model": MODEL}, 400), ("x", {"model": "gpt-4"}, 404), (MODEL, {"model": name}, 400)):
            assert http.put(f"/{bad}", json=body).status_code == status
        assert http.get(up.base + "/v1/aliases").json()["data"][0]["id"] == "helper"
        assert http.get("/").json()["error"]["message"]
        assert http.delete("/helper").json()["deleted"]
        wait_for(lambda: "helper" not in [m.id for m in up.sdk.models.list()], "gone", 5)
        assert http.post("/helper/rollback").status_code == 404

    def test_merged_it_says_the_same(self, up: Up, tmp_path: Path) -> None:
        """A plain checkpoint folder, for everything that knows no adapters."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        adapter = next(path for path in (up.state / "adapters").iterdir() if path.name.startswith("ftjob-"))
        base = up.state / "models" / MODEL
        command = [sys.executable, "-m", "services.trainer.export", str(base), str(adapter), str(tmp_path / "merged")]
        subprocess.run(command, cwd=ROOT, check=True)
        again = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        assert again.returncode == 1
        assert "exists already" in again.stderr
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "merged").iterdir()}
        ids = torch.arange(100, 140)[None]
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            untuned = plain(ids).logits.log_softmax(-1)
            tuned = PeftModel.from_pretrained(plain, str(adapter))(ids).logits.log_softmax(-1)
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits.log_softmax(-1)
        # what bf16 rounding does to the merged weights is small beside what the adapter does
        assert (merged - tuned).abs().mean() < 0.2 * (untuned - tuned).abs().mean()

    def test_a_new_worker_comes_up_with_it(self, up: Up) -> None:
        name = next(m.id for m in up.sdk.models.list() if m.id.startswith("ft:"))
        pid = up.engine_pids()[0]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: up.ready() == 1, "one gone", 30)
        wait_for(lambda: up.ready() == 2, "back", 200)

        def changes() -> int:
            return sum((up.state / f"logs/worker-{n}.log").read_text().count('"adapter changed"') for n in (1, 2))

        wait_for(lambda: changes() >= 3, "the adapter loaded there", 30)  # a worker is announced before its adapters are
        assert up.sdk.chat.completions.create(model=name, messages=[{"role": "user", "content": "?"}], max_tokens=2)

    def test_backed_up_while_it_runs(self, up: Up) -> None:
        """What is in it, `TestBackup` sees, on a machine that has nothing else."""
        name = next(m.id for m in up.sdk.models.list() if m.id.startswith("ft:"))
        alias = httpx.put(f"{up.base}/v1/aliases/kept", headers={"authorization": f"Bearer {up.key}"}, json={"model": name})
        assert alias.status_code == 200
        time.sleep(1)  # the last records are added up
        BACKUP["state"], BACKUP["model"] = up.kept(), name
        archive = up.state.parent / "backup.tar.gz"
        command = [sys.executable, "-m", "services.local", "backup", str(archive)]
        env = os.environ | {"STATE_DIR": str(up.state)}
        subprocess.run(command, cwd=ROOT, env=env, check=True)
        assert oct(archive.stat().st_mode)[-3:] == "600"
        again = subprocess.run(command, cwd=ROOT, env=env, check=False, capture_output=True, text=True)
        assert again.returncode == 1
        assert "is there already" in again.stderr
        assert not list(up.state.glob("*.partial"))
        httpx.delete(f"{up.base}/v1/aliases/kept", headers={"authorization": f"Bearer {up.key}"})

    def test_deleted_it_is_gone_everywhere(self, up: Up) -> None:
        name = next(m.id for m in up.sdk.models.list() if m.id.startswith("ft:"))
        with pytest.raises(openai.NotFoundError):
            up.sdk.models.delete(MODEL)
        assert strict(up.sdk.models.delete(name)).deleted
        wait_for(lambda: name not in [m.id for m in up.sdk.models.list()], "gone", 10)
        with pytest.raises(openai.NotFoundError):
            up.sdk.chat.completions.create(model=name, messages=[{"role": "user", "content": "?"}], max_tokens=2)

    def test_a_killed_trainer_goes_on_where_it_was(self, up: Up) -> None:
        job_id = job(up, upload(up, ROWS[:24]), epochs=2)
        wait_for(lambda: len(up.sdk.fine_tuning.jobs.checkpoints.list(job_id).data) >= 1, "a checkpoint", PATIENCE_S)
        os.kill(up.program_pid("trainer"), signal.SIGKILL)
        found = ended(up, job_id)
        assert found.status == "succeeded", messages(up, job_id)[:5]
        assert any(m.startswith("going on from step") for m in messages(up, job_id))
        up.sdk.models.delete(found.fine_tuned_model)

    def test_pause_resume_cancel(self, up: Up) -> None:
        job_id = job(up, upload(up, ROWS[:60]), epochs=20)
        wait_for(lambda: any(m.startswith("Step 2/") for m in messages(up, job_id)), "step 2", PATIENCE_S)
        waiting = job(up, upload(up, ROWS[:20]))
        ended(up, waiting, "queued")
        assert up.sdk.fine_tuning.jobs.cancel(waiting).status == "cancelled"
        up.sdk.fine_tuning.jobs.pause(job_id)
        wait_for(lambda: up.sdk.fine_tuning.jobs.retrieve(job_id).paused, "paused", PATIENCE_S)
        assert strict(up.sdk.fine_tuning.jobs.retrieve(job_id)).status == "queued"  # OpenAI's types have no word for it
        with pytest.raises(openai.BadRequestError, match="paused"):
            up.sdk.fine_tuning.jobs.pause(job_id)
        up.sdk.fine_tuning.jobs.resume(job_id)
        wait_for(lambda: any(m.startswith("going on from step") for m in messages(up, job_id)), "resumed", PATIENCE_S)
        up.sdk.fine_tuning.jobs.cancel(job_id)
        assert ended(up, job_id).status == "cancelled"
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            up.sdk.fine_tuning.jobs.resume(job_id)


BACKUP: dict[str, Any] = {}


def chat(name: str, text: str, **fields: object) -> dict:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 4, **fields}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


class TestBatches:
    def begin(self, up: Up, rows: list, endpoint: str = "/v1/chat/completions") -> Batch:
        file = up.sdk.files.create(file=("in.jsonl", jsonl(rows)), purpose="batch")
        made = up.sdk.batches.create(
            input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"who": "test"})
        assert strict(made).status in ("validating", "in_progress")
        return made

    def over(self, up: Up, batch: Batch) -> Batch:
        states = ("completed", "failed", "cancelled", "expired")
        wait_for(lambda: up.sdk.batches.retrieve(batch.id).status in states, "the batch's end", PATIENCE_S)
        return strict(up.sdk.batches.retrieve(batch.id))

    def results(self, up: Up, file_id: str | None) -> dict[str, dict]:
        assert file_id is not None
        assert strict(up.sdk.files.retrieve(file_id)).purpose == "batch_output"
        lines = [json.loads(line) for line in up.sdk.files.content(file_id).text.splitlines()]
        assert len({line["custom_id"] for line in lines}) == len(lines)
        return {line["custom_id"]: line for line in lines}

    def test_good_and_bad_requests(self, up: Up) -> None:
        rows = [*(chat(f"good {n}", f"Count to {n}.") for n in range(20)), chat("bad", "x", temperature=-1)]
        done = self.over(up, self.begin(up, rows))
        assert done.status == "completed"
        assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (21, 20, 1)
        good, bad = self.results(up, done.output_file_id), self.results(up, done.error_file_id)
        assert good.keys() == {f"good {n}" for n in range(20)}
        assert good["good 3"]["response"]["body"]["choices"][0]["message"]["content"]
        assert bad["bad"]["response"]["status_code"] == 400
        assert done.usage.output_tokens == sum(g["response"]["body"]["usage"]["completion_tokens"] for g in good.values())
        assert done.id in [batch.id for batch in up.sdk.batches.list(limit=1)]
        wait_for(lambda: sum(done.id in record for record in up.records()) == 20, "every answer metered", 10)

    def test_completions(self, up: Up) -> None:
        rows = [{"custom_id": str(n), "method": "POST", "url": "/v1/completions",
                 "body": {"model": MODEL, "prompt": f"{n},", "max_tokens": 2}} for n in range(5)]
        done = self.over(up, self.begin(up, rows, "/v1/completions"))
        assert self.results(up, done.output_file_id).keys() == {"0", "1", "2", "3", "4"}

    def test_responses_are_results_and_nothing_else(self, up: Up) -> None:
        first = up.sdk.responses.create(model=MODEL, input="My name is Ada.", max_output_tokens=4)
        rows = [{"custom_id": str(n), "method": "POST", "url": "/v1/responses", "body": {
            "model": MODEL, "input": f"{n},", "max_output_tokens": 4, **({"previous_response_id": first.id} if n == 2 else {})}}
            for n in range(3)]
        done = self.over(up, self.begin(up, rows, "/v1/responses"))
        said = {name: line["response"]["body"] for name, line in self.results(up, done.output_file_id).items()}
        assert said.keys() == {"0", "1", "2"}
        assert said["2"]["previous_response_id"] == first.id
        assert done.usage.output_tokens == sum(body["usage"]["output_tokens"] for body in said.values())
        with pytest.raises(openai.NotFoundError):  # the batch keeps it
            up.sdk.responses.retrieve(said["2"]["id"])

    def test_a_model_without_embeddings_says_so_line_by_line(self, up: Up) -> None:
        rows = [{"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"model": MODEL, "input": "x"}}]
        done = self.over(up, self.begin(up, rows, "/v1/embeddings"))
        assert self.results(up, done.error_file_id)["e"]["response"]["body"]["error"]["message"]

    def test_bad_lines_fail_it_by_their_numbers(self, up: Up) -> None:
        done = self.over(up, self.begin(up, [chat("a", "x"), chat("a", "y"), chat("c", "z", model="gpt-4")]))
        assert done.status == "failed"
        assert [(error.line, error.code) for error in done.errors.data] == [(2, "duplicate_custom_id"), (3, "model_not_found")]

    def test_cancelled_it_keeps_what_is_done(self, up: Up) -> None:
        made = self.begin(up, [chat(str(n), f"Tell me about {n}.", max_tokens=60) for n in range(300)])
        wait_for(lambda: up.sdk.batches.retrieve(made.id).request_counts.completed > 3, "some", PATIENCE_S)
        assert strict(up.sdk.batches.cancel(made.id)).status == "cancelling"
        done = self.over(up, made)
        assert done.status == "cancelled"
        assert 3 < len(self.results(up, done.output_file_id)) == done.request_counts.completed < 300
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            up.sdk.batches.cancel(made.id)

    def test_killed_in_the_middle_every_line_is_answered_and_billed_once(self, up: Up) -> None:
        made = self.begin(up, [chat(str(n), f"Say {n}.") for n in range(120)])
        sdk = up.sdk.with_options(max_retries=10)
        for at in (20, 50, 80):
            wait_for(lambda at=at: sdk.batches.retrieve(made.id).request_counts.completed >= at, f"{at}", PATIENCE_S)
            os.kill(up.program_pid("jobs"), signal.SIGKILL)
            wait_for(lambda: httpx.get(up.base + "/v1/files", headers={"authorization": f"Bearer {up.key}"}).status_code == 200, "jobs back", 60)
        done = self.over(up, made)
        assert self.results(up, done.output_file_id).keys() == {str(n) for n in range(120)}
        billed = [json.loads(record) for record in up.records() if made.id in record]
        ours = [record["request_id"] for record in billed if record["outcome"] == "ok" and record["key"] != HOUSE]
        assert sorted(ours) == sorted({f"{made.id}-{n}" for n in range(1, 121)})

    def test_when_its_time_is_over_the_rest_is_expired(self, up: Up) -> None:
        made = self.begin(up, [chat(str(n), f"Tell me about {n}.", max_tokens=60) for n in range(300)])
        wait_for(lambda: up.sdk.batches.retrieve(made.id).request_counts.completed > 3, "some", PATIENCE_S)
        with contextlib.closing(sqlite3.connect(up.state / "jobs.db", timeout=30)) as jobs:  # what a day does
            jobs.execute("UPDATE batches SET expires_at = ? WHERE id = ?", (int(time.time()), made.id))
            jobs.commit()
        os.kill(up.program_pid("jobs"), signal.SIGKILL)
        wait_for(lambda: httpx.get(up.base + "/v1/files", headers={"authorization": f"Bearer {up.key}"}).status_code == 200, "jobs back", 60)
        done = self.over(up, made)
        assert done.status == "expired"
        good, bad = self.results(up, done.output_file_id), self.results(up, done.error_file_id)
        assert len(good) > 3
        assert good.keys() | bad.keys() == {str(n) for n in range(300)}
        assert {line["error"]["code"] for line in bad.values()} == {"batch_expired"}


class TestBackup:
    def test_restored_on_a_machine_that_has_nothing(self, up: Up) -> None:
        up.launcher.send_signal(signal.SIGINT)
        up.launcher.wait(60)
        state = up.state.parent / "restored"
        command = [sys.executable, "-m", "services.local", "restore", str(up.state.parent / "backup.tar.gz")]
        env = os.environ | {"STATE_DIR": str(state)}
        subprocess.run(command, cwd=ROOT, env=env, check=True)
        again = subprocess.run(command, cwd=ROOT, env=env, check=False, capture_output=True, text=True)
        assert again.returncode == 1
        assert "STATE_DIR" in again.stderr
        (state / "models").mkdir(exist_ok=True)
        (state / "models" / MODEL).symlink_to(up.state / "models" / MODEL)  # the bundled one, unpacked already
        restored = Up(state, 1)
        try:
            assert restored.key == up.key
            wait_for(lambda: BACKUP["model"] in [m.id for m in restored.sdk.models.list()], "the tuned model", 60)
            assert restored.kept() == BACKUP["state"]
            for model in (BACKUP["model"], "kept"):
                assert restored.sdk.chat.completions.create(model=model, messages=[{"role": "user", "content": "?"}], max_tokens=2)
        finally:
            restored.launcher.send_signal(signal.SIGINT)
            restored.launcher.wait(60)
