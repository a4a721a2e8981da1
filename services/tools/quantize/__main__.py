"""In a container of its own, as containers.py starts it: one copy made and measured, below /models/own."""

import json
import os
import sys
from pathlib import Path

import msgspec
from rich.console import Console

from services.local.catalog import Entry
from services.local.errors import UserError
from services.local.plan import Dials, gpus_to_use
from services.tools.quantize import making

STATE = Path("/tmp/state")  # noqa: S108 - a container's own


def main() -> None:
    """ENTRY: the model, as an entry of models.yaml. METHOD, DATA, MAX_PERPLEXITY_LOSS: as of make quantize."""
    told = os.environ
    entry = msgspec.convert(json.loads(told["ENTRY"]), Entry)
    data = Path(told["DATA"]) if told.get("DATA") else None
    STATE.mkdir()
    try:
        dials = Dials(STATE, gpus=gpus_to_use())
        dials.models.symlink_to("/models/own")
        making.make(entry, told["METHOD"], data, float(told["MAX_PERPLEXITY_LOSS"]), dials, Console())
    except UserError as error:
        sys.exit(f"owngpt: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
