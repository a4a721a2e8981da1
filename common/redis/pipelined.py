"""redis for the request path: everybody's commands share one connection, and none waits for another's answer.

A command through redis-py's client costs 36 us of CPU, through this 8, and several times as much on a core that was
idle (docs/log.md). It knows single commands only; for everything else there is `connect.py`.
"""

import asyncio
from collections import deque
from typing import Any

import hiredis
from redis.asyncio.connection import SSLConnection, parse_url
from redis.exceptions import InvalidResponse, ResponseError

LOOK_AGAIN_S = 0.001

Command = tuple[str | bytes | int, ...]


class PipelinedRedis:
    """One connection, made when it is needed, and again after it broke. A reply later than `timeout_s` breaks it."""

    def __init__(self, url: str, username: str, password: str, timeout_s: float) -> None:
        self._at, self._login, self._timeout_s = parse_url(url), (username, password), timeout_s
        self._connecting = asyncio.Lock()
        self._connection: _Connection | None = None
        self._closed = False

    async def ask(self, *command: str | bytes | int) -> Any:
        """A command's reply, strings as bytes. Raises RedisError for an error reply, OSError when redis is away."""
        if self._connection is None or self._connection.broken is not None:
            await self._connect()
            assert self._connection is not None  # noqa: S101 - just made
        return await self._connection.ask(command)

    async def aclose(self) -> None:
        """Close the connection, for good; what waits fails."""
        self._closed = True
        if self._connection is not None:
            self._connection.abort(ConnectionError("closed"))

    async def _connect(self) -> None:
        async with asyncio.timeout(self._timeout_s), self._connecting:
            if self._connection is not None and self._connection.broken is None:
                return  # somebody else was first
            if self._closed:
                raise ConnectionError("closed")
            at, loop = self._at, asyncio.get_running_loop()
            make = lambda: _Connection(self._timeout_s)  # noqa: E731 - asyncio wants a factory
            if "path" in at:
                _, connection = await loop.create_unix_connection(make, at["path"])
            else:
                tls = at.get("connection_class") is SSLConnection
                _, connection = await loop.create_connection(make, at["host"], at.get("port", 6379), ssl=tls or None)
            try:
                await connection.ask(("AUTH", *self._login))
                if db := at.get("db"):
                    await connection.ask(("SELECT", db))
            except BaseException:
                connection.abort(ConnectionError("not logged in"))
                raise
            self._connection = connection
            if self._closed:
                connection.abort(ConnectionError("closed"))


class _Connection(asyncio.Protocol):
    """Replies come in the order of the commands."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(protocolError=InvalidResponse, replyError=ResponseError)
        self._waiting: deque[tuple[asyncio.Future[Any], float]] = deque()
        """Whoever waits for a reply, and until when."""
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.WriteTransport | None = None
        self.broken: Exception | None = None
        """Why it can not be used any more."""

    async def ask(self, command: Command) -> Any:
        """The reply to one command."""
        if self.broken is not None:
            raise self.broken
        assert self._transport is not None  # noqa: S101 - connected
        future = self._loop.create_future()
        self._transport.write(hiredis.pack_command(command))  # type: ignore[arg-type]  # its stub knows tuples of one only
        self._waiting.append((future, self._loop.time() + self._timeout_s))  # not before it could be written
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s, self._look_late)
        return await future

    def abort(self, reason: Exception) -> None:
        """Everybody who waits hears why."""
        if self.broken is None:
            self.broken = reason
        while self._waiting:
            future, _ = self._waiting.popleft()
            if not future.done():  # else whoever asked has left
                future.set_exception(self.broken)
        self._no_timer()
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.WriteTransport) -> None:  # type: ignore[override]  # what it always is
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.abort(ConnectionError(f"redis closed the connection: {exc}" if exc else "redis closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not False:
                future, _ = self._waiting.popleft()
                if future.done():
                    continue
                if isinstance(reply, Exception):
                    future.set_exception(reply)
                else:
                    future.set_result(reply)
        except (InvalidResponse, IndexError) as error:  # no redis, or more replies than commands
            self.abort(ConnectionError(f"redis talks nonsense: {error}"))
        if not self._waiting:
            self._no_timer()

    def _look_late(self, again: bool = False) -> None:
        """Whether the first of those who wait has waited too long, though nobody may be there to hear it.

        After a standstill of the loop timers come before what has arrived meanwhile (uvloop), so late is who is late
        `again`, after the loop has looked at its sockets.
        """
        self._timer = None
        if not self._waiting:
            return
        left_s = self._waiting[0][1] - self._loop.time()
        if left_s <= 0 and again:
            self.abort(TimeoutError(f"redis took longer than {self._timeout_s:g} s"))
        else:
            self._timer = self._loop.call_later(max(left_s, LOOK_AGAIN_S), self._look_late, left_s <= 0)

    def _no_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
