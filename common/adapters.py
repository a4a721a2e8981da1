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


def is_ours(name: str) -> bool:
    """Whether a model's name is one that we give to adapters."""
    return name.startswith("ft:")


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
