"""Bring models from the hub before workers start: `python -m services.worker.fetch MODEL[@REVISION] ...`.

Workers sit on a network without a way out, so in compose this is a one-shot container that downloads into the shared
`hub` volume; `make up` calls it as well. A folder needs nothing. Only what vLLM and the trainer read is fetched:
nothing that has to be unpickled, and no second copy of the weights in Mistral's or Meta's own format, which vLLM would
prefer. What was broken off goes on where it was.
"""

import argparse
import fnmatch
import os
import shutil
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]
NOT_THESE = ["consolidated*", "params.json", "tekken.json", "tokenizer.model.v*", "original/*", "onnx/*", "openvino/*"]
SPARE_BYTES = 1_000_000_000
MODELS_FILE = Path("/models.yaml")
"""Where a container of compose sees the file."""
WANTED = Path("/models.wanted")
"""And what `make apply-compose` made of it: its digest, then a model a line."""


class Refused(Exception):
    """What is wrong, for the user."""


def wanted(name: str) -> bool:
    """Whether a file of a repository is brought."""
    return any(fnmatch.fnmatch(name, p) for p in PATTERNS) and not any(fnmatch.fnmatch(name, p) for p in NOT_THESE)


def bring(model: str, revision: str) -> Path:
    """Where it is now. Raises Refused."""
    if Path(model).is_absolute():
        if not Path(model, "config.json").exists():
            raise Refused(f"{model}: no checkpoint (config.json) in that folder of the image or volume.")
        return Path(model)
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        try:
            info = HfApi().model_info(model, revision=revision or None, files_metadata=True)
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403, 404):
                raise
            info = None
        except Exception:  # no way out: what is here is taken
            info = None
        if info is not None:
            check_disk(model, info.siblings or [], Path(constants.HF_HUB_CACHE))
        return Path(snapshot_download(
            model, revision=revision or None, allow_patterns=PATTERNS, ignore_patterns=NOT_THESE,
            local_files_only=info is None,
        ))  # fmt: skip
    except Refused:
        raise
    except Exception as error:  # the hub's library lets its network library's errors through
        at, said = f"@{revision}" if revision else "", (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refused(f"{model}{at} cannot be downloaded: {said} (gated models, Llama among them, need HF_TOKEN; what "
                      "was broken off goes on when you try again)") from error


def check_disk(model: str, files: list[Any], cache: Path) -> None:
    """Raise Refused when what is not here yet has no room."""
    blobs = cache / f"models--{model.replace('/', '--')}" / "blobs"
    missing = 0
    for file in files:
        if not wanted(file.rfilename) or not file.size:
            continue
        digest = file.lfs.sha256 if file.lfs else file.blob_id
        part = blobs / f"{digest}.incomplete"
        if not (blobs / str(digest)).exists():
            missing += file.size - (part.stat().st_size if part.exists() else 0)
    place = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if missing and free < missing + SPARE_BYTES:
        raise Refused(
            f"{model} needs {(missing + SPARE_BYTES) / 1e9:.1f} GB of disk, and {place} has {free / 1e9:.1f} GB free: "
            f"{(missing + SPARE_BYTES - free) / 1e9:.1f} GB are missing. "
            "Make room, or (without Docker) choose another HF_HOME."
        )


def check_drift() -> None:
    """Raise Refused when compose was told of another models.yaml than the one there is."""
    if not WANTED.is_file():
        return
    if sha256(MODELS_FILE.read_bytes()).hexdigest()[:12] != WANTED.read_text().splitlines()[0]:
        raise Refused("models.yaml was changed since `make apply-compose`; run that again.")


def told() -> list[str]:
    """The models that compose's file names, else that of the environment."""
    if WANTED.is_file():
        return WANTED.read_text().splitlines()[1:]
    one, revision = os.environ.get("MODEL", ""), os.environ.get("MODEL_REVISION", "")
    return [f"{one}@{revision}" if revision else one] if one else []


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m services.worker.fetch", description="Bring models from the hub.")
    parser.add_argument("models", nargs="*", help="a folder (nothing to do), or a hub name like org/model@revision; "
                        "without any: what models.yaml says, or MODEL and MODEL_REVISION in the environment")
    try:
        named = parser.parse_args().models
        if not named:
            check_drift()
        for said in named or told():
            model, _, revision = said.partition("@")
            print(f"fetch: {model} is in {bring(model, revision)}")
    except Refused as error:
        sys.exit(f"fetch: {error}")


if __name__ == "__main__":
    main()
