"""A model's config.json, wherever the model is: in a folder, or where the hub's library keeps what was fetched."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def config(model: str, revision: str = "") -> Mapping[str, Any]:
    """The config.json of a folder or of a hub model that was fetched; empty when it is not on this machine."""
    path = Path(model) / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(model, "config.json", revision=revision or None)
        except HFValidationError:
            found = None
        if not isinstance(found, str):
            return {}
        path = Path(found)
    said: dict[str, Any] = json.loads(path.read_text())
    return said
