"""Aliases: a name of one's own for a model, switched or rolled back in one call, without a client noticing.

    PUT  /v1/aliases/{name}  {"model": "ft:…"}      from now on this model answers for the name
    POST /v1/aliases/{name}/rollback                the one before; again: back
"""

import time
from typing import Annotated

import msgspec
from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis

from common import errors
from common.aliases import Alias, read_aliases
from common.redis.names import ALIASES, CHANNEL_ALIASES
from common.redis.scripts import SWITCH

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"


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
