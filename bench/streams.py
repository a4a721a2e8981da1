"""A client for many streams that costs little: `python -m bench.streams URL KEY MODEL STREAMS SECONDS [FIELDS]`.

FIELDS is JSON for the body, as {"temperature": 0}. Every request asks something else.

Prints how many complete chunks arrived and how many streams ended otherwise than with `[DONE]`, as JSON.
"""

import asyncio
import json
import sys
import time
from urllib.parse import urlsplit


class Stream(asyncio.Protocol):
    """One connection that asks again whenever its stream is done, until the deadline."""

    received = failed = 0
    deadline = 0.0
    head = b""
    body: dict[str, object] = {}
    asked = open = 0
    finished: asyncio.Event

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.tail, self.bad, self.clean = transport, b"", False, False
        Stream.open += 1
        self.ask()

    def ask(self) -> None:
        Stream.asked += 1
        question = f"Tell me, in some detail, how a language model is served, for the {Stream.asked:09d}th time."
        body = json.dumps({**Stream.body, "messages": [{"role": "user", "content": question}]}).encode()
        self.transport.write(Stream.head % len(body) + body)

    def data_received(self, data: bytes) -> None:
        Stream.received += data.count(b"data: {")
        if data.startswith(b"HTTP/1.1") and not data.startswith(b"HTTP/1.1 200"):
            self.bad = True
            print(data[:300], file=sys.stderr)
            self.transport.close()
            return
        self.tail = (self.tail + data)[-24:]
        if self.tail.endswith(b"0\r\n\r\n"):
            if b"[DONE]" not in self.tail:
                Stream.failed += 1
            if time.monotonic() < Stream.deadline:
                self.tail = b""
                self.ask()
            else:
                self.clean = True
                self.transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        Stream.open -= 1
        Stream.failed += not self.clean
        if not Stream.open:
            Stream.finished.set()


async def main() -> None:
    url, key, model, streams, seconds, *fields = sys.argv[1:]
    parts = urlsplit(url)
    Stream.body = {"model": model, "stream": True, "max_tokens": 100, **json.loads(fields[0] if fields else "{}")}
    Stream.head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {key}\r\n"
        "Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    ).encode()
    Stream.finished = asyncio.Event()
    began = time.monotonic()
    Stream.deadline = began + float(seconds)
    loop = asyncio.get_running_loop()
    assert parts.hostname
    assert parts.port
    for _ in range(int(streams)):
        await loop.create_connection(Stream, parts.hostname, parts.port)
    await asyncio.wait_for(Stream.finished.wait(), float(seconds) + 60)
    print(json.dumps({"chunks": Stream.received, "failed": Stream.failed, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    asyncio.run(main())
