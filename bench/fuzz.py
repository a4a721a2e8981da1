"""Every public route, fuzzed out of the OpenAPI document by schemathesis, against a running stack with a real engine.

What counts: an answer of 5xx, or an answer to somebody who may not have it. Each case is asked with a key, and
without one; what one key has made is asked for by another.
"""

import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import random
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import openai
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

from services.local.plan import ROOT

DOCUMENT = ROOT / "nginx/console/openapi.json"
OPEN = ("/health", "/ready")
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
MOST = dict.fromkeys(LENGTHS, 2) | {"n": 2, "best_of": 2, "min_tokens": 1}
KNOWN_MODEL = 0.9
"""Share of the requests that name a model which is there."""
_CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _CHAT, "/v1/messages": _CHAT, "/v1/messages/count_tokens": _CHAT,
    "/v1/completions": {"prompt": "Hi"}, "/v1/responses": {"input": "Hi"}, "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 2]}, "/v1/embeddings": {"input": "Hi"}, "/v1/classify": {"input": "Hi"},
    "/v1/pooling": {"input": "Hi"}, "/v1/rerank": {"query": "Hi", "documents": ["a", "b"]},
    "/v1/score": {"text_1": "Hi", "text_2": "Ho"},
}
NEARLY_RIGHT = 0.5
"""Share of generation requests that are right but for at most two fields."""
NOT_NOW = 503
"""With a `Retry-After` it is an answer. Any other 5xx is a fault."""
PROCESSES = 3


class Answer(Protocol):
    """What schemathesis and requests have in common."""

    status_code: int
    headers: Any

    @property
    def text(self) -> str: ...


@dataclass
class Found:
    """What a fuzz run saw."""

    cases: int = 0
    server_errors: list[str] = field(default_factory=list)
    holes: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def note(self, case: str, answer: Answer) -> None:
        """One answer."""
        self.cases += 1
        self.statuses[answer.status_code] += 1
        if answer.status_code >= 500 and not (answer.status_code == NOT_NOW and "retry-after" in answer.headers):
            self.server_errors.append(f"{answer.status_code} {case}: {answer.text[:200]}")

    def add(self, other: "Found") -> None:
        """What another process saw."""
        self.cases += other.cases
        self.server_errors += other.server_errors
        self.holes += other.holes
        self.statuses += other.statuses


def fuzz(base: str, key: str, model: str, examples: int) -> Found:
    """`examples` cases of each operation that should be taken, and half as many that should not."""
    found, work = Found(), functools.partial(_operation, base=base, key=key, model=model, examples=examples)
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        for one in pool.map(work, range(len(operations()))):
            found.add(one)
    return found


def operations() -> list[Any]:
    """Every operation of the document."""
    schema = schemathesis.openapi.from_dict(json.loads(DOCUMENT.read_text()))
    return [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]  # it is our own document


def _operation(number: int, *, base: str, key: str, model: str, examples: int) -> Found:
    warnings.simplefilter("ignore")
    operation, found = operations()[number], Found()
    with requests.Session() as session:
        for mode, count in ((GenerationMode.POSITIVE, examples), (GenerationMode.NEGATIVE, examples // 2)):
            _cases(session, operation, mode, count, base, key, model, found)
    return found


def _cases(
    session: requests.Session, operation: Any, mode: GenerationMode, count: int, base: str, key: str, model: str,
    found: Found,
) -> None:
    label = operation.label

    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck), verbosity=Verbosity.quiet)
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        _make_answerable(case, model)
        case.headers = {name: value for name, value in (case.headers or {}).items()
                        if name.lower() not in ("authorization", "x-api-key")}
        session.headers["authorization"] = f"Bearer {key}"
        found.note(label, case.call(base_url=base, session=session, timeout=120))
        del session.headers["authorization"]
        unknown = case.call(base_url=base, session=session, timeout=120)
        found.note(label, unknown)
        if unknown.status_code < 400 and not label.endswith(OPEN):
            found.holes.append(f"{label}: {unknown.status_code} without a key")

    with contextlib.suppress(Unsatisfiable):  # nothing can be wrong about an operation without any input
        run()


def _make_answerable(case: Any, model: str) -> None:
    """A request that is right is answered by a real engine: in a few tokens."""
    if not isinstance(case.body, dict):
        return
    right = RIGHT.get(case.path)
    if right is not None and random.random() < NEARLY_RIGHT:
        odd = random.sample(sorted(case.body), min(len(case.body), random.randint(0, 2)))
        case.body = {**right, "model": model, **{name: case.body[name] for name in odd if name not in right}}
    if isinstance(case.body.get("model"), str) and random.random() < KNOWN_MODEL:
        case.body["model"] = model
    for name, most in MOST.items():
        if isinstance(case.body.get(name), int) and case.body[name] > most:
            case.body[name] = most
    if all(case.body.get(name) is None for name in LENGTHS):
        case.body["max_output_tokens" if "responses" in case.path else "max_tokens"] = 2


def make_things(base: str, key: str, model: str) -> dict[str, str]:
    """One of everything that belongs to a key: path parameter -> id."""
    sdk = openai.OpenAI(base_url=base + "/v1", api_key=key, max_retries=0)
    line = {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"model": model, "prompt": "x", "max_tokens": 1}}
    rows = b"".join(b'{"question": "What is %d?", "answer": "It is %d."}\n' % (n, n) for n in range(12))
    file = sdk.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
    training = sdk.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(model=model, training_file=training.id)
    batch = sdk.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    requests.put(f"{base}/v1/aliases/mine", headers={"authorization": f"Bearer {key}"}, json={"model": model}, timeout=60).raise_for_status()
    response = sdk.responses.create(model=model, input="x", max_output_tokens=2)
    return {"file_id": file.id, "job_id": job.id, "batch_id": batch.id, "name": response.id, "alias": "mine"}


def trespass(base: str, mine: str, other: str, made: dict[str, str]) -> Found:
    """`other`, and somebody without a key, ask in every way there is for what `mine` has made: path parameter -> id."""
    found = Found()
    for path, verbs in sorted(json.loads(DOCUMENT.read_text())["paths"].items()):
        if path.startswith("/v1/models"):  # a model is everybody's
            continue
        path = path.replace("{name}", "{alias}") if path.startswith("/v1/aliases") else path
        names = [name for name in made if "{" + name + "}" in path]
        real = functools.reduce(lambda path, name: path.replace("{" + name + "}", made[name]), names, path)
        for verb in sorted(verbs, key=lambda verb: verb == "delete") if names else ():
            for action in ("cancel", "pause", "resume") if "{verb}" in real else ("",):
                _trespass(base, mine, other, verb, real.replace("{verb}", action), found)
    return found


def _trespass(base: str, mine: str, other: str, verb: str, path: str, found: Found) -> None:
    for who, key in (("another key", other), ("nobody", ""), ("", mine)):  # its owner last: it may be deleted
        headers = {"authorization": f"Bearer {key}"} if key else {}
        answer = requests.request(verb, base + path, headers=headers, json={}, timeout=60)
        found.note(f"{verb} {path}", answer)
        if who and answer.status_code < 400:
            found.holes.append(f"{verb} {path}: {answer.status_code} for {who}")
