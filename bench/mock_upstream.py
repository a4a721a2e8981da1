"""A worker that costs almost nothing: emits SSE chunks one by one, as vLLM writes them.

    python -m bench.mock_upstream PORT CHUNKS INTERVAL_S

One asyncio protocol, one timer for all streams; every chunk is its own write, so no proxy gets two at once.
"""

import asyncio
import sys

CHUNK = (
    b'data: {"id":"chatcmpl-0a31f911b0789ea4","object":"chat.completion.chunk","created":1795487476,"model":"mock",'
    b'"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
)
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
READY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


def framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Mock(asyncio.Protocol):
    """One connection; requests come one after another."""

    streams: set["Mock"] = set()
    chunks = 0
    framed_chunk = framed(CHUNK)
    end = framed(DONE) + b"0\r\n\r\n"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.buffer, self.left = transport, b"", 0

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = 0
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        if head.startswith(b"GET"):
            self.transport.write(READY)
            return
        self.transport.write(HEAD)
        self.left = Mock.chunks
        Mock.streams.add(self)

    def connection_lost(self, _: Exception | None) -> None:
        Mock.streams.discard(self)

    def tick(self) -> None:
        if self.left:
            self.left -= 1
            self.transport.write(self.framed_chunk)
        else:
            self.transport.write(self.end)
            Mock.streams.discard(self)


async def main() -> None:
    port, Mock.chunks, interval_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    loop = asyncio.get_running_loop()
    await loop.create_server(Mock, "127.0.0.1", port, backlog=1024)
    slices = 10  # streams take turns within an interval, so that writes do not come in one burst
    turn = 0
    while True:
        await asyncio.sleep(interval_s / slices)
        turn = (turn + 1) % slices
        for stream in list(Mock.streams):
            if hash(stream) // 16 % slices == turn:
                stream.tick()


if __name__ == "__main__":
    asyncio.run(main())
