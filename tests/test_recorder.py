"""One entry for each attempt of a request, whoever ends it, whatever redis forgets: with a real redis and both scripts."""

import asyncio
import json
from collections.abc import Iterator

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from common import recorder as recorders
from common.recorder import Recorder
from common.records import Record
from common.redis.names import USAGE, WORKERS, flushed_key, running_key, worker_key
from gateway.tending import is_running, reap
from tests.harness import Stack, running


@pytest.fixture(scope="module")
def floor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("recorder")) as stack:
        yield stack


def client(stack: Stack, user: str) -> Redis:
    password = (stack.dials.secrets / user / "redis_password").read_text().strip()
    return Redis.from_url(stack.dials.redis_url, username=user, password=password, decode_responses=True)


def record(worker: str, name: str) -> Record:
    return Record(id=name, request_id="r", key="k", model="m", route="chat", worker=worker, started_at=0.0)


class Desk:
    """A recorder whose flushes are made by hand, and the gateway's look for lost workers."""

    def __init__(self, stack: Stack, worker: str) -> None:
        self.worker, self.gateway = worker, client(stack, "gateway")
        self.recorder = Recorder(client(stack, "worker"))
        self.recorder._task = asyncio.create_task(asyncio.sleep(0))  # nobody else flushes

    def begin(self, name: str) -> Record:
        found = record(self.worker, name)
        self.recorder.begin(found)
        return found

    def end(self, found: Record) -> None:
        found.outcome = "ok"
        self.recorder.end(found)

    async def outcomes(self) -> list[str]:
        entries = [json.loads(fields["r"]) for _, fields in await self.gateway.xrange(USAGE)]
        return [entry["outcome"] for entry in entries if entry["worker"] == self.worker]

    async def close(self) -> None:
        await self.recorder.close()
        await self.gateway.aclose()


async def lost(desk: Desk) -> None:
    """The agent is silent past its time; the engine lives on."""
    worker = client_of(desk)
    await worker.sadd(WORKERS, desk.worker)
    await worker.delete(worker_key(desk.worker))
    await reap(desk.gateway, ())


def client_of(desk: Desk) -> Redis:
    return desk.recorder._redis


def check(floor: Stack, name: str, steps: object) -> None:
    async def run() -> None:
        desk = Desk(floor, name)
        try:
            await steps(desk)  # type: ignore[operator]
        finally:
            await desk.close()

    asyncio.run(run())


def test_begun_shown_ended(floor: Stack) -> None:
    async def steps(desk: Desk) -> None:
        found = desk.begin("a")
        await desk.recorder.flush()
        assert await is_running(desk.gateway, desk.worker, "a")
        desk.end(found)
        await desk.recorder.flush()
        assert not await is_running(desk.gateway, desk.worker, "a")
        desk.end(desk.begin("b"))  # begun and ended between two flushes
        await desk.recorder.flush()
        assert await desk.outcomes() == ["ok", "ok"]

    check(floor, "w1", steps)


def test_who_was_thought_to_be_lost_is_not_counted_twice(floor: Stack) -> None:
    """REAP and FLUSH did not exclude each other: `upstream_error` and `ok` for one request, and the ledger counted both (A7)."""
    async def steps(desk: Desk) -> None:
        found = desk.begin("a")
        await desk.recorder.flush()
        await lost(desk)
        assert await desk.outcomes() == ["upstream_error"]
        desk.end(found)
        await desk.recorder.flush()
        assert await desk.outcomes() == ["upstream_error"]
        again = desk.begin("b")  # and whatever comes after is counted as ever
        await desk.recorder.flush()
        desk.end(again)
        await desk.recorder.flush()
        assert await desk.outcomes() == ["upstream_error", "ok"]

    check(floor, "w2", steps)


def test_what_redis_forgot_with_its_last_second_is_recorded(floor: Stack) -> None:
    async def steps(desk: Desk) -> None:
        found = desk.begin("a")
        await desk.recorder.flush()
        await desk.gateway.delete(running_key(desk.worker))  # as after a kill within the second of the AOF
        desk.end(found)
        await desk.recorder.flush()
        assert await desk.outcomes() == ["ok"]

    check(floor, "w3", steps)


def test_a_flush_sent_again_is_applied_once(floor: Stack) -> None:
    """A timeout does not tell whether redis ran it."""
    async def steps(desk: Desk) -> None:
        desk.end(desk.begin("a"))
        sending = desk.recorder._next()
        assert sending is not None
        desk.recorder._sending = sending
        await desk.recorder.flush()
        desk.recorder._sending = sending
        desk.recorder._ended.append(record(desk.worker, "a"))  # as it was before the answer got lost
        await desk.recorder.flush()
        assert await desk.outcomes() == ["ok"]
        keys = [key async for key in desk.gateway.scan_iter(match=flushed_key("*"))]
        for _ in range(50):
            desk.end(desk.begin("x"))
            await desk.recorder.flush()
        assert [key async for key in desk.gateway.scan_iter(match=flushed_key("*"))] == keys, "one key a recorder (B2)"

    check(floor, "w4", steps)


def test_it_sleeps_while_nothing_happens_and_tries_again_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It woke twenty times a second for the rest of its life, beside engines that use every core."""
    class Redis:
        calls, away = 0, False

        async def eval(self, *_: object) -> None:
            self.calls += 1
            if self.away:
                raise RedisError("away")

        async def aclose(self) -> None: ...

    async def live() -> None:
        redis = Redis()
        recorder = Recorder(redis)  # type: ignore[arg-type]
        naps: list[float] = []
        real = asyncio.timeout
        monkeypatch.setattr(recorders.asyncio, "timeout", lambda s: (naps.append(s), real(s))[1])
        recorder.begin(record("w", "a"))
        await asyncio.sleep(0.12)
        assert redis.calls == len(naps) == 1, "it is shown, and then nobody wakes"
        redis.away = True
        recorder.end(record("w", "a"))
        await asyncio.sleep(0.1)
        assert redis.calls >= 2
        redis.away = False
        async with real(3):
            while recorder._ended:
                await asyncio.sleep(0.01)
        quiet = len(naps)
        await asyncio.sleep(0.2)
        assert len(naps) <= quiet + 1
        recorder.begin(record("w", "b"))
        recorder.end(record("w", "b"))
        await recorder.close()
        assert not recorder._ended

    monkeypatch.setattr(recorders, "RETRY_S", 0.05)
    asyncio.run(live())


def test_a_request_that_was_shown_as_begun_is_taken_back_however_much_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropped at its end, it stayed in running:{worker}, and whoever asked the same waited for it."""
    monkeypatch.setattr("common.recorder.MAX_UNWRITTEN", 2)

    class Away:
        away = False

        async def eval(self, *_: object) -> None:
            if self.away:
                raise RedisError("away")

    async def live() -> None:
        redis = Away()
        recorder = Recorder(redis)  # type: ignore[arg-type]
        long = record("w", "long")
        recorder.begin(long)
        await recorder.flush()
        redis.away = True
        for name in ("1", "2", "3"):
            short = record("w", name)
            recorder.begin(short)
            recorder.end(short)
        recorder.end(long)
        assert recorder.dropped == 1
        redis.away = False
        await recorder.flush()
        assert recorder._shown == set()

    asyncio.run(live())
