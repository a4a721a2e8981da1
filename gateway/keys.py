"""API keys: how one is made, stored and checked; and the command that manages them.

    python -m gateway.keys create alice      # prints the key, once
    python -m gateway.keys list
    python -m gateway.keys revoke 1a2b3c4d

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
from typing import Annotated

import msgspec
import typer
from redis import Redis
from redis.exceptions import RedisError

from gateway.settings import StateSettings
from gateway.store import CHANNEL_KEYS, api_key_key

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
    """Keys with the same scope share cached answers and KV blocks; empty: this key alone (`isolation.py`)."""


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


class _CliSettings(StateSettings):
    redis_user: str = "gateway"


def _redis() -> Redis:
    settings = _CliSettings()  # filled from the environment
    return Redis.from_url(
        settings.redis_url,
        username=settings.redis_user,
        password=settings.redis_password,
        decode_responses=True,
        socket_timeout=5,
    )


app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True, add_completion=False)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Who the key is for, as it appears in logs and usage.")],
    scope: Annotated[
        str, typer.Option(help="Share cached answers and KV blocks with every key of this scope. Default: with none.")
    ] = "",
) -> None:
    """Make a key and print it. It is not shown again."""
    try:
        key, record = make(name, scope)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if not _redis().set(api_key_key(record.id), msgspec.json.encode(record), nx=True):
        raise ValueError("the new key's id was taken by chance; run the command again")
    typer.echo(key)


@app.command("list")
def list_() -> None:
    """Show the keys there are: id, creation date, name, and the cache scope if it is shared."""
    redis = _redis()
    for name in sorted(redis.scan_iter(match=api_key_key("*"), count=1000)):
        if (raw := redis.get(name)) is not None:
            record = msgspec.json.decode(raw, type=ApiKey)
            typer.echo(f"{record.id}  {time.strftime('%Y-%m-%d', time.gmtime(record.created))}  {record.name}"
                       + (f"  (scope {record.scope})" if record.scope else ""))


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="The key's id, as `list` shows it.")]) -> None:
    """Make a key useless within a second."""
    redis = _redis()
    if not redis.delete(api_key_key(key_id)):
        typer.echo(f"There is no key with the id {key_id!r}; `list` shows those there are.", err=True)
        raise typer.Exit(1)
    redis.publish(CHANNEL_KEYS, key_id)
    typer.echo(f"revoked {key_id}")


def main() -> None:
    """The command, without tracebacks for what a user can cause."""
    try:
        app()
    except (RedisError, ValueError) as error:
        typer.echo(f"keys: {error}", err=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
