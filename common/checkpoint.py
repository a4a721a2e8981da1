"""A model's config.json, wherever the model is: in a folder, or where the hub's library keeps what was fetched."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import formats

MADE = "quantised.json"
"""In a folder that `make quantize` made: of what, how, and what the gate measured."""


def served_name(chosen: str, model: str) -> str:
    """A model's public name: the one chosen for it, else the last part of its folder or hub name."""
    return chosen or Path(model).name.lower()


def config(model: str, revision: str = "") -> Mapping[str, Any]:
    """The config.json of a folder or of a hub model that was fetched; empty when it is not on this machine."""
    folder = _folder(model, revision)
    said: dict[str, Any] = json.loads((folder / "config.json").read_text()) if folder is not None else {}
    return said


def weights_bytes(model: str, revision: str = "") -> int:
    """The size of its safetensors files; 0 when it is not on this machine."""
    folder = _folder(model, revision)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder is not None else 0


def original(model: str, revision: str = "") -> tuple[str, str]:
    """(model, revision) of which `make quantize` made this one; itself, where it was made by nobody of ours."""
    said = _made(model)
    return (str(said["original"]), str(said["revision"])) if said else (model, revision)


def format_name(model: str, revision: str = "") -> str:
    """How its weights are stored: bf16, w8a8, gptq; empty when it is not on this machine, or says nothing sensible."""
    if said := _made(model):
        return str(said["method"])
    try:
        found = config(model, revision)
        return formats.of(found).name if found else ""
    except (OSError, ValueError, TypeError, AttributeError):
        return ""


def _made(model: str) -> Mapping[str, Any]:
    """MADE of a folder; empty where there is none, or one that `make quantize` did not write whole."""
    try:
        said: Any = json.loads((Path(model) / MADE).read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) and {"original", "revision", "method"} <= said.keys() else {}


def _folder(model: str, revision: str) -> Path | None:
    """Where its config.json is."""
    if (Path(model) / "config.json").is_file():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision or None)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
