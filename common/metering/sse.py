"""Server-sent events as they come off a socket: cut anywhere, with LF or CRLF.

https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

import re
from collections.abc import Iterable, Iterator

MAX_HELD_BYTES = 8 * 1024 * 1024
"""A longer event passes in pieces."""
_BLANK = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
"""The end of a line and an empty one: where an event ends."""


class Whole:
    """Holds back the beginning of an event until its end has come."""

    def __init__(self) -> None:
        self._tail = b""

    def take(self, chunk: bytes, *, more: bool) -> bytes:
        """As many whole events as there are, their very bytes; without `more` everything that is left."""
        seen = max(0, len(self._tail) - 3)  # no event ends before
        if self._tail:
            chunk, self._tail = self._tail + chunk, b""
        if chunk.endswith(b"\n\n") or not more or len(chunk) > MAX_HELD_BYTES:
            return chunk
        cut = 0
        for blank in _BLANK.finditer(chunk, seen):
            if blank.end() < len(chunk) or not chunk.endswith(b"\r"):  # else its LF may be on its way
                cut = blank.end()
        self._tail = chunk[cut:]
        return chunk[:cut]


def is_stream(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a response with these headers is one of events."""
    return any(name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)


def split(events: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(event, its ending) one by one; the ending of the last one is empty when it was cut off."""
    at = 0
    for blank in _BLANK.finditer(events):
        yield events[at : blank.start()], blank.group()
        at = blank.end()
    if at < len(events):
        yield events[at:], b""


def data(event: bytes) -> bytes:
    """What an event's `data:` lines hold, without the space after the colon; empty when there is none."""
    if event.startswith(b"data: ") and b"\n" not in event and b"\r" not in event:  # how nearly all look
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines)
