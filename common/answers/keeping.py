"""One answer on its way past: collected for the store, and not held up by a client that reads slowly."""

import asyncio
import contextlib
from collections import deque

import msgspec

from common.answers import transcript
from common.answers.store import Store
from common.answers.transcript import Document
from common.asgi import Message, Send
from common.metering.context import Keep

WORDINESS = 4
"""Events are wordier than the document they amount to."""


class Keeping:
    """A `send` that keeps a copy of an engine's answer, and lets the engine run ahead of its reader.

    Whoever asked the same waits for the stored answer, so a slow reader of this one must not hold it up. What waits
    for the reader is bounded as the answer is: an answer that is too large to be kept goes at its reader's pace.
    """

    def __init__(self, store: Store, keep: Keep, route: str, send: Send) -> None:
        self._store, self._keep, self._route, self._send = store, keep, route, send
        self._left = WORDINESS * keep.max_bytes
        self._parts: list[bytes] | None = []
        self._stream = False
        self._ahead: deque[Message] = deque()
        self._pump: asyncio.Task[None] | None = None

    def start(self, *, stream: bool) -> None:
        """A good answer begins."""
        self._stream = stream

    def add(self, chunk: bytes) -> None:
        """A piece of it, as the engine made it."""
        if self._parts is not None:
            self._parts.append(chunk)
            self._left -= len(chunk)
            if self._left < 0:
                self._parts = None

    async def send(self, message: Message) -> None:
        """Pass a message on, without waiting for the reader while the answer may still be kept."""
        self._ahead.append(message)
        if self._pump is None or self._pump.done():
            if self._pump is not None:
                self._pump.result()  # an error of the client's connection
            self._pump = asyncio.create_task(self._run())
        if self._parts is None:
            await self.drain()

    async def drain(self) -> None:
        """Until the reader has everything."""
        if self._pump is not None:
            await self._pump

    async def _run(self) -> None:
        while self._ahead:
            await self._send(self._ahead.popleft())

    async def store(self, *, whole: bool) -> None:
        """Write the answer down; `whole`: it came to its end, good or bad. A broken one leaves nothing."""
        if whole:
            document = self._document()
            await self._store.write(self._keep.name, document, self._keep.ttl_s, self._keep.max_bytes)

    def _document(self) -> Document | None:
        if self._parts is None:
            return None
        body = b"".join(self._parts)
        if self._stream:
            return transcript.from_events(self._route, body)
        with contextlib.suppress(msgspec.MsgspecError):
            document: Document = msgspec.json.decode(body, type=dict)
            if transcript.complete(document):
                return document
        return None
