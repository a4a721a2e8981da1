"""What makes two requests the same question."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from common.answers.store import HEADER, PREFIX
from gateway.decode import Ask

IGNORED = frozenset({"stream", "stream_options", "user", "metadata"})
"""Fields that say nothing about the answer. Any other field, known or not, makes another question."""
ROUTES = frozenset({"chat", "completions"})
MAX_QUESTION_BYTES = 256 * 1024
"""The relay holds a body while it is answered; a larger one takes the fast path."""

_decode_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


@dataclass(frozen=True)
class Question:
    """What is asked (`name`), and in which shape the answer is wanted."""

    name: str
    route: str
    stream: bool
    usage: bool
    fresh: Callable[[], bool] = lambda: True
    """Whether the model is still the one that was asked: its workers may have been replaced meanwhile."""


def ask_question(
    route: str, ask: Ask, body: bytes, headers: list[tuple[bytes, bytes]], scope: str,
    revision_of: Callable[[str], str],
) -> Question | None:
    """The question in a request; None when it must not be answered from memory.

    `scope`: whose answers these are; `revision_of`: the digest of a model's files, empty when nobody knows it.
    """
    if route not in ROUTES or len(body) > MAX_QUESTION_BYTES:
        return None
    wanted = ask.temperature == 0 or ask.seed is not None
    for name, value in headers:
        if name == HEADER and value == b"use":
            wanted = True
        elif name == b"cache-control" and b"no-store" in value:
            return None
    if not wanted or not (revision := revision_of(ask.model)):
        return None
    fields = _decode_raw(body)
    options = fields.get("stream_options")
    if options is not None and bytes(options) != b"null" and set(_decode_raw(options)) - {"include_usage"}:
        return None
    digest = blake2b(digest_size=32, person=b"owngpt answer v1")
    for part in (route, scope, revision):
        _feed(digest.update, part.encode())
    for field in sorted(fields.keys() - IGNORED):
        _feed(digest.update, field.encode())
        _feed(digest.update, msgspec.json.format(bytes(fields[field]), indent=-1))
    usage = bool(ask.stream_options and ask.stream_options.include_usage)
    stored_as, stream = PREFIX + digest.hexdigest(), bool(ask.stream)
    return Question(stored_as, route, stream, usage, lambda: revision_of(ask.model) == revision)


def _feed(update: Callable[[bytes], None], part: bytes) -> None:
    update(len(part).to_bytes(8, "little"))
    update(part)
