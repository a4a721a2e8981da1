"""Aliases of models: what the jobs service writes down and gateways follow."""

from collections.abc import Mapping
from typing import Any

import msgspec
from redis.asyncio import Redis

from common.redis.names import ALIASES


class Alias(msgspec.Struct, frozen=True):
    """A name that stands for a model, and the model it stood for before (empty: none)."""

    name: str
    owner: str
    """The API key that made it; only this key changes it."""
    model: str
    """Empty in the message that says it is gone."""
    previous: str
    changed_at: int = 0


def read_aliases(raw: Mapping[Any, Any]) -> dict[str, Alias]:
    """The aliases by name."""
    return {name: msgspec.json.decode(text, type=Alias) for name, text in raw.items()}


class AliasTable:
    """What every alias stands for, kept in memory; changes come over CHANNEL_ALIASES."""

    def __init__(self) -> None:
        self.targets: dict[str, str] = {}

    def take(self, raw: str | bytes) -> None:
        """Take in one change."""
        alias = msgspec.json.decode(raw, type=Alias)
        if alias.model:
            self.targets[alias.name] = alias.model
        else:
            self.targets.pop(alias.name, None)

    async def load(self, redis: Redis) -> None:
        """Read them all."""
        known = read_aliases(await redis.hgetall(ALIASES))
        self.targets = {name: alias.model for name, alias in known.items()}
