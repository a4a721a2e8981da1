"""API keys: how one is made, stored and checked.

A key is `ogpt_{id}_{secret}{checksum}`: the id finds the record, the checksum lets junk be refused without
asking redis. Only the SHA-256 of the whole key is stored; 256 random bits need no slower hash.
"""

import hmac
import re
import secrets
import string
import time
import zlib
from hashlib import sha256

import msgspec

PREFIX = "ogpt"
_ALPHABET = string.ascii_letters + string.digits
_SHAPE = re.compile(rf"{PREFIX}_([0-9a-f]{{8}})_([A-Za-z0-9]{{43}})([0-9a-f]{{8}})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}")


class ApiKey(msgspec.Struct):
    """What is stored of a key. `digest` is the SHA-256 of the whole key, hex; `created` is Unix time."""

    id: str
    name: str
    digest: str
    created: int
    scope: str = ""
    """Keys with the same scope share cached answers and KV blocks; empty: this key alone (`gateway/isolation.py`)."""


def _checksum(key_id: str, secret: str) -> str:
    return f"{zlib.crc32(f'{key_id}{secret}'.encode()):08x}"


def make(name: str, scope: str = "") -> tuple[str, ApiKey]:
    """A new key and its record. Raises ValueError for a name or scope that is not 1 to 64 plain characters."""
    for what, given in (("name", name), ("scope", scope or name)):
        if not _NAME.fullmatch(given):
            raise ValueError(f"a key's {what} is 1 to 64 letters, digits, spaces or . _ @ -; got {given!r}")
    key_id = secrets.token_hex(4)
    secret = "".join(secrets.choice(_ALPHABET) for _ in range(43))
    key = f"{PREFIX}_{key_id}_{secret}{_checksum(key_id, secret)}"
    return key, ApiKey(key_id, name, sha256(key.encode()).hexdigest(), int(time.time()), scope)


def key_id_of(key: str) -> str | None:
    """The id inside a well-formed key, or None: no lookup is worth it then."""
    match = _SHAPE.fullmatch(key)
    if match is None or match[3] != _checksum(match[1], match[2]):
        return None
    return match[1]


def matches(key: str, record: ApiKey) -> bool:
    """Whether a key is the one whose digest was stored, in constant time."""
    return hmac.compare_digest(sha256(key.encode()).hexdigest(), record.digest)
