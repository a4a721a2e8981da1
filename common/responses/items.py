"""The items of a conversation: what a request's `input` is to an engine, and to whoever lists it.

Nothing here looks into an item further than its fields: what a client has made of it is the engine's business.
"""

from collections.abc import Sequence

import msgspec

from common.metering.rewrite import decode_raw
from common.responses.store import Link

_decode_raws = msgspec.json.Decoder(list[msgspec.Raw]).decode
_UNREADABLE = {"type": msgspec.Raw(b'"unreadable"')}


class _Output(msgspec.Struct):
    output: list[msgspec.Raw] = []


_decode_output = msgspec.json.Decoder(_Output).decode


def read_input(said: msgspec.Raw) -> list[msgspec.Raw]:
    """The items of an `input`: a text is one message. Raises MsgspecError for anything else."""
    if bytes(said)[:1] == b'"':
        return [msgspec.Raw(b'{"type":"message","role":"user","content":' + bytes(said) + b"}")]
    return _decode_raws(said)


def flatten(links: Sequence[Link]) -> list[msgspec.Raw]:
    """Everything that was said, oldest first: what went in and what came out, turn by turn."""
    return [item for link in links for item in (*_decode_raws(link.items), *_decode_output(link.response).output)]


def context(links: Sequence[Link]) -> list[msgspec.Raw]:
    """What the last turn answered: everything before it, and its own input."""
    *before, last = links
    return [*flatten(before), *_decode_raws(last.items)]


def shown(item: msgspec.Raw, name: str) -> bytes:
    """An item as a listing shows it: named by its place, a message's text as a part."""
    try:
        said = decode_raw(item)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        said = _UNREADABLE
    fields = {"type": msgspec.Raw(b'"message"')} | {k: v for k, v in said.items() if bytes(v) != b"null"}
    fields["id"] = msgspec.Raw(msgspec.json.encode(name))
    if bytes(fields["type"]) == b'"message"':
        fields.setdefault("status", msgspec.Raw(b'"completed"'))
        text = bytes(fields.get("content", b""))
        if text[:1] == b'"':
            kind = b"output_text" if bytes(fields.get("role", b"")) == b'"assistant"' else b"input_text"
            fields["content"] = msgspec.Raw(b'[{"type":"%s","text":%s}]' % (kind, text))
    return msgspec.json.encode(fields)
