"""What makes two requests the same question.

A request may be answered from memory when its answer is determined (temperature 0, or a seed), or when its client says
`X-OwnGPT-Cache: use`; never with `Cache-Control: no-store`. Two requests are the same question when the whole body is
equal but for `IGNORED`, the model and adapter are the same files, and the cache scope is the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from common.answers import transcript
from common.answers.store import HEADER, PREFIX
from common.answers.transcript import Document
from gateway.decode import Ask

IGNORED = frozenset({"stream", "stream_options", "user", "metadata"})
"""Fields that say nothing about the answer. Any other field, known or not, makes another question."""
ROUTES = frozenset({"chat", "completions"})
MAX_QUESTION_BYTES = 256 * 1024
"""Naming a question reads its body once more; a larger one is not worth it."""

_decode_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked (`name`), and in which shape the answer is wanted."""

    name: str
    route: str
    stream: bool
    usage: bool

    def render(self, document: Document, request_id: str) -> bytes | None:
        """An answer's bytes in the shape asked for, under the request's own id; None when that cannot be said."""
        kind = "chatcmpl" if self.route == "chat" else "cmpl"
        document = {**document, "id": f"{kind}-{request_id}"}
        if self.stream:
            return transcript.to_events(self.route, document, usage=self.usage)
        return msgspec.json.encode(document)


def may_be_remembered(route: str, ask: Ask, body: bytes, headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request wants an answer from memory."""
    if route not in ROUTES:
        return False
    if ask.temperature != 0 and ask.seed is None and headers.get(HEADER) != b"use":
        return False
    return len(body) <= MAX_QUESTION_BYTES and b"no-store" not in headers.get(b"cache-control", b"")


def ask_question(route: str, ask: Ask, model: str, body: bytes, scope: str, revision: str) -> Question | None:
    """The question in a request that may be remembered; None when its answer depends on more than it says.

    `model`: what the request's model, maybe an alias, stands for; `scope`: whose answers these are; `revision`: the
    digest of the model's files, empty when nobody knows it.
    """
    if not revision:
        return None
    fields = _decode_raw(body)
    options = fields.get("stream_options")
    if options is not None and bytes(options) != b"null" and set(_decode_raw(options)) - {"include_usage"}:
        return None
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    parts = [route.encode(), scope.encode(), revision.encode()]
    for field in sorted(fields.keys() - IGNORED):
        parts += (field.encode(), msgspec.json.format(bytes(fields[field]), indent=-1))
    said = b"".join([len(part).to_bytes(8, "little") + part for part in parts])
    digest = blake2b(said, digest_size=32, person=b"owngpt answer v1")
    usage = bool(ask.stream_options and ask.stream_options.include_usage)
    return Question(PREFIX + digest.hexdigest(), route, bool(ask.stream), usage)

