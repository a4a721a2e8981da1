"""Who is asking: one look at redis for everybody, none before a request of a key in use, and no way in for what is revoked."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from redis.exceptions import RedisError

from common import auth
from common.auth import CACHE_S, STALE_S, Authenticator
from common.errors import Unauthorized, Unavailable
from common.keys import make
from common.redis.names import api_key_key


class Redis:
    """Keys in a dict; slow, frozen or away when told so."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.asked = 0
        self.away = False
        self.open = asyncio.Event()
        self.open.set()

    async def get(self, name: str) -> bytes | None:
        self.asked += 1
        await self.open.wait()
        if self.away:
            raise RedisError("away")
        return self.values.get(name)


class Desk:
    def __init__(self) -> None:
        self.redis, self.now = Redis(), 1000.0
        self.auth = Authenticator(self.redis, lambda: self.now)  # type: ignore[arg-type]
        self.header, self.id = self.add()

    def add(self) -> tuple[bytes, str]:
        key, record = make("me")
        self.redis.values[api_key_key(record.id)] = msgspec.json.encode(record)
        return f"Bearer {key}".encode(), record.id

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


def run(steps: Callable[[Desk], Awaitable[None]]) -> None:
    async def live() -> None:
        await steps(Desk())

    asyncio.run(live())


def test_one_look_for_all_who_ask_at_once() -> None:
    async def steps(desk: Desk) -> None:
        found = await asyncio.gather(*(desk.auth.check(desk.header) for _ in range(50)))
        assert {key.id for key in found} == {desk.id}
        assert desk.redis.asked == 1

    run(steps)


def test_whoever_leaves_ends_it_for_nobody_else() -> None:
    async def steps(desk: Desk) -> None:
        desk.redis.open.clear()
        leaving, staying = (asyncio.create_task(desk.auth.check(desk.header)) for _ in range(2))
        await desk.settle()
        leaving.cancel()
        await desk.settle()
        desk.redis.open.set()
        assert (await staying).id == desk.id

    run(steps)


def test_a_key_in_use_waits_for_no_redis() -> None:
    """A frozen redis cost 79 of 235 requests two to three seconds (B12)."""
    async def steps(desk: Desk) -> None:
        await desk.auth.check(desk.header)
        desk.now += CACHE_S + 1
        desk.redis.open.clear()  # frozen
        for _ in range(20):
            assert desk.auth.cached(desk.header) is not None
            assert (await asyncio.wait_for(desk.auth.check(desk.header), 0.1)).id == desk.id
        await desk.settle()
        assert desk.redis.asked == 2, "one looks for all"
        desk.redis.open.set()
        await desk.settle()
        assert desk.auth.cached(desk.header) is not None
        assert desk.redis.asked == 2, "and it is fresh again"
        desk.now += STALE_S + 1
        assert desk.auth.cached(desk.header) is None, "after so long it is looked up first"

    run(steps)


def test_a_revoked_key_is_found_out_by_the_look_beside_its_requests() -> None:
    async def steps(desk: Desk) -> None:
        await desk.auth.check(desk.header)
        desk.redis.values.clear()  # and nobody said so
        desk.now += CACHE_S + 1
        assert desk.auth.cached(desk.header) is not None
        await desk.settle()
        assert desk.auth.cached(desk.header) is None
        with pytest.raises(Unauthorized):
            await desk.auth.check(desk.header)

    run(steps)


def test_revoked_while_it_is_looked_up() -> None:
    async def steps(desk: Desk) -> None:
        desk.redis.open.clear()
        asking = asyncio.create_task(desk.auth.check(desk.header))
        await desk.settle()
        desk.auth.forget(desk.id)
        desk.redis.open.set()
        await asking
        assert desk.auth.cached(desk.header) is None

    run(steps)


def test_whoever_asks_after_a_revocation_joins_no_look_from_before() -> None:
    async def steps(desk: Desk) -> None:
        desk.redis.open.clear()
        before = asyncio.create_task(desk.auth.check(desk.header))
        await desk.settle()
        desk.auth.forget(desk.id)
        after = asyncio.create_task(desk.auth.check(desk.header))
        await desk.settle()
        assert desk.redis.asked == 2
        desk.redis.open.set()
        await asyncio.gather(before, after)
        assert not desk.auth._asking

    run(steps)


def test_redis_away_for_long_delays_no_key_in_use() -> None:
    """After five minutes each request waited for the look that failed."""
    async def steps(desk: Desk) -> None:
        await desk.auth.check(desk.header)
        desk.redis.away = True
        for _ in range(int(auth.GRACE_S / 20) - 1):
            desk.now += 20
            assert desk.auth.cached(desk.header) is not None
            await desk.settle()
        desk.now += 60
        assert desk.auth.cached(desk.header) is None, "but not for ever"

    run(steps)


def test_made_up_keys_push_out_no_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_CACHED", 10)

    async def steps(desk: Desk) -> None:
        await desk.auth.check(desk.header)
        for _ in range(50):
            made_up, _ = make("nobody")
            for _ in range(2):
                with pytest.raises(Unauthorized):
                    await desk.auth.check(f"Bearer {made_up}".encode())
        assert desk.auth.cached(desk.header) is not None
        assert desk.redis.asked == 51, "a refusal is remembered"
        assert len(desk.auth._refused) == 10
        assert not desk.auth._asking

    run(steps)


def test_redis_away() -> None:
    async def steps(desk: Desk) -> None:
        await desk.auth.check(desk.header)
        desk.auth.distrust()  # a revocation may have been missed: it is asked, and not answered
        desk.redis.away = True
        assert (await desk.auth.check(desk.header)).id == desk.id
        stranger, _ = desk.add()
        with pytest.raises(Unavailable):
            await desk.auth.check(stranger)
        desk.now += auth.GRACE_S + 1
        with pytest.raises(Unavailable):
            await desk.auth.check(desk.header)
        desk.redis.away = False
        assert (await desk.auth.check(stranger)).id != desk.id

    run(steps)


def test_a_refusal_from_before_a_reconnect_counts_for_nobody_after_it() -> None:
    """A redis that is being restored knows no keys yet; the good key was refused for half a minute more."""
    async def steps(desk: Desk) -> None:
        saved, desk.redis.values = desk.redis.values, {}
        desk.redis.open.clear()
        asking = asyncio.create_task(desk.auth.check(desk.header))
        await desk.settle()
        desk.auth.distrust()
        desk.redis.open.set()
        with pytest.raises(Unauthorized):
            await asking
        desk.redis.values = saved
        assert (await desk.auth.check(desk.header)).id == desk.id

    run(steps)
