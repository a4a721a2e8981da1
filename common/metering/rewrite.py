"""What a request's body asks for, and changes to it that leave every other value as it was."""

from collections.abc import Collection, Mapping
from hashlib import blake2b

import msgspec

from common.metering.usage import StreamOptions

decode_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
NULL = msgspec.Raw(b"null")


def rewrite(
    body: bytes, *, usage: bool = False, salt: str = "", model: str = "", without: Collection[str] = (),
    fields: Mapping[str, object] | None = None, defaults: Mapping[str, object] | None = None,
) -> bytes:
    """The body with `stream_options.include_usage` true, a `cache_salt`, another model, `without` some fields, with
    others set, or set where they are not.

    Every other value keeps its very bytes.

    A client's own `cache_salt` divides its scope further; it never leads out of it. What is no JSON object is left to
    the engine to refuse.
    """
    try:
        document = decode_raw(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return body
    if usage:
        options = document.get("stream_options", NULL)
        document["stream_options"] = msgspec.Raw(msgspec.json.encode(
            {**(decode_raw(options) if options != NULL else {}), "include_usage": True}
        ))
    if salt:
        own = document.get("cache_salt", NULL)
        if own != NULL:
            salt = blake2b(bytes(own), digest_size=16, key=salt.encode()).hexdigest()
        document["cache_salt"] = msgspec.Raw(b'"%s"' % salt.encode())
    for name in without:
        document.pop(name, None)
    for name, value in (defaults or {}).items():
        document.setdefault(name, msgspec.Raw(msgspec.json.encode(value)))
    for name, value in (fields or {}).items():
        document[name] = msgspec.Raw(msgspec.json.encode(value))
    if model:
        document["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(document)


class Wants(msgspec.Struct):
    """What a body asks for, as far as it is rewritten for it."""

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None


_decode_wants = msgspec.json.Decoder(Wants).decode


def read_wants(body: bytes) -> Wants:
    """What a body asks for; nothing, where it cannot be read: the engine will refuse it."""
    try:
        return _decode_wants(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Wants()
