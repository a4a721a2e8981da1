"""The redis protocol for large binary values: commands in a pipeline, payloads straight from and into memory.

redis-py connects and logs in; on its socket this module speaks RESP2 itself, because a client library copies every
value at least twice on its way (redis-py's GET: 0.28 GB/s by Redis' own measurement, and here every byte counts).
The socket blocks in the kernel, which keeps the time: a payload is one system call, so its thread takes part in the
scheduler process' struggle for the GIL once per payload, not once per buffer (0.5 to 0.8
GB/s against 0.22, docs/log.md).
Protocol: https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

import socket
import ssl
import struct
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

CONNECT_TIMEOUT_S = 0.2
SILENCE_TIMEOUT_S = 1.0
"""No byte for this long: the server is frozen or gone."""
SLOWEST_BYTES_PER_S = 10e6
"""A transfer below this rate for longer than SILENCE_TIMEOUT_S is given up: computing is as fast even on a CPU."""
BUFFER_BYTES = 64 * 1024
TIMEVAL = struct.Struct("ll")


class WireError(OSError):
    """The connection is of no use any more: lost, too slow, or out of step."""


class TooSlow(WireError):
    """The server is frozen, or slower than computing would be."""


class Wire:
    """One connection, used by one thread. After a WireError it is closed."""

    def __init__(self, url: str, username: str, password: str) -> None:
        client = Redis.from_url(
            url, username=username, password=password, protocol=2, retry=Retry(NoBackoff(), 0),
            socket_connect_timeout=CONNECT_TIMEOUT_S, socket_timeout=SILENCE_TIMEOUT_S, lib_name=None, lib_version=None,
        )
        pool: Any = client.connection_pool  # the connection's socket is not among its typed attributes
        self._connection = pool.make_connection()
        self._connection.connect()
        self._socket: socket.socket = self._connection._sock  # tests/test_kv.py notices when redis-py renames it
        self._socket.settimeout(None)
        self._whole = 0 if isinstance(self._socket, ssl.SSLSocket) else socket.MSG_WAITALL
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._start = self._end = 0
        self._deadline = 0.0

    def close(self) -> None:
        """Let go of the socket."""
        self._connection.disconnect()

    def sizes(self, names: Sequence[bytes]) -> list[int]:
        """STRLEN of each name; 0 for what is not there."""
        self._begin(0)
        self._send(b"".join(_command(b"STRLEN", name) for name in names))
        return [self._integer() for _ in names]

    def load(self, items: Sequence[tuple[bytes, memoryview]], header_bytes: int, ttl_s: int) -> list[bytes | None]:
        """GETEX each name into its memory. Returns headers; None for a value that is missing or has another size."""
        self._begin(sum(len(slot) for _, slot in items))
        expiry = str(ttl_s).encode()
        self._send(b"".join(_command(b"GETEX", name, b"EX", expiry) for name, _ in items))
        headers: list[bytes | None] = []
        for _, slot in items:
            size = self._bulk_size()
            if size == header_bytes + len(slot):
                header = bytearray(header_bytes)
                self._read_into(memoryview(header))
                self._read_into(slot)
                headers.append(bytes(header))
            else:
                self._skip(max(size, 0))
                headers.append(None)
            if size >= 0:
                self._end_of_bulk()
        return headers

    def store(self, items: Sequence[tuple[bytes, bytes, memoryview]], ttl_s: int) -> list[bool]:
        """SET each name to header + payload. Returns which ones the server took."""
        self._begin(sum(len(payload) for _, _, payload in items))
        tail = b"\r\n$2\r\nEX\r\n$%d\r\n%d\r\n" % (len(str(ttl_s)), ttl_s)
        for name, header, payload in items:
            head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name, len(header) + len(payload))
            self._send(head + header)
            self._send(payload)
            self._send(tail)
        return [self._line()[:1] == b"+" for _ in items]

    def see(self, names: Sequence[bytes], ttl_s: int) -> list[bool]:
        """Note each name as seen; whether it had been seen before."""
        self._begin(0)
        expiry = str(ttl_s).encode()
        self._send(b"".join(_command(b"SET", name, b"1", b"NX", b"EX", expiry) for name in names))
        return [self._line() == b"$-1" for _ in names]

    def refresh(self, names: Sequence[bytes], ttl_s: int) -> None:
        """Give each name its whole life again."""
        self._begin(0)
        self._send(b"".join(_command(b"EXPIRE", name, str(ttl_s).encode()) for name in names))
        for _ in names:
            self._integer()

    def fill(self) -> float:
        """Share of `maxmemory` in use; 0 without a limit."""
        self._begin(0)
        self._send(_command(b"INFO", b"memory"))
        size = self._bulk_size()
        text = bytearray(max(size, 0))
        self._read_into(memoryview(text))
        self._end_of_bulk()
        info = dict(line.partition(":")[::2] for line in text.decode().splitlines())
        limit = int(info.get("maxmemory", "0"))
        return int(info.get("used_memory", "0")) / limit if limit else 0.0

    # --- bytes ---------------------------------------------------------------------------------

    def _begin(self, payload_bytes: int) -> None:
        self._deadline = time.monotonic() + SILENCE_TIMEOUT_S + payload_bytes / SLOWEST_BYTES_PER_S

    def _wait_at_most(self, direction: int, size_bytes: int) -> None:
        """Let the kernel give up the next call in time (`direction`: SO_RCVTIMEO or SO_SNDTIMEO)."""
        left = min(self._deadline - time.monotonic(), SILENCE_TIMEOUT_S + size_bytes / SLOWEST_BYTES_PER_S)
        if left <= 0:
            raise TimeoutError
        self._socket.setsockopt(socket.SOL_SOCKET, direction, TIMEVAL.pack(int(left), max(1, int(left % 1 * 1e6))))

    def _send(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        try:
            while view:
                self._wait_at_most(socket.SO_SNDTIMEO, len(view))
                view = view[self._socket.send(view):]
        except OSError as error:
            self._fail(error)

    def _receive(self, into: memoryview, flags: int = 0) -> int:
        try:
            self._wait_at_most(socket.SO_RCVTIMEO, len(into) if flags else 0)
            count = self._socket.recv_into(into, 0, flags)
        except OSError as error:
            self._fail(error)
        if count == 0:
            self._fail(WireError("the server closed the connection"))
        return count

    def _fail(self, error: OSError) -> NoReturn:
        self.close()
        timed_out = isinstance(error, (TimeoutError, BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError))
        if timed_out:
            raise TooSlow(f"{SILENCE_TIMEOUT_S:g} s and more without enough bytes") from error
        raise WireError(str(error) or type(error).__name__) from error

    def _line(self) -> bytes:
        while True:
            data = bytes(self._buffer[self._start : self._end])
            at = data.find(b"\r\n")
            if at >= 0:
                self._start += at + 2
                return data[:at]
            if len(data) == BUFFER_BYTES:
                self._fail(WireError("a reply line without an end"))
            self._buffer[: len(data)] = data
            self._start, self._end = 0, len(data)
            self._end += self._receive(self._buffer[self._end :])

    def _read_into(self, view: memoryview) -> None:
        ready = min(self._end - self._start, len(view))
        view[:ready] = self._buffer[self._start : self._start + ready]
        self._start += ready
        while ready < len(view):
            ready += self._receive(view[ready:], self._whole)

    def _skip(self, count: int) -> None:
        scrap = memoryview(bytearray(min(count, BUFFER_BYTES)))
        while count:
            part = scrap[: min(count, len(scrap))]
            self._read_into(part)
            count -= len(part)

    def _bulk_size(self) -> int:
        """-1: no such key. An error reply counts as that, too: this value is of no use."""
        line = self._line()
        if line[:1] == b"-":
            return -1
        if line[:1] != b"$":
            self._fail(WireError("out of step: not a bulk reply"))
        return int(line[1:])

    def _end_of_bulk(self) -> None:
        end = bytearray(2)
        self._read_into(memoryview(end))
        if end != b"\r\n":
            self._fail(WireError("out of step: no end of a bulk reply"))

    def _integer(self) -> int:
        """An error reply (a key of another type) counts as 0."""
        line = self._line()
        return int(line[1:]) if line[:1] == b":" else 0


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
