"""The request path's own connection to redis-cache, with a real one that is killed, frozen and told lies."""

import asyncio
import contextlib
import signal
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from redis.exceptions import RedisError, ResponseError

from common.redis.pipelined import PipelinedRedis
from tests.harness import Cache


@pytest.fixture
def cache() -> Iterator[Cache]:
    with tempfile.TemporaryDirectory(prefix="c-") as folder:  # a socket's path is short
        cache = Cache(Path(folder))
        yield cache
        cache.process.send_signal(signal.SIGCONT)
        cache.kill()


@contextlib.asynccontextmanager
async def connected(cache: Cache, password: str = "", timeout_s: float = 0.3) -> AsyncIterator[PipelinedRedis]:
    known = (cache.folder / "secrets/gateway/redis_password").read_text().strip()
    redis = PipelinedRedis(cache.url, "gateway", password or known, timeout_s)
    try:
        yield redis
    finally:
        await redis.aclose()


async def failure(asked: Awaitable[object]) -> Exception:
    """What a command fails with, in good time."""
    with pytest.raises((RedisError, OSError)) as caught:
        await asyncio.wait_for(asked, 2)
    return caught.value


def test_everybody_gets_the_reply_to_his_own_command(cache: Cache) -> None:
    async def ask() -> None:
        async with connected(cache) as redis:
            await asyncio.gather(*(redis.ask("SET", f"answer:{n}", b"\0%d\r\n" % n, "EX", 60) for n in range(500)))
            found = await asyncio.gather(*(redis.ask("MGET", f"answer:{n}", "answer:none") for n in range(500)))
        assert found == [[b"\0%d\r\n" % n, None] for n in range(500)]
        assert cache.client().info("stats")["total_connections_received"] < 5, "one connection for all"

    asyncio.run(ask())


def test_an_error_reply_and_whoever_leaves_disturb_nobody(cache: Cache) -> None:
    async def ask() -> None:
        async with connected(cache) as redis:
            await redis.ask("SET", "answer:a", "1")
            leaving = asyncio.create_task(redis.ask("GET", "answer:a"))
            await asyncio.sleep(0)
            leaving.cancel()
            refused, found = await asyncio.gather(redis.ask("FLUSHALL"), redis.ask("GET", "answer:a"), return_exceptions=True)
            assert isinstance(refused, ResponseError), "a gateway may not"
            assert found == b"1"

    asyncio.run(ask())


def test_killed_and_back(cache: Cache) -> None:
    async def ask() -> None:
        async with connected(cache) as redis:
            await redis.ask("SET", "answer:a", "1")
            cache.process.send_signal(signal.SIGSTOP)
            waiting = asyncio.create_task(redis.ask("GET", "answer:a"))
            await asyncio.sleep(0.05)
            cache.kill()
            assert isinstance(await failure(waiting), ConnectionError)
            assert isinstance(await failure(redis.ask("GET", "answer:a")), OSError)
            cache.start()
            assert await redis.ask("GET", "answer:a") is None

    asyncio.run(ask())


def test_frozen_and_back(cache: Cache) -> None:
    async def ask() -> None:
        async with connected(cache) as redis:
            await redis.ask("SET", "answer:a", "1")
            cache.process.send_signal(signal.SIGSTOP)
            began = time.monotonic()
            for _ in range(2):  # on the connection that there is; then on one that nobody logs in
                failures = await asyncio.gather(*(failure(redis.ask("GET", "answer:a")) for _ in range(20)))
                assert [type(each) for each in failures] == [TimeoutError] * 20
            assert time.monotonic() - began < 1, "nobody waits for the others' time to be over"
            cache.process.send_signal(signal.SIGCONT)
            assert await redis.ask("GET", "answer:a") == b"1"

    asyncio.run(ask())


def test_a_wrong_password_is_said_and_tried_again(cache: Cache) -> None:
    async def ask() -> None:
        async with connected(cache, password="wrong") as redis:
            for _ in range(3):
                assert "WRONGPASS" in str(await failure(redis.ask("GET", "answer:a")))
        await asyncio.sleep(0.1)
        assert len(cache.client().client_list()) == 1, "no connection is left behind"

    asyncio.run(ask())


@pytest.mark.parametrize("lie", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+OK\r\n+OK\r\n+OK\r\n+OK\r\n", b""])
def test_what_is_no_redis_is_away(tmp_path: Path, lie: bytes) -> None:
    """Says something else, says more than it was asked for, hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = server.accept()
                    with peer:
                        peer.recv(1000)
                        peer.sendall(lie)
                        peer.recv(1000) if lie else None

        thread = threading.Thread(target=serve)
        thread.start()

        async def ask() -> None:
            redis = PipelinedRedis(f"redis://127.0.0.1:{server.getsockname()[1]}/0", "u", "p", 0.3)
            for _ in range(2):
                assert isinstance(await failure(redis.ask("GET", "a")), OSError)
            await redis.aclose()

        asyncio.run(ask())
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_nobody_listens(tmp_path: Path) -> None:
    async def ask(url: str) -> None:
        assert isinstance(await failure(PipelinedRedis(url, "u", "p", 0.3).ask("GET", "a")), OSError)

    asyncio.run(ask(f"unix://{tmp_path}/none.sock"))
    asyncio.run(ask("redis://127.0.0.1:1/0"))


def test_whoever_leaves_leaves_a_frozen_redis_to_be_found_out(cache: Cache) -> None:
    """Else what was asked piles up behind it."""
    async def ask() -> None:
        async with connected(cache) as redis:
            await redis.ask("GET", "answer:a")
            cache.process.send_signal(signal.SIGSTOP)
            for _ in range(5):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(redis.ask("GET", "answer:a"), 0.1)
            connection = redis._connection
            assert connection is not None
            assert isinstance(connection.broken, TimeoutError)
            assert not connection._waiting

    asyncio.run(ask())


def test_a_command_that_cannot_be_written_shifts_no_reply(cache: Cache) -> None:
    async def ask() -> None:
        async with connected(cache) as redis:
            await redis.ask("SET", "answer:a", "1")
            with pytest.raises(UnicodeEncodeError):
                await redis.ask("GET", "answer:\ud800")
            assert await redis.ask("GET", "answer:a") == b"1"

    asyncio.run(ask())


def test_a_reply_in_pieces_and_another_database() -> None:
    said: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for reply in (b"+OK\r\n", b"+OK\r\n", b"$5\r\nab\r\nc\r\n"):
            said.append(await reader.read(1000))
            for at in range(len(reply)):
                writer.write(reply[at : at + 1])
                await writer.drain()
                await asyncio.sleep(0.001)
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            redis = PipelinedRedis(f"redis://127.0.0.1:{port}/7", "u", "p", 1.0)
            assert await redis.ask("GET", "a") == b"ab\r\nc"
            await redis.aclose()
            assert isinstance(await failure(redis.ask("GET", "a")), ConnectionError), "closed is closed"
        assert [b"SELECT" in each for each in said] == [False, True, False]

    asyncio.run(ask())


def test_it_closes_while_somebody_waits(cache: Cache) -> None:
    async def ask() -> None:
        async with connected(cache) as redis:
            await redis.ask("GET", "answer:a")
            cache.process.send_signal(signal.SIGSTOP)
            waiting = asyncio.create_task(redis.ask("GET", "answer:a"))
            await asyncio.sleep(0.05)
        assert isinstance(await failure(waiting), ConnectionError)

    asyncio.run(ask())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_loop_that_stood_still_is_no_slow_redis(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """uvloop runs timers before it looks at its sockets: the reply that had come long before was called late."""
    async def live() -> None:
        def stand_still() -> None:
            until = time.monotonic() + 0.3
            while time.monotonic() < until:
                pass

        with socket.create_server(("127.0.0.1", 0)) as server:
            port, stop = server.getsockname()[1], threading.Event()

            def serve() -> None:
                talk, _ = server.accept()
                while not stop.is_set() and talk.recv(1000):
                    talk.sendall(b"+OK\r\n")
                talk.close()

            thread = threading.Thread(target=serve)
            thread.start()
            redis = PipelinedRedis(f"redis://127.0.0.1:{port}", "u", "p", 0.2)
            assert await redis.ask("PING") == b"OK"
            left, right = socket.socketpair()
            left.setblocking(False)

            class Busy(asyncio.Protocol):
                def data_received(self, data: bytes) -> None:
                    stand_still()

            await asyncio.get_running_loop().create_connection(Busy, sock=left)
            asking = asyncio.create_task(redis.ask("GET", "a"))
            await asyncio.sleep(0)
            right.send(b"busy")
            try:
                assert await asking == b"OK"
            finally:
                stop.set()
                await redis.aclose()
                await asyncio.to_thread(thread.join)
                right.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(live())
