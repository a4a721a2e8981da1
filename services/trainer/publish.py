"""From a finished run to a model that workers serve: the gate, then an immutable folder, then the registry."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import msgspec
from redis import Redis

from common import engines
from common.adapters import Adapter, read_registry
from common.files import sync_folder
from common.redis.names import ADAPTERS, WORKERS, worker_key
from common.workers import Heartbeat

WORKER_PATIENCE_S = 1800.0
"""As long as a worker may take to start."""
LOAD_PATIENCE_S = 60.0
FILES = ("adapter_config.json", "adapter_model.safetensors")


class Refused(Exception):
    """The tuned model is not published. `code` and the text are the job's error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def check_loss(result: dict[str, float]) -> None:
    """The tuned model is no worse than its base on the validation split. Raises Refused."""
    tuned, base = result["valid_loss"], result["base_valid_loss"]
    if not tuned <= base:  # also a NaN
        raise Refused(
            "worse_than_base",
            f"The tuned model's validation loss is {tuned:.4f}, the base model's {base:.4f}: it got worse and is not "
            "published. A lower learning_rate_multiplier or fewer n_epochs may help; more data helps most.",
        )


def check_tokens(
    prompts: Iterable[dict[str, Any]], address: str, base: str, token: str, still: Callable[[], None]
) -> int:
    """What was trained on is what the server sends to the model, token by token. Returns how many were compared.

    `prompts`: {"messages", "tools", "tokens"}; `address`: a worker's. `still()` is called before each.
    Raises Refused, or httpx.HTTPError when the worker does not answer.
    """
    compared = 0
    with httpx.Client(base_url=f"http://{address}", headers={"authorization": f"Bearer {token}"}, timeout=10) as http:
        for prompt in prompts:
            still()
            answer = http.post(
                "/tokenize",
                json={
                    "model": base,
                    "messages": prompt["messages"],
                    "add_generation_prompt": True,
                }
                | ({"tools": prompt["tools"]} if prompt["tools"] else {}),
            )
            if 400 <= answer.status_code < 500:
                raise Refused("not_rendered", f"The server does not render a validation prompt: {answer.text[:300]}")
            if (served := answer.raise_for_status().json()["tokens"]) != prompt["tokens"]:
                at = next(
                    (i for i, (a, b) in enumerate(zip(served, prompt["tokens"], strict=False)) if a != b),
                    min(len(served), len(prompt["tokens"])),
                )
                raise Refused(
                    "tokens_differ",
                    f"The trainer and the server render the same messages differently, from token {at} on (served "
                    f"{served[at : at + 5]}, trained {prompt['tokens'][at : at + 5]}): the chat templates differ.",
                )
            compared += 1
    return compared


def ready_workers(redis: Redis, model: str) -> list[Heartbeat]:
    """Workers that are ready and serve a model, with an engine that can have adapters."""
    ids = sorted(redis.smembers(WORKERS))
    beats = [
        msgspec.json.decode(raw, type=Heartbeat)
        for raw in (redis.mget([worker_key(str(i)) for i in ids]) if ids else [])
        if raw
    ]
    able = [beat for beat in beats if beat.state == "ready" and beat.engine not in engines.LIMITED]
    return [beat for beat in able if any(m.id == model for m in beat.models)]


def await_worker(redis: Redis, model: str, still: Callable[[], None]) -> Heartbeat:
    """A worker that serves a model. `still()` is called again and again. Raises Refused after WORKER_PATIENCE_S."""
    deadline = time.monotonic() + WORKER_PATIENCE_S
    while not (workers := ready_workers(redis, model)):
        if time.monotonic() > deadline:
            raise Refused("no_worker", f"No worker was ready within {WORKER_PATIENCE_S:g} s to check the model with.")
        still()
        time.sleep(0.5)
    return workers[0]


def place(source: Path, folder: Path) -> str:
    """Copy an adapter to where workers read it, all of it or nothing. Returns its digest."""
    digest = hashlib.sha256()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, mode=0o755)
    for name in FILES:
        data = (source / name).read_bytes()
        digest.update(data)
        with open(partial / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        (partial / name).chmod(0o644)
    if not folder.exists():  # else a crash came between this and the registry: the run is the same
        sync_folder(partial)
        os.rename(partial, folder)
        sync_folder(folder.parent)
    shutil.rmtree(partial, ignore_errors=True)
    return digest.hexdigest()


def register(redis: Redis, adapter: Adapter) -> None:
    """From now on every worker loads it. Raises Refused when the name was ever used for something else."""
    if not redis.hsetnx(ADAPTERS, adapter.name, msgspec.json.encode(adapter)):
        known = msgspec.json.decode(redis.hget(ADAPTERS, adapter.name) or b"null", type=Adapter | None)
        if known is None or known.digest != adapter.digest:
            raise Refused("name_taken", f"There is another model with the name {adapter.name!r}.")


def withdraw(redis: Redis, name: str, folder: str) -> None:
    """Take back what `register` did, if it did. Raises RedisError."""
    known = read_registry({name: raw}).get(name) if (raw := redis.hget(ADAPTERS, name)) else None
    if known is not None and known.folder == folder:
        redis.hdel(ADAPTERS, name)


def wait_until_served(redis: Redis, adapter: Adapter, still: Callable[[], None]) -> int:
    """Until every worker that is ready has it, or LOAD_PATIENCE_S have passed. Returns how many have it.

    `still()` is called again and again. Raises Refused when no worker could load it.
    """
    deadline = time.monotonic() + LOAD_PATIENCE_S
    while True:
        have, ready = len(ready_workers(redis, adapter.name)), len(ready_workers(redis, adapter.base))
        if (have and have >= ready) or time.monotonic() > deadline:
            break
        still()
        time.sleep(0.1)
    if not have:
        raise Refused("not_loaded", "No worker could load the tuned model; the workers' logs say why.")
    return have
