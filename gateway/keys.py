"""API keys: how one is made, stored and checked; and the command that manages them.

    python -m gateway.keys create alice      # prints the key, once
    python -m gateway.keys list
    python -m gateway.keys revoke 1a2b3c4d

A key is `ogpt_{id}_{secret}{checksum}`: the id finds the record, the checksum lets junk be refused without
asking redis. Only the SHA-256 of the whole key is stored; 256 random bits need no slower hash.
"""

import time
from typing import Annotated

import msgspec
import typer
from redis import Redis
from redis.exceptions import RedisError

from common.keys import ApiKey, make
from common.redis.names import CHANNEL_KEYS, api_key_key, response_key, response_sizes_key, responses_key
from common.redis.scripts import FORGET_RESPONSES
from common.settings import StateSettings


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
    redis.eval(FORGET_RESPONSES, 2, responses_key(key_id), response_sizes_key(key_id), response_key(key_id, ""))
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
