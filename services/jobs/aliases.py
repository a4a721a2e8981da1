"""Aliases: a name of one's own for a model, switched or rolled back in one call, without a client noticing.

    PUT  /v1/aliases/{name}  {"model": "ft:…"}      from now on this model answers for the name
    POST /v1/aliases/{name}/rollback                the one before; again: back
"""

import time
from typing import Annotated

import msgspec
from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis

from gateway import errors
from gateway.adapters import ALIASES, CHANNEL_ALIASES, Alias, read_aliases

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"

SWITCH = """
-- KEYS[1] the aliases; ARGV: name, owner, model ('': the previous one), now in s, channel
local raw = redis.call('HGET', KEYS[1], ARGV[1])
local alias = raw and cjson.decode(raw) or {name = ARGV[1], owner = ARGV[2], model = '', previous = ''}
if alias.owner ~= ARGV[2] then return 'taken' end
local model = ARGV[3]
if model == '' then model = alias.previous end
if model == '' then return 'none' end
if model ~= alias.model then
    alias.previous, alias.model, alias.changed_at = alias.model, model, tonumber(ARGV[4])
end
local text = cjson.encode(alias)
redis.call('HSET', KEYS[1], ARGV[1], text)
redis.call('PUBLISH', ARGV[5], text)
return text
"""


class PutAlias(BaseModel):
    """The body of PUT /v1/aliases/{name}."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[str, Field(min_length=1, max_length=256)]


class Aliases:
    """Aliases of all owners."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def all(self) -> dict[str, Alias]:
        """Every alias by its name."""
        return read_aliases(await self._redis.hgetall(ALIASES))

    async def get(self, name: str, owner: str) -> Alias:
        """An alias of this owner. Raises NotFound."""
        alias = (await self.all()).get(name)
        if alias is None or alias.owner != owner:
            raise errors.NotFound(f"There is no alias {name!r} of yours.", code="alias_not_found")
        return alias

    async def switch(self, name: str, model: str, owner: str) -> Alias:
        """Let `model` answer for a name; the one before is remembered. Raises InvalidRequest for another key's name."""
        return await self._run(name, owner, model)

    async def rollback(self, name: str, owner: str) -> Alias:
        """Back to the model before. Raises InvalidRequest when there was none."""
        await self.get(name, owner)
        return await self._run(name, owner, "")

    async def delete(self, alias: Alias) -> None:
        """From now on nothing answers for the name."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hdel(ALIASES, alias.name)
            pipe.publish(CHANNEL_ALIASES, msgspec.json.encode(msgspec.structs.replace(alias, model="")))
            await pipe.execute()

    async def _run(self, name: str, owner: str, model: str) -> Alias:
        said = await self._redis.eval(SWITCH, 1, ALIASES, name, owner, model, str(int(time.time())), CHANNEL_ALIASES)
        if said == "taken":
            raise errors.InvalidRequest(f"The alias {name!r} belongs to another key.", code="alias_taken")
        if said == "none":
            raise errors.InvalidRequest(f"The alias {name!r} had no other model before.", code="no_previous_model")
        return msgspec.json.decode(said, type=Alias)


def public(alias: Alias) -> dict[str, object]:
    """As clients see it."""
    return {
        "id": alias.name, "object": "alias", "model": alias.model, "previous": alias.previous or None,
        "changed_at": alias.changed_at,
    }  # fmt: skip
