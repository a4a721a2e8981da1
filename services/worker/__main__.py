"""The agent, a worker's entry process: `python -m services.worker`.

Starts the engine, waits until it is healthy, announces it several times a second, and on SIGTERM takes it out of
the table first, lets what runs finish, then stops it. When the engine dies the agent leaves and exits with 1, and
whoever supervises it starts both again.
"""

import asyncio
import contextlib
import ctypes
import os
import re
import secrets
import signal
import time
from hashlib import blake2b
from typing import Any

import httpx
import msgspec
from loguru import logger
from redis.asyncio import Redis
from redis.exceptions import RedisError

from common import logs
from common.adapters import Adapter, read_registry
from common.redis.connect import connect
from common.redis.names import ADAPTERS, CHANNEL_WORKERS, HEARTBEAT_TTL_MS, WORKERS, worker_key
from common.settings import read_settings
from common.tasks import end_tasks
from common.workers import Heartbeat, Model, State
from services.worker import engine, identity, shm
from services.worker.middleware import LOAD_PATH, WORKER_ID
from services.worker.settings import WorkerSettings

READ = [re.compile(rb"^vllm:%s\{[^}]*\} (\S+)" % name, re.M) for name in (
    b"iteration_tokens_total_count", b"num_requests_waiting", b"kv_cache_usage_perc",
    b"prompt_tokens_total", b"prompt_tokens_cached_total", b"generation_tokens_total",
)]
"""What heartbeats carry of the engine's metrics."""
METRICS_EVERY_S = 1.0
RECONCILE_EVERY_S = 1.0
RETRY_LOAD_S = 10.0
LOAD_TIMEOUT_S = 60.0
STOPPING_TTL_MS = 20_000
"""How long the engine may take to stop before gateways count what it ran as lost."""
PR_SET_PDEATHSIG = 1


class EngineDied(Exception):
    """The engine process ended by itself."""


class Agent:
    """One engine, watched and announced."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._redis: Redis = connect(settings)
        self._http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{settings.engine_port}",
            headers={"authorization": f"Bearer {settings.worker_token}"},
            timeout=1.0,
        )
        # A new id each start: what a former life left running can be settled at once.
        self._beat = Heartbeat(
            id=f"{settings.worker_name}-{secrets.token_hex(2)}", address=settings.address, state="ready",
            models=[], slots=settings.max_num_seqs, engine="vllm",
        )
        self._stopping = asyncio.Event()
        self._engine: asyncio.subprocess.Process | None = None
        self._steps = -1.0
        self._stepped_at = self._heard_at = time.monotonic()
        self._metrics_at = 0.0
        self._redis_ok = True
        self._adapters: dict[str, Model] = {}
        self._next_try: dict[str, float] = {}

    async def run(self) -> int:
        """Until told to stop (0) or the engine dies (1)."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        env = engine.environment(self._settings) | {WORKER_ID: self._beat.id}
        self._engine = await asyncio.create_subprocess_exec(
            *engine.command(self._settings), env=env, start_new_session=True, preexec_fn=_die_with_parent
        )
        logger.info("engine starting", worker=self._beat.id, pid=self._engine.pid, model=self._settings.model)
        try:
            await self._until_healthy()
            if not self._stopping.is_set():
                if self._settings.adapters_dir is not None:
                    await self._reconcile()  # first: a new worker comes up with every adapter
                    reconciling = asyncio.create_task(self._keep_reconciled())
                await self._announce()
                if self._settings.adapters_dir is not None:
                    await end_tasks([reconciling])
            await self._leave()
            return 0
        except EngineDied as error:
            logger.error("engine died", worker=self._beat.id, reason=str(error))
            return 1
        finally:
            with contextlib.suppress(RedisError, OSError):
                await self._publish("gone")
            await self._stop_engine()
            shm.sweep()
            # Only now: a gateway settles as lost whatever a worker without this key left running.
            with contextlib.suppress(RedisError, OSError):
                await self._redis.delete(worker_key(self._beat.id))
            await self._http.aclose()
            await self._redis.aclose()

    async def _until_healthy(self) -> None:
        started = time.monotonic()
        while not self._stopping.is_set():
            self._check_engine()
            with contextlib.suppress(httpx.HTTPError):
                if (await self._http.get("/health")).status_code == 200:
                    await self._read_models()
                    logger.info("engine ready", worker=self._beat.id, after_s=round(time.monotonic() - started, 1))
                    return
            if time.monotonic() - started > self._settings.start_timeout_s:
                raise EngineDied(f"not healthy after START_TIMEOUT_S={self._settings.start_timeout_s:g}")
            await asyncio.sleep(0.1)

    async def _read_models(self) -> None:
        listing = (await self._http.get("/v1/models")).raise_for_status().json()
        self._beat.models = [
            Model(
                id=entry["id"], max_model_len=entry.get("max_model_len") or 0, created=entry.get("created", 0),
                parent=entry.get("parent"), revision=await asyncio.to_thread(self._revision, entry),
            )
            for entry in listing["data"]
        ]

    def _revision(self, entry: dict[str, Any]) -> str:
        """What an answer of this model depends on: its files, and how the engine was told to run them."""
        try:
            digest = identity.model_digest(self._settings.model)
        except OSError as error:
            logger.warning("the model's files cannot be read; its answers are not cached", error=str(error))
            return ""
        if entry.get("parent"):
            digest += identity.adapter_digest(entry.get("root") or "").hex()
        return blake2b(f"{digest} {engine.shaping(self._settings)}".encode(), digest_size=16).hexdigest()

    async def _announce(self) -> None:
        """Heartbeats until told to stop."""
        self._stepped_at = self._heard_at = time.monotonic()
        while not self._stopping.is_set():
            self._check_engine()
            await self._observe()
            await self._publish(self._state())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._settings.heartbeat_s)

    async def _keep_reconciled(self) -> None:
        while True:
            await asyncio.sleep(RECONCILE_EVERY_S)
            try:
                await self._reconcile()
            except Exception:  # a bug here must not end the keeping
                logger.exception("adapters could not be compared with the registry")

    async def _reconcile(self) -> None:
        """Load what the registry has and the engine has not; unload what the registry has no more."""
        try:
            registry = read_registry(await self._redis.hgetall(ADAPTERS))
        except (RedisError, OSError):
            return  # the registry is as it was
        wanted = {name: adapter for name, adapter in registry.items() if adapter.base == self._settings.served_name}
        for name in self._adapters.keys() - wanted.keys():
            model = self._adapters.pop(name)  # from now on no gateway sends anything there
            self._beat.models = [m for m in self._beat.models if m.id != name]
            await asyncio.sleep(2 * self._settings.heartbeat_s)
            await self._engine_lora("unload", {"lora_name": model.id})
        for name, adapter in wanted.items():
            if name in self._adapters or self._next_try.get(name, 0.0) > time.monotonic():
                continue
            assert self._settings.adapters_dir is not None  # noqa: S101 - else nothing is reconciled
            path = str(self._settings.adapters_dir / adapter.folder)
            if await self._engine_lora("load", {"lora_name": name, "lora_path": path}):
                model = self._describe(adapter)
                self._adapters[name] = model
                self._beat.models = [*self._beat.models, model]
            else:
                self._next_try[name] = time.monotonic() + RETRY_LOAD_S

    def _describe(self, adapter: Adapter) -> Model:
        """An adapter as gateways hear of it."""
        base = self._beat.models[0]
        revision = f"{base.revision} {adapter.digest}"
        return Model(
            id=adapter.name, max_model_len=base.max_model_len, created=adapter.created, parent=base.id,
            revision=blake2b(revision.encode(), digest_size=16).hexdigest() if base.revision else "",
        )

    async def _engine_lora(self, verb: str, body: dict[str, str]) -> bool:
        """Have the engine load or unload an adapter. Returns whether it did."""
        log = logger.bind(verb=verb, adapter=body["lora_name"])
        started = time.monotonic()
        try:
            answer = await self._http.post(f"/v1/{verb}_lora_adapter", json=body, timeout=LOAD_TIMEOUT_S)
        except httpx.HTTPError as error:
            log.warning("adapter not changed", error=type(error).__name__)
            return False
        if answer.status_code == 200 or (verb == "load" and "already" in answer.text):
            log.info("adapter changed", took_s=round(time.monotonic() - started, 2))
            return True
        log.warning("adapter not changed", status=answer.status_code, text=answer.text[:500])
        return False

    async def _observe(self) -> None:
        """Ask the engine's process for its load, and now and then for its step counter."""
        now = time.monotonic()
        try:
            load = msgspec.json.decode((await self._http.get(LOAD_PATH)).content, type=dict[str, int])
            self._beat.in_flight, self._beat.interactive = load["in_flight"], load["interactive"]
            self._heard_at = time.monotonic()
            if now - self._metrics_at >= METRICS_EVERY_S:
                self._metrics_at = now
                self._read_metrics((await self._http.get("/metrics")).content)
        except httpx.HTTPError as error:
            logger.warning("engine does not answer", worker=self._beat.id, error=type(error).__name__)
        if self._beat.in_flight == 0:
            self._stepped_at = time.monotonic()

    def _read_metrics(self, text: bytes) -> None:
        steps, waiting, kv_use, prompt, cached, generated = (sum(map(float, p.findall(text))) for p in READ)
        if steps != self._steps:
            self._steps, self._stepped_at = steps, time.monotonic()
        beat = self._beat
        beat.waiting, beat.kv_use = int(waiting), kv_use
        beat.prompt_tokens, beat.cached_tokens, beat.generated_tokens = int(prompt), int(cached), int(generated)

    def _state(self) -> State:
        """Stalled: the server's process is silent, or requests run while the engine makes no step (vLLM #39863)."""
        now = time.monotonic()
        silent = now - self._heard_at > self._settings.stall_s / 2
        stuck = self._beat.in_flight > 0 and now - self._stepped_at > self._settings.stall_s
        return "stalled" if silent or stuck else "ready"

    async def _publish(self, state: State) -> None:
        if state != self._beat.state:
            logger.info("worker state", worker=self._beat.id, was=self._beat.state, now=state)
            self._beat.state = state
        raw = msgspec.json.encode(self._beat).decode()
        key = worker_key(self._beat.id)
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.set(key, raw, px=STOPPING_TTL_MS if state == "gone" else HEARTBEAT_TTL_MS)
                pipe.sadd(WORKERS, self._beat.id)
                pipe.publish(CHANNEL_WORKERS, raw)
                await pipe.execute()
            if not self._redis_ok:
                logger.info("redis is back", worker=self._beat.id)
            self._redis_ok = True
        except (RedisError, OSError) as error:
            if self._redis_ok:
                logger.warning("redis is away; still serving", worker=self._beat.id, error=str(error))
            self._redis_ok = False

    async def _leave(self) -> None:
        """Out of the table first, then wait for what runs."""
        if not self._beat.models:
            return
        deadline = time.monotonic() + self._settings.drain_timeout_s
        await self._publish("draining")
        await asyncio.sleep(min(0.3, self._settings.drain_timeout_s))  # decisions already on their way arrive
        while time.monotonic() < deadline:
            await self._observe()
            if self._beat.in_flight == 0:
                break
            await self._publish("draining")
            await asyncio.sleep(self._settings.heartbeat_s)
        logger.info("drained", worker=self._beat.id, left=self._beat.in_flight)

    async def _stop_engine(self) -> None:
        process = self._engine
        if process is None:
            return
        for number, patience_s in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), patience_s)
                break
        with contextlib.suppress(ProcessLookupError):  # its own children, should any be left
            os.killpg(process.pid, signal.SIGKILL)

    def _check_engine(self) -> None:
        if self._engine is not None and self._engine.returncode is not None:
            raise EngineDied(f"exit status {self._engine.returncode}")


def _die_with_parent() -> None:
    """In the engine, before exec: get SIGTERM when the agent is gone, however it went."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    """Check the settings, run the agent."""
    settings = read_settings(WorkerSettings, "worker")
    logs.configure("worker", settings.log_level)
    shm.sweep()
    raise SystemExit(asyncio.run(Agent(settings).run()))


if __name__ == "__main__":
    main()
