"""In a container of its own, as containers.py starts it: one copy made and measured, below /models/own."""

import json
import os
import sys
from pathlib import Path

import msgspec
from rich.console import Console

from services.local.catalog import Entry
from services.local.compose import OWN
from services.local.errors import UserError
from services.local.plan import Dials, gpus_to_use
from services.tools.quantize import making, source, texts

STATE = Path("/tmp/state")  # noqa: S108 - a container's own


def main() -> None:
    """ENTRY: the model, as an entry of models.yaml. METHOD, DATA, MAX_PERPLEXITY_LOSS: as of make quantize.

    MODELS_DIR: what /models/own is called outside, for messages.
    """
    told = os.environ
    if "ENTRY" not in told:
        sys.exit("owngpt: this container is started by make quantize-compose METHOD=w8a8")
    entry, method = msgspec.convert(json.loads(told["ENTRY"]), Entry), told["METHOD"]
    data = Path(told["DATA"]) if told["DATA"] else None
    STATE.mkdir()
    try:
        dials = Dials(STATE, gpus=gpus_to_use())
        dials.models.symlink_to(OWN)
        rows = texts.split(data)
        with making.alone(dials.models / source.copy_name(entry, method)):
            making.make(entry, method, rows, float(told["MAX_PERPLEXITY_LOSS"]), dials, Console())
    except (UserError, OSError) as error:
        said = str(error)
        for inside in (str(STATE / "models"), str(OWN)):
            said = said.replace(inside, told["MODELS_DIR"])
        sys.exit(f"owngpt: {said}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
