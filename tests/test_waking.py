"""Many who wait for one model that sleeps: they cost no more than one, and what ends one wait ends no other."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from redis.exceptions import ConnectionError as RedisAway

from common.errors import Unavailable
from common.workers import Heartbeat, Model, State, WorkerTable
from gateway import waking
from gateway.waking import Waking


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that runs in an event loop of its own."""
    @functools.wraps(test)
    def run(*args: Any, **more: Any) -> None:
        asyncio.run(test(*args, **more))

    return run


class CountingTable(WorkerTable):
    """Counts how often it is asked who serves."""

    asked = 0

    def serving(self, model: str) -> Any:
        self.asked += 1
        return super().serving(model)


class Room:
    def __init__(self, patience_s: float = 5.0) -> None:
        self.table = CountingTable()
        away = SimpleNamespace(pipeline=self._pipeline)
        self.wishes = 0
        self.waking = Waking(away, self.table, patience_s)  # type: ignore[arg-type]
        self.beat("asleep")

    def _pipeline(self, **_: object) -> Any:
        self.wishes += 1
        raise RedisAway("away")

    def beat(self, state: State) -> None:
        self.table.take(msgspec.json.encode(Heartbeat("w", "w:1", state, [Model("m", 1)])))

    def wait(self) -> asyncio.Task[None]:
        async def waited() -> None:
            await self.waking.wait("m", self.table.sleeping("m"))

        return asyncio.create_task(waited())


@in_a_loop
async def test_two_hundred_wait_and_one_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waking, "LOOK_EVERY_S", 0.02)
    room = Room()
    waiting = [room.wait() for _ in range(200)]
    await asyncio.sleep(0.3)
    assert 2 <= room.table.asked <= 20
    assert room.wishes == 1
    room.beat("ready")
    await asyncio.wait_for(asyncio.gather(*waiting), 1.0)
    await room.waking.close()


@in_a_loop
async def test_who_goes_away_takes_nobody_along_and_who_comes_next_waits_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waking, "LOOK_EVERY_S", 0.01)
    room = Room()
    first, second = room.wait(), room.wait()
    await asyncio.sleep(0.05)
    first.cancel()
    await asyncio.sleep(0.05)
    assert first.cancelled()
    assert not second.done()
    second.cancel()
    await asyncio.sleep(0.05)
    third = room.wait()
    await asyncio.sleep(0.05)
    assert not third.done(), "it does not take the end of an earlier wait for its own"
    room.beat("ready")
    await asyncio.wait_for(third, 1.0)
    await room.waking.close()


@in_a_loop
async def test_a_wish_that_is_over_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waking, "WISH_EVERY_S", 0.01)
    room = Room(patience_s=0.05)
    for made in (1, 2):
        before = room.wishes
        with pytest.raises(Unavailable, match="did not wake within"):
            await room.wait()
        assert room.wishes > before, f"wish {made}"
        await asyncio.sleep(0.1)
        assert all(task.done() for task in room.waking._wishing.values())
    await room.waking.close()
