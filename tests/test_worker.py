"""The agent without an engine: everything that can fail on the way from start to stop, with a real redis and gateway."""

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import ClassVar

import httpx
import msgspec
import pytest
from redis.exceptions import RedisError

from common import places
from common.adapters import Adapter
from common.places import Saying
from common.redis.connect import connect
from common.redis.names import ADAPTERS, CHANNEL_WORKERS, WORKERS, worker_key
from common.sizing.cards import CannotSay
from common.tasks import end_tasks
from common.workers import Model
from services.local.plan import ROOT
from services.worker import agent, health, preflight, turns
from services.worker.agent import Agent
from services.worker.engines.base import EngineSilent, Load, Numbers
from services.worker.engines.fronted import Fronted
from services.worker.engines.vllm import Vllm
from services.worker.heartbeat import Heart
from services.worker.process import Process
from services.worker.reconcile import Reconciler
from services.worker.settings import WorkerSettings
from tests.harness import Stack, running, wait_for

NEVER = ["sleep", "1000"]


class FakeLoader:
    """Adapters in a set; loads and unloads that fail, are slow or hang, by name."""

    def __init__(self) -> None:
        self.there: set[str] = set()
        self.slow: dict[str, float] = {}
        self.failures: dict[str, int] = {}
        self.asked: list[tuple[str, str]] = []

    async def load(self, name: str, folder: str) -> bool:
        return await self._do("load", name)

    async def unload(self, name: str) -> bool:
        return await self._do("unload", name)

    async def names(self) -> set[str]:
        return set(self.there)

    async def _do(self, verb: str, name: str) -> bool:
        self.asked.append((verb, name))
        await asyncio.sleep(self.slow.get(name, 0.0))
        if self.failures.get(name, 0) > 0:
            self.failures[name] -= 1
            return False
        (self.there.add if verb == "load" else self.there.discard)(name)
        return True


class FakeEngine:
    """An engine whose process is a sleep."""

    name, slots, elsewhere, model = "fake", 4, False, "base"

    def __init__(self, address: str, command: list[str] = NEVER) -> None:
        self.address, self._command = address, command
        self.adapters: FakeLoader | None = None
        self.up = True
        self.silent = False
        self.in_flight = self.reading = 0
        self.steps = 0.0
        self.cleaned = self.slept = self.woken = 0
        self.can_sleep = False

    def command(self) -> list[str]:
        return self._command

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    async def healthy(self) -> bool:
        return self.up

    async def models(self) -> list[Model]:
        return [Model(self.model, 100, revision="r")]

    async def load(self) -> Load:
        if self.silent:
            raise EngineSilent("silent")
        return Load(self.in_flight, self.in_flight, self.reading)

    async def numbers(self) -> Numbers:
        self.steps += 1
        return Numbers(self.steps)

    @staticmethod
    async def still() -> Numbers:
        return Numbers(7.0)

    async def sleep(self) -> bool:
        self.slept += 1
        return self.can_sleep

    async def wake(self) -> None:
        self.woken += 1

    def clean_up(self) -> None:
        self.cleaned += 1

    async def close(self) -> None: ...


def settings(stack: Stack, **fields: object) -> WorkerSettings:
    secrets = stack.dials.secrets / "worker"
    return WorkerSettings(**{
        "redis_url": stack.dials.redis_url, "redis_password_file": secrets / "redis_password",
        "worker_token_file": secrets / "worker_token", "worker_name": "a", "model": "/m", "advertise_host": "127.0.0.1",
        "adapters_dir": Path("/adapters"), "heartbeat_s": 0.05, "drain_timeout_s": 3.0, "start_timeout_s": 5.0, **fields,
    })  # type: ignore[arg-type]


class Life:
    """An agent at work."""

    def __init__(self, stack: Stack, engine: FakeEngine, **fields: object) -> None:
        self.engine = engine
        self.agent = Agent(settings(stack, **fields), engine)
        self.task = asyncio.create_task(self.agent.run())
        self.redis = stack.redis("worker")

    @property
    def id(self) -> str:
        return self.agent.heart.beat.id

    def said(self) -> dict:
        raw = self.redis.execute_command("GET", worker_key(self.id))
        return msgspec.json.decode(raw) if raw else {}

    def models(self) -> list[str]:
        return [model["id"] for model in self.said().get("models", [])]

    def pid(self) -> int:
        child = self.agent._process._child
        assert child is not None
        return child.pid

    async def until(self, check: object, what: str, timeout_s: float = 8.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if check():  # type: ignore[operator]
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"after {timeout_s:g} s: not {what}; {self.said()}")


@contextlib.asynccontextmanager
async def living(stack: Stack, engine: FakeEngine | None = None, **fields: object) -> AsyncIterator[Life]:
    life = Life(stack, engine or FakeEngine(f"127.0.0.1:{stack.worker_ports[0]}"), **fields)
    try:
        yield life
    finally:
        life.agent.stopping.set()
        await asyncio.wait_for(life.task, 20)
        assert not life.said(), "the last thing it does is to leave the table"
        assert life.engine.cleaned >= 2
        if life.agent._process._child is not None:
            assert life.agent._process._child.returncode is not None


@pytest.fixture(scope="module")
def floor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """redis, gateway, nginx for tests that break none of them."""
    with running(tmp_path_factory.mktemp("worker")) as stack:
        yield stack


@pytest.fixture(autouse=True)
def no_adapters(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "floor" in request.fixturenames:
        request.getfixturevalue("floor").redis("jobs").delete(ADAPTERS)


def publish(stack: Stack, *names: str) -> None:
    redis = stack.redis("jobs")
    for number, name in enumerate(names):
        adapter = Adapter(name, f"ftjob-{number:024x}", "base", "d", "o", 1)
        redis.hset(ADAPTERS, name, msgspec.json.encode(adapter))


class TestLife:
    def test_it_announces_drains_and_leaves(self, floor: Stack) -> None:
        async def live() -> None:
            async with living(floor) as life:
                await life.until(lambda: life.said().get("state") == "ready", "announced")
                await life.until(lambda: floor.ready_count() == 1, "known to the gateway")
                life.engine.in_flight = 1
                await life.until(lambda: life.said()["in_flight"] == 1, "its load told")
                life.agent.stopping.set()
                await life.until(lambda: life.said().get("state") == "draining", "draining")
                await asyncio.sleep(0.5)
                assert not life.task.done(), "it waits for what runs"
                life.engine.in_flight = 0
            assert life.task.result() == 0
            await asyncio.to_thread(wait_for, lambda: floor.ready_count() == 0, "gone from the gateway")

        asyncio.run(live())

    def test_it_tells_news_at_once_and_little_otherwise(self, floor: Stack) -> None:
        """Each heartbeat wakes every gateway, jobs service and ledger."""
        async def live() -> None:
            async with living(floor) as life:
                await life.until(lambda: life.said().get("state") == "ready", "announced")
                with floor.redis().pubsub() as heard:
                    heard.subscribe(CHANNEL_WORKERS)

                    def count() -> int:
                        return sum(m["type"] == "message" for m in iter(lambda: heard.get_message(timeout=0.0), None))

                    await asyncio.sleep(0.1)
                    count()
                    await asyncio.sleep(1.6)
                    assert 2 <= count() <= 5, "it is said that it lives"
                    life.engine.in_flight = 9
                    await asyncio.sleep(0.6)
                    assert count() >= 5, "a busy one speaks each time"
                    for number in (1, 2, 3):
                        life.engine.in_flight = number
                        await life.until(lambda n=number: life.said()["in_flight"] == n, "told", 0.25)
                life.engine.in_flight = 0

        asyncio.run(live())

    def test_an_engine_that_never_comes_up_is_given_up(self, floor: Stack) -> None:
        async def live() -> None:
            engine = FakeEngine("h:1")
            engine.up = False
            async with living(floor, engine, start_timeout_s=0.5) as life:
                assert await life.task == 1

        asyncio.run(live())

    @pytest.mark.parametrize("when", ["start", "run", "reconcile", "drain"])
    def test_an_engine_that_dies(self, floor: Stack, when: str) -> None:
        """At once noticed, exit status 1, whatever the agent is at."""
        async def live() -> None:
            engine = FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}")
            engine.up = when != "start"
            if when == "reconcile":
                engine.adapters = FakeLoader()
                engine.adapters.slow["hangs"] = 1000.0
                publish(floor, "hangs")
            if when == "drain":
                engine.in_flight = 1
            async with living(floor, engine, drain_timeout_s=30.0) as life:
                await life.until(lambda: life.agent._process._child is not None, "started")
                if when != "start":
                    await life.until(lambda: life.said().get("state") == "ready", "announced")
                if when == "reconcile":
                    assert engine.adapters is not None
                    await life.until(lambda: engine.adapters.asked, "loading")
                if when == "drain":
                    life.agent.stopping.set()
                    await life.until(lambda: life.said().get("state") == "draining", "draining")
                os.kill(life.pid(), signal.SIGKILL)
                began = time.monotonic()
                assert await life.task == 1
                assert time.monotonic() - began < 2, "nobody waits for the dead"

        asyncio.run(live())

    @pytest.mark.parametrize("when", ["start", "run", "reconcile", "drain"])
    def test_told_to_stop(self, floor: Stack, when: str) -> None:
        async def live() -> None:
            engine = FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}")
            engine.up = when != "start"
            if when == "reconcile":
                engine.adapters = FakeLoader()
                engine.adapters.slow["hangs"] = 1000.0
                publish(floor, "hangs")
            async with living(floor, engine) as life:
                await life.until(lambda: life.agent._process._child is not None, "started")
                if when != "start":
                    await life.until(lambda: life.said().get("state") == "ready", "announced")
                began = time.monotonic()
                life.agent.stopping.set()
                if when == "drain":
                    engine.in_flight = 1
                    await life.until(lambda: life.said().get("state") == "draining", "draining")
                    life.agent.stopping.set()
                assert await life.task == 0
                assert time.monotonic() - began < (4.5 if when == "drain" else 2)

        asyncio.run(live())

    def test_a_slow_reader_is_waited_for_and_stalls_nobody(self, floor: Stack) -> None:
        async def live() -> None:
            engine = FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}")
            engine.reading, engine.numbers = 1, FakeEngine.still  # type: ignore[method-assign]
            async with living(floor, engine, stall_s=0.3) as life:
                await asyncio.sleep(1.0)
                assert life.said()["state"] == "ready"
                life.agent.stopping.set()
                await asyncio.sleep(0.6)
                assert not life.task.done(), "what it has not read yet is still to come"
                engine.reading = 0

        asyncio.run(live())

    def test_a_silent_engine_is_stalled_and_comes_back(self, floor: Stack) -> None:
        async def live() -> None:
            async with living(floor, stall_s=0.4) as life:
                await life.until(lambda: life.said().get("state") == "ready", "announced")
                life.engine.silent = True
                await life.until(lambda: life.said().get("state") == "stalled", "stalled")
                life.engine.silent = False
                await life.until(lambda: life.said().get("state") == "ready", "ready again")

        asyncio.run(live())


    @pytest.mark.parametrize("how", ["silent", "no step"])
    def test_one_that_stays_stalled_is_started_again(self, floor: Stack, how: str) -> None:
        """It was stalled for ever, and with one worker requests kept going to it (B5)."""
        async def live() -> None:
            engine = FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}")
            async with living(floor, engine, stall_s=0.3, stall_restart_s=1.0) as life:
                await life.until(lambda: life.said().get("state") == "ready", "announced")
                if how == "silent":
                    engine.silent = True
                else:
                    engine.in_flight, engine.numbers = 1, FakeEngine.still  # type: ignore[method-assign]
                await life.until(lambda: life.said().get("state") == "stalled", "stalled")
                assert await asyncio.wait_for(life.task, 5) == 1, "ended, for its supervisor to start it again"

        asyncio.run(live())

    def test_a_long_prefill_is_no_reason(self, floor: Stack) -> None:
        async def live() -> None:
            engine = FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}")
            async with living(floor, engine, stall_s=0.2, stall_restart_s=1.5) as life:
                await life.until(lambda: life.said().get("state") == "ready", "announced")
                engine.in_flight, moving = 1, engine.numbers
                for _ in range(3):  # a second without a step, then one
                    engine.numbers = FakeEngine.still  # type: ignore[method-assign]
                    await asyncio.sleep(1.0)
                    engine.numbers = moving  # type: ignore[method-assign]
                    await asyncio.sleep(1.2)
                assert not life.task.done()
                engine.in_flight = 0

        asyncio.run(live())

    def test_one_that_runs_elsewhere_is_only_reported(self, floor: Stack) -> None:
        async def live() -> None:
            engine = FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}")
            engine.elsewhere = True
            async with living(floor, engine, stall_s=0.2, stall_restart_s=0.5) as life:
                await life.until(lambda: life.said().get("state") == "ready", "announced")
                engine.silent = True
                await life.until(lambda: life.said().get("state") == "stalled", "stalled")
                await asyncio.sleep(1.5)
                assert not life.task.done()

        asyncio.run(live())


class TestTurns:
    """Workers that share a place: they sleep until requests wait for them, and again when others wait for theirs."""

    SHARED: ClassVar[dict[str, object]] = {"place": "cpu", "on_demand": True}

    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch: pytest.MonkeyPatch, floor: Stack) -> None:
        monkeypatch.setattr(places, "LEAST_AWAKE_S", 0.3)
        monkeypatch.setattr(places, "NEW_S", 0.0)
        monkeypatch.setattr(turns, "SAY_EVERY_S", 0.1)
        floor.redis("worker").delete("place:cpu")

    @staticmethod
    def wish(floor: Stack, model: str) -> None:
        floor.redis().hset(f"wake:{model}", "test", "1")

    def test_it_sleeps_until_somebody_waits_and_until_another_ones_turn(self, floor: Stack) -> None:
        async def live() -> None:
            one, two = (FakeEngine(f"127.0.0.1:{port}") for port in floor.worker_ports[:2])
            two.model = "other"
            async with living(floor, one, **self.SHARED, served_model_name="base") as a, \
                    living(floor, two, **self.SHARED, served_model_name="other", worker_name="b") as b:
                await a.until(lambda: a.said().get("state") == b.said().get("state") == "asleep", "asleep")
                assert a.agent._process._child is None, "no engine runs"
                assert a.models() == ["base"]
                self.wish(floor, "base")
                await a.until(lambda: a.said().get("state") == "ready", "awake")
                assert a.said()["wake_s"] >= 0
                floor.redis().delete("wake:base")
                one.in_flight = 1
                await a.until(lambda: a.said()["in_flight"] == 1, "busy")
                self.wish(floor, "other")
                await a.until(lambda: a.said().get("state") == "asleep", "no new requests")
                await asyncio.sleep(0.5)
                assert b.said()["state"] == "asleep", "not while a request runs"
                assert a.agent._process._child is not None
                one.in_flight = 0
                await b.until(lambda: b.said().get("state") == "ready", "the other one's turn")
                assert a.agent._process._child is None
                floor.redis().delete("wake:other")
                await asyncio.sleep(0.5)
                assert b.said()["state"] == "ready", "nobody else wants its place"
            assert (a.task.result(), b.task.result()) == (0, 0)

        asyncio.run(live())

    def test_a_tuned_model_of_one_that_sleeps_can_be_asked_for(self, floor: Stack) -> None:
        async def live() -> None:
            engine = FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}")
            engine.adapters = FakeLoader()
            publish(floor, "ft:base:x:1")
            async with living(floor, engine, **self.SHARED, served_model_name="base") as life:
                await life.until(lambda: life.models() == ["base", "ft:base:x:1"], "listed")
                self.wish(floor, "base")
                await life.until(lambda: life.said().get("state") == "ready" and "ft:base:x:1" in life.models(), "loaded")
                floor.redis().delete("wake:base")

        asyncio.run(live())

    def test_memory_that_others_have_is_waited_for_and_not_for_ever(self, floor: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = 0

        def check_free(_: object) -> None:
            nonlocal asked
            asked += 1
            if asked < 4 or late:
                raise CannotSay("another has it")

        monkeypatch.setattr(preflight, "check_free", check_free)
        late = False

        async def live() -> None:
            async with living(floor, FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}"), **self.SHARED, served_model_name="base") as life:
                self.wish(floor, "base")
                if late:
                    await life.until(life.task.done, "given up")
                    assert (life.task.result(), life.agent._process._child) == (1, None)
                else:
                    await life.until(lambda: life.said().get("state") == "ready", "awake")
                    assert asked == 4
                floor.redis().delete("wake:base")

        asyncio.run(live())
        late = True
        monkeypatch.setattr(agent, "ROOM_S", 0.5)
        before = asked
        asyncio.run(live())
        assert asked - before >= 3

    def test_an_engine_that_can_sleep_keeps_its_process(self, floor: Stack) -> None:
        async def live() -> None:
            engine = FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}")
            engine.can_sleep = True
            async with living(floor, engine, **{**self.SHARED, "on_demand": False}) as life:
                await life.until(lambda: life.said().get("state") == "ready", "always there")
                pid = life.pid()
                trainer = floor.redis("trainer")
                await life.until(lambda: trainer.eval(*places.call("cpu", Saying("t", "all", True)))[0] == 1, "given away")
                assert (engine.slept, life.said()["state"], life.said()["held"], life.pid()) == (1, "asleep", "training", pid)
                await asyncio.sleep(0.5)
                assert life.said()["state"] == "asleep", "while the training works"
                trainer.eval(*places.call("cpu", Saying("t", "all", False)))
                await life.until(lambda: life.said().get("state") == "ready", "back")
                assert (engine.woken, life.pid(), life.said()["held"]) == (1, pid, "")

        asyncio.run(live())

    @pytest.mark.parametrize("when", ["asleep", "waking", "draining"])
    @pytest.mark.parametrize("what", ["stop", "die"])
    def test_it_ends_whenever_it_is_told_or_dies(self, floor: Stack, when: str, what: str) -> None:
        async def live() -> None:
            engine = FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}")
            engine.up = when != "waking"
            engine.in_flight = when == "draining"
            async with living(floor, engine, **self.SHARED, served_model_name="base") as life:
                await life.until(lambda: life.said().get("state") == "asleep", "asleep")
                if when != "asleep":
                    self.wish(floor, "base")
                    await life.until(lambda: life.said().get("state") == ("waking" if when == "waking" else "ready"), when)
                    await life.until(lambda: life.agent._process.runs, "started")
                floor.redis().delete("wake:base")
                if when == "draining":
                    floor.redis("worker").eval(*places.call("cpu", Saying("x", "turn", True)))
                    await life.until(lambda: life.said().get("state") == "asleep" or floor.redis("worker").eval(
                        *places.call("cpu", Saying("x", "turn", True))) is None, "draining")
                if what == "stop" or when == "asleep":
                    engine.in_flight = 0
                    life.agent.stopping.set()
                    assert await asyncio.wait_for(life.task, 5) == 0
                else:
                    os.kill(life.pid(), signal.SIGKILL)
                    assert await asyncio.wait_for(life.task, 5) == 1
            floor.redis("worker").eval(*places.call("cpu", Saying("x", "turn", False)))
            assert floor.redis("worker").eval(*places.call("cpu", Saying("y", "turn", True)))[0] == 1, "the place is free"

        asyncio.run(live())

    def test_while_it_is_put_to_sleep_it_is_still_heard(self, floor: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        """Else gateways forget it after three seconds, and whoever asks is told that there is nobody."""
        async def live() -> None:
            engine = FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}")

            async def slowly() -> bool:
                await asyncio.sleep(4)
                return True

            engine.sleep = slowly  # type: ignore[method-assign]
            async with living(floor, engine, **self.SHARED, served_model_name="base") as life:
                self.wish(floor, "base")
                await life.until(lambda: life.said().get("state") == "ready", "awake")
                floor.redis().delete("wake:base")
                await asyncio.sleep(0.4)
                other = Saying("x", "turn", True)
                await life.until(lambda: floor.redis("worker").eval(*places.call("cpu", other))[0] == 0 and life.said()["state"] == "asleep", "asleep")
                for _ in range(45):
                    await asyncio.sleep(0.1)
                    floor.redis("worker").eval(*places.call("cpu", other))
                    assert life.said().get("state") == "asleep"
                floor.redis("worker").eval(*places.call("cpu", Saying("x", "turn", False)))

        asyncio.run(live())

    def test_the_health_check_of_a_container_knows_sleep_from_a_start(self, floor: Stack, tmp_path: Path) -> None:
        async def live() -> None:
            alive = tmp_path / "alive"
            engine = FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}")
            engine.up = False
            async with living(floor, engine, **{**self.SHARED, "on_demand": False}, alive_file=alive) as life:
                await life.until(lambda: life.said().get("state") == "waking", "starting")
                assert not alive.exists(), "it answers nobody yet"
                engine.up = True
                await life.until(alive.exists, "well")
            alive.unlink()
            async with living(floor, FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}"), **self.SHARED, alive_file=alive) as life:
                await life.until(lambda: life.said().get("state") == "asleep" and alive.exists(), "well, though nobody needs it")

        asyncio.run(live())

    def test_redis_away_lets_everything_as_it_is(self, floor: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        async def live() -> None:
            async with living(floor, **{**self.SHARED, "on_demand": False}) as life:
                await life.until(lambda: life.said().get("state") == "ready", "there")
                real = life.agent._turns._redis.eval

                async def away(*_: object) -> None:
                    raise RedisError("away")

                monkeypatch.setattr(life.agent._turns._redis, "eval", away)
                await asyncio.sleep(0.5)
                assert life.said()["state"] == "ready"
                monkeypatch.setattr(life.agent._turns._redis, "eval", real)

        asyncio.run(live())


class TestAdapters:
    def test_the_base_is_announced_before_any_adapter_is_loaded(self, floor: Stack) -> None:
        """A hanging load kept a worker silent for a minute; now it holds up nobody, not even the other adapters (B7)."""
        async def live() -> None:
            engine = FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}")
            engine.adapters = loader = FakeLoader()
            loader.slow.update({"hangs": 1000.0, "slow": 0.3})
            publish(floor, "hangs", "slow", "good")
            async with living(floor, engine) as life:
                await life.until(lambda: life.models() == ["base"], "the base alone", 2)
                await life.until(lambda: set(life.models()) == {"base", "good", "slow"}, "the others")
                assert loader.there == {"good", "slow"}

        asyncio.run(live())

    def test_adapters_that_are_the_owners_own_stay(self, floor: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        """ENGINE_ARGS=--lora-modules: unloaded after half a minute, and still announced."""
        monkeypatch.setattr("services.worker.reconcile.LOOK_EVERY_S", 0.1)
        monkeypatch.setattr("services.worker.reconcile.EVERY_S", 0.05)

        async def live() -> None:
            engine = FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}")
            engine.adapters = loader = FakeLoader()
            loader.there |= {"house-style", "ft:base::forgotten"}
            async with living(floor, engine) as life:
                await life.until(lambda: loader.there == {"house-style"}, "what is ours and not in the registry, unloaded")
                await asyncio.sleep(0.5)
                assert loader.there == {"house-style"}

        asyncio.run(live())

    def test_what_fails_is_tried_again(self, floor: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        """A load, and an unload: an adapter that could not be unloaded stayed in the engine for ever (B8)."""
        monkeypatch.setattr("services.worker.reconcile.RETRY_S", 0.2)
        monkeypatch.setattr("services.worker.reconcile.EVERY_S", 0.05)

        async def live() -> None:
            engine = FakeEngine(f"127.0.0.1:{floor.worker_ports[0]}")
            engine.adapters = loader = FakeLoader()
            loader.failures["x"] = 2
            publish(floor, "x")
            async with living(floor, engine) as life:
                await life.until(lambda: life.models() == ["base", "x"], "loaded at the third try")
                loader.failures["x"] = 2
                floor.redis("jobs").delete(ADAPTERS)
                await life.until(lambda: life.models() == ["base"], "no longer announced")
                await life.until(lambda: not loader.there, "unloaded at the third try")
                assert [verb for verb, _ in loader.asked].count("unload") == 3
                await asyncio.sleep(0.5)
                assert [verb for verb, _ in loader.asked].count("unload") == 3, "and then left alone"

        asyncio.run(live())

    def test_a_load_that_ends_long_after_it_was_given_up_holds_no_slot(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """vLLM goes on loading what nobody waits for any more; its unload finds nothing, and then it is there."""
        monkeypatch.setattr("services.worker.reconcile.LOOK_EVERY_S", 0.0)

        async def compare() -> None:
            loader = FakeLoader()

            async def read() -> dict:
                return {"x": msgspec.json.encode(Adapter("x", f"ftjob-{1:024x}", "base", "d", "o", 1))}

            keeper = Reconciler(loader, read, Model("base", 1), Path("/a"), lambda _: None, 0.0)
            await keeper.compare()
            await asyncio.sleep(0.01)
            loader.there.add("ft:base::late")
            await keeper.compare()
            await asyncio.sleep(0.01)
            assert loader.there == {"x"}

        asyncio.run(compare())

    def test_it_is_unloaded_only_after_gateways_have_heard(self) -> None:
        async def compare() -> None:
            loader, shown = FakeLoader(), list[list[str]]()
            registry = {"x": msgspec.json.encode(Adapter("x", f"ftjob-{1:024x}", "base", "d", "o", 1))}

            async def read() -> dict:
                return registry

            keeper = Reconciler(loader, read, Model("base", 1), Path("/a"), lambda m: shown.append([e.id for e in m]), 0.2)
            await keeper.compare()
            await asyncio.sleep(0.01)
            assert shown == [["x"]]
            registry.clear()
            await keeper.compare()
            assert shown[-1] == []
            await keeper.compare()
            await asyncio.sleep(0.01)
            assert loader.there == {"x"}
            await asyncio.sleep(0.2)
            await keeper.compare()
            await asyncio.sleep(0.01)
            assert loader.there == set()
            assert keeper._not_before == {}

        asyncio.run(compare())


class TestRedis:
    def test_a_full_redis_takes_nobody_out_of_the_table(self, tmp_path: Path) -> None:
        """PUBLISH was in one transaction with SET: at maxmemory nothing was said, and everything answered 503 (B1)."""
        async def live(stack: Stack) -> None:
            async with living(stack) as life:
                await life.until(lambda: stack.ready_count() == 1, "known")
                redis, full_until = stack.redis("gateway"), time.monotonic() + 7.0
                while time.monotonic() < full_until:  # longer than heartbeats live, and than gateways wait before they settle
                    for size in (100_000, 1000, 10):
                        with contextlib.suppress(RedisError):
                            while True:
                                redis.set(f"key:{os.urandom(8).hex()}", "x" * size)
                    await asyncio.sleep(0.01)
                assert life.said() == {}, "nothing can be stored"
                assert stack.ready_count() == 1
                life.engine.in_flight = 3
                await asyncio.sleep(0.3)
                life.agent.stopping.set()
                await asyncio.to_thread(wait_for, lambda: stack.ready_count() == 0, "draining heard", 3)
                life.engine.in_flight = 0

        with running(tmp_path, redis_maxmemory="6mb") as stack:
            asyncio.run(live(stack))

    def test_redis_away_stops_no_engine(self, stack: Stack) -> None:
        async def live() -> None:
            async with living(stack) as life:
                await life.until(lambda: life.said().get("state") == "ready", "announced")
                stack.kill("redis")
                await asyncio.sleep(1.5)
                assert not life.task.done()
                (stack.dials.run_dir / "redis.sock").unlink(missing_ok=True)
                await asyncio.to_thread(stack.start_redis)
                await life.until(lambda: life.said().get("state") == "ready", "announced again")
                assert life.id in stack.redis().smembers(WORKERS)
                assert os.kill(life.pid(), 0) is None

        asyncio.run(live())

    def test_redis_away_while_it_stops(self, stack: Stack) -> None:
        async def live() -> None:
            life = Life(stack, FakeEngine(f"127.0.0.1:{stack.worker_ports[0]}"))
            await life.until(lambda: life.said().get("state") == "ready", "announced")
            stack.kill("redis")
            life.agent.stopping.set()
            assert await asyncio.wait_for(life.task, 15) == 0

        asyncio.run(live())


class TestHeartbeats:
    def test_one_that_is_cut_off_comes_before_the_next(self, floor: Stack) -> None:
        """It came after `gone`, by another connection, and a worker that had left was asked for three seconds more."""
        async def live() -> list[str]:
            heart = Heart(connect(settings(floor)), FakeEngine("127.0.0.1:1"), "w", 0.05, 1.0)
            order = []

            async def slowly(raw: str, state: str) -> None:
                await asyncio.sleep(0.2)
                order.append(state)

            heart._say = slowly  # type: ignore[assignment]
            saying = asyncio.create_task(heart.rest("waking"))
            await asyncio.sleep(0.02)
            await end_tasks([saying])
            await heart.tell("gone")
            await heart.forget()
            return order

        assert asyncio.run(live()) == ["waking", "gone"]


class TestProcess:
    def test_what_does_not_listen_is_killed_with_its_children(self) -> None:
        async def live() -> None:
            script = "import signal, subprocess; signal.signal(15, signal.SIG_IGN); p = subprocess.Popen(['sleep', '1000']); p.wait()"
            process = Process([sys.executable, "-c", script], dict(os.environ))
            pid = await process.start()
            assert pid is not None
            listed = Path(f"/proc/{pid}/task/{pid}/children")
            await asyncio.to_thread(wait_for, lambda: listed.read_text().split(), "a child of its own")
            children = listed.read_text().split()
            await process.stop()
            for child in (pid, *map(int, children)):
                stat = Path(f"/proc/{child}/stat")
                wait_for(lambda stat=stat: not stat.exists() or " Z " in stat.read_text(), f"{child} gone")

        import services.worker.process as module
        patience, module.PATIENCE_S = module.PATIENCE_S, ((signal.SIGTERM, 0.5), (signal.SIGKILL, 5.0))
        try:
            asyncio.run(live())
        finally:
            module.PATIENCE_S = patience

    def test_before_it_is_started_there_is_nothing_to_die(self) -> None:
        async def live() -> None:
            process = Process(NEVER, {})
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(process.wait(), 0.1)
            await process.stop()

        asyncio.run(live())


class TestEngines:
    @pytest.mark.parametrize("answer", [(200, b"{"), (200, b"[]"), (500, b"{}"), (200, b'{"in_flight":"x"}')])
    def test_an_answer_that_cannot_be_read_is_silence(self, floor: Stack, answer: tuple[int, bytes]) -> None:
        """A DecodeError from the load report ended agent and engine (B8)."""
        async def ask() -> None:
            engine = Vllm(settings(floor), "w")
            engine._http = httpx.AsyncClient(base_url="http://x", transport=httpx.MockTransport(
                lambda _: httpx.Response(answer[0], content=answer[1])))
            for question in (engine.load, engine.models):
                with pytest.raises(EngineSilent):
                    await question()

        asyncio.run(ask())

    def test_what_runs_elsewhere_needs_an_address(self, floor: Stack) -> None:
        for engine in ("attached", "trtllm", "sglang"):
            for bad in ("", "ftp://x", "x:1"):
                with pytest.raises(ValueError, match=r"(?i)engine_url"):
                    settings(floor, engine=engine, engine_url=bad)

    def test_a_second_server_comes_serves_and_goes(self, stack: Stack) -> None:
        """A server that somebody else runs: found, carried by nginx, metered, and gone when it is gone."""
        stack.add_fronted("w1")
        with stack.client() as client:
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["fake"]
        answer, stream = stack.chat("say 3"), stack.chat("say 4", stream=True)
        assert answer.status_code == stream.status_code == 200
        assert answer.headers["x-owngpt-worker"].startswith("w1-")
        assert stream.text.endswith("data: [DONE]\n\n")
        assert [(r["completion_tokens"], r["outcome"], r["key"]) for r in stack.records(2)] == [
            (3, "ok", stack.record.id), (4, "ok", stack.record.id)]
        told = stack.chat("echo headers").json()
        assert "authorization" not in told, "who asks, and our token, are not its business"
        assert not [name for name in told if name.startswith("x-owngpt")]
        stack.kill("w1-engine")
        assert stack.chat("say 3").status_code == 503
        wait_for(lambda: stack.ready_count() == 0, "its silence noticed", 10)
        stack.running["w1"].terminate()
        assert stack.running["w1"].wait(15) == 0

    def test_its_key_and_its_name_for_the_model(self, stack: Stack, tmp_path: Path) -> None:
        (tmp_path / "key").write_text("sk-theirs\n")
        stack.add_fronted("w1", ENGINE_KEY_FILE=str(tmp_path / "key"), MODEL="fake", SERVED_MODEL_NAME="ours")
        with stack.client() as client:
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["ours"]
            for script, field, wanted in (("echo headers", "authorization", "Bearer sk-theirs"), ("echo body", "model", "fake")):
                said = client.post("/v1/chat/completions", json={"model": "ours", "messages": [{"role": "user", "content": script}]}).json()
                assert said[field] == wanted
        redis = stack.redis()
        told = [redis.get(worker_key(worker)) or "" for worker in redis.smembers(WORKERS)]
        assert told
        assert "sk-theirs" not in "".join(told)

    def test_a_model_that_it_does_not_list_is_said(self, floor: Stack) -> None:
        async def ask() -> None:
            engine = Fronted(settings(floor, engine="attached", engine_url="http://there:8000", model="mine"), "w")
            engine._http = httpx.AsyncClient(base_url="http://x", transport=httpx.MockTransport(
                lambda _: httpx.Response(200, content=b'{"data":[{"id":"a"},{"id":"b"}]}')))
            with pytest.raises(EngineSilent, match="no model 'mine', but: a, b"):
                await engine.models()

        asyncio.run(ask())

    @pytest.mark.parametrize(("engine", "text", "wanted"), [
        ("attached", b"", Numbers(None)),
        ("attached", b'vllm:num_requests_waiting{engine="0"} 2.0\nvllm:kv_cache_usage_perc{} 0.5\n', Numbers(None, 2, 0.5)),
        ("sglang", b'sglang:num_queue_reqs{model_name="m"} 3.0\nsglang:token_usage{model_name="m"} 0.28\n'
                   b'sglang:prompt_tokens_total{model_name="m"} 8.1e+06\nsglang:generation_tokens_total{model_name="m"} 7.0\n',
         Numbers(None, 3, 0.28, 8100000, 0, 7)),
        ("trtllm", b'trtllm_kv_cache_utilization{model_name="m"} 0.25\n', Numbers(None, 0, 0.25)),
        ("llamacpp", b"llamacpp:prompt_tokens_total 70\nllamacpp:tokens_predicted_total 9\nllamacpp:n_decode_total 12\n"
                     b"llamacpp:requests_deferred 1\nllamacpp:prompt_tokens_cached_total 31\n", Numbers(12, 1, 0, 101, 31, 9)),
    ])
    def test_numbers_by_their_own_names(self, floor: Stack, engine: str, text: bytes, wanted: Numbers) -> None:
        async def ask() -> Numbers:
            asked = Fronted(settings(floor, engine=engine, engine_url="http://there:8000"), "w")
            asked._http = httpx.AsyncClient(base_url="http://x", transport=httpx.MockTransport(
                lambda _: httpx.Response(200, content=text)))
            return await asked.numbers()

        assert asyncio.run(ask()) == wanted


class TestHealth:
    """A container's health check: half an hour of `up --wait` was how an owner heard of a wrong setting."""

    def test_a_start_that_failed_is_said_while_the_worker_stays(self, tmp_path: Path) -> None:
        alive = tmp_path / "alive"
        env = {"PATH": os.environ["PATH"], "ALIVE_FILE": str(alive), "ENGINE": "none"}
        with subprocess.Popen([sys.executable, "-m", "services.worker"], env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True) as worker:
            try:
                assert health.check(alive) == 1
                assert worker.poll() is None, "else it is started again before anybody has seen it"
                worker.terminate()
                assert worker.wait(5) == -signal.SIGTERM, "and a stop waits for nothing"
            finally:
                worker.kill()
            assert worker.stderr is not None and "ENGINE" in worker.stderr.read()

    def test_a_start_is_waited_for_and_silence_is_not(self, tmp_path: Path) -> None:
        alive = tmp_path / "alive"
        with concurrent.futures.ThreadPoolExecutor() as pool:
            asked = pool.submit(health.check, alive)
            time.sleep(1)
            assert not asked.done()
            alive.touch()
            assert asked.result(5) == 0
        os.utime(alive, (time.time() - 11,) * 2)
        assert health.check(alive) == 1
