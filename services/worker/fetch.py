"""Bring a model from the hub before the worker starts: `python -m services.worker.fetch MODEL`.

Workers sit on a network without a way out, so this one-shot container downloads into the shared `hub` volume.
A folder needs nothing. Only safetensors weights are fetched: nothing that has to be unpickled.
"""

import argparse
import sys
from pathlib import Path

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m services.worker.fetch", description="Bring a model from the hub.")
    parser.add_argument("model", help="a checkpoint folder (nothing to do) or a hub name like org/model")
    model = parser.parse_args().model
    if Path(model).is_absolute():
        if not Path(model, "config.json").exists():
            sys.exit(f"fetch: MODEL={model}: no checkpoint (config.json) in that folder of the image or volume.")
        print(f"fetch: {model} is here")
        return
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(model, allow_patterns=PATTERNS)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        sys.exit(f"fetch: MODEL={model} cannot be downloaded: {str(error).splitlines()[0]} "
                 "(gated models, Llama among them, need HF_TOKEN in .env)")
    print(f"fetch: {model} is here")


if __name__ == "__main__":
    main()
