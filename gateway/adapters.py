"""The registry of tuned models, what every worker should have loaded; and the aliases of models.

    adapters    hash, model name -> JSON `Adapter`      written by the trainer, removed by the jobs service
    aliases     hash, alias -> JSON `Alias`             written by the jobs service, followed by gateways

A worker's agent compares it with what its engine has, once a second, and loads or unloads the difference. Names and
folders are made by us and never used twice: vLLM keeps prefix blocks by name.
"""

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from loguru import logger
from redis.asyncio import Redis

ADAPTERS = "adapters"
ALIASES = "aliases"
CHANNEL_ALIASES = "aliases"
_FOLDER = re.compile(r"ftjob-[0-9a-f]{24}")


class Adapter(msgspec.Struct, frozen=True):
    """A published LoRA adapter. Its files are ADAPTERS_DIR/{folder}."""

    name: str
    """What clients call it: ft:base:suffix:id."""
    folder: str
    base: str
    """The public name of the model it was trained on."""
    digest: str
    """SHA-256 of its weights and configuration, hex."""
    owner: str
    """The API key whose job made it."""
    created: int


def model_name(base: str, suffix: str | None, job_id: str) -> str:
    """A tuned model's name, as OpenAI writes them: ft:base:suffix:id."""
    return f"ft:{base}:{suffix or ''}:{job_id.rpartition('-')[2][:12]}"


def read_registry(raw: Mapping[Any, Any]) -> dict[str, Adapter]:
    """The registry by name. An entry that is not one of ours is left out: its folder would become a path."""
    found = {}
    for name, text in raw.items():
        try:
            adapter = msgspec.json.decode(text, type=Adapter)
        except msgspec.MsgspecError as error:
            logger.warning("ignored a malformed adapter", name=name, error=str(error))
            continue
        if adapter.name == name and _FOLDER.fullmatch(adapter.folder):
            found[name] = adapter
    return found


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
