"""One engine by itself, as the stack would start it, and what a gate asks it."""

import contextlib
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from common.tie import tie_to_parent
from services.local.errors import UserError
from services.local.plan import ROOT
from services.worker.settings import WorkerSettings

NAME = "measured"
START_TIMEOUT_S = 1800.0
ASK_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
TOP = 20
"""Tokens whose probability is asked for at each position: vLLM's own bound."""
ANSWER_TOKENS = 64
SPEED_TOKENS = 64
SPEED_ROUNDS = 3
SPEED_PROMPT = "Once upon a time there was a king who had three sons, and each of them wished to see the world. "


class Engine(NamedTuple):
    """One that answers."""

    http: httpx.Client
    load_s: float
    """From its start until it could answer."""


@contextlib.contextmanager
def alone(told: Mapping[str, str], *, cuda: bool, log: Path) -> Iterator[Engine]:
    """Start it as a worker that is told so (`places.environment`), and end it afterwards.

    What the shell says to workers is not meant for this one. Raises UserError with the end of its log when it does not
    come up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key = secrets.token_urlsafe(24)
    ours = {"SERVED_MODEL_NAME": NAME, "ACCELERATOR": "cuda" if cuda else "cpu", "ENGINE_PORT": str(port)}
    ours |= {"VLLM_API_KEY": key, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    names = {name.upper() for name in WorkerSettings.model_fields}
    env = {name: value for name, value in os.environ.items() if name not in names} | dict(told) | ours
    began = time.monotonic()
    headers = {"authorization": f"Bearer {key}"}
    with (
        open(log, "wb") as out,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=ASK_TIMEOUT_S, headers=headers) as http,
    ):
        command = [sys.executable, "-m", "services.worker.alone"]
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, preexec_fn=tie_to_parent, process_group=0
        )
        try:
            _await(http, process, log, began)
            yield Engine(http, round(time.monotonic() - began, 1))
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            with contextlib.suppress(ProcessLookupError):  # its own children, should any be left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _await(http: httpx.Client, process: subprocess.Popen[bytes], log: Path, began: float) -> None:
    while time.monotonic() - began < START_TIMEOUT_S:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if http.get("/health").is_success:
                return
        time.sleep(0.2)
    raise UserError(f"The engine did not start (status {process.poll()}). The end of {log}:\n{end_of(log)}")


def end_of(log: Path) -> str:
    """Its last lines."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-8:])


def longest(engine: Engine) -> int:
    """Tokens in its longest sequence."""
    return int(engine.http.get("/v1/models").raise_for_status().json()["data"][0]["max_model_len"])


def tokens(engine: Engine, row: dict[str, Any], limit: int) -> list[int]:
    """A row's tokens, as the engine's own tokenizer and chat template make them."""
    asked = {"prompt": row["text"]} if "text" in row else {"messages": row["messages"], "add_generation_prompt": False}
    answer = engine.http.post("/tokenize", json={"model": NAME, **asked}).raise_for_status()
    found: list[int] = answer.json()["tokens"]
    return found[:limit]


def logprobs(engine: Engine, ids: Sequence[int]) -> list[dict[int, float]]:
    """At each position but the first: log-probabilities in nats of the TOP most likely tokens, and of the one there."""
    asked = {"model": NAME, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP}
    answer = engine.http.post("/v1/completions", json=asked).raise_for_status()
    said = answer.json()["choices"][0]["prompt_logprobs"][1:]
    return [{int(token): float(one["logprob"]) for token, one in place.items()} for place in said]


def greedy(engine: Engine, ids: Sequence[int]) -> list[int]:
    """The tokens it goes on with."""
    asked = {
        "model": NAME,
        "prompt": list(ids),
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "return_token_ids": True,
    }
    found: list[int] = (
        engine.http.post("/v1/completions", json=asked).raise_for_status().json()["choices"][0]["token_ids"]
    )
    return found


def tokens_per_s(engine: Engine, concurrent: int) -> float:
    """The median of SPEED_ROUNDS, after one to warm up."""
    return round(statistics.median([one_round(engine, concurrent) for _ in range(SPEED_ROUNDS + 1)][1:]), 1)


def one_round(engine: Engine, concurrent: int) -> float:
    """Tokens a second of so many clients, one answer each, all of one length."""

    def ask(number: int) -> int:
        prompt = f"{number} {time.monotonic_ns()} {SPEED_PROMPT * 4}"
        asked = {"model": NAME, "prompt": prompt, "max_tokens": SPEED_TOKENS, "ignore_eos": True, "temperature": 0}
        return int(
            engine.http.post("/v1/completions", json=asked).raise_for_status().json()["usage"]["completion_tokens"]
        )

    began = time.monotonic()
    with ThreadPoolExecutor(concurrent) as pool:
        return sum(pool.map(ask, range(concurrent))) / (time.monotonic() - began)
