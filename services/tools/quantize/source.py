"""What MODEL names, as an entry of models.yaml, and the entry of its quantised copy."""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from services.local import catalog
from services.local import model as bundled
from services.local.catalog import Entry
from services.local.errors import UserError

METHODS = ("w8a8", "gptq", "awq")


def find(model: str, method: str, known: Sequence[Entry]) -> Entry:
    """MODEL: a name in models.yaml (`known`), `bundled`, a folder, or a hub name. Raises UserError."""
    if method not in METHODS:
        raise UserError(
            f"METHOD={method or '(nothing)'}: {', '.join(METHODS)}. make quantize MODEL=bundled METHOD=w8a8"
        )
    for entry in known:
        if entry.name == model and entry.engine == "vllm":
            return entry
    if not model or model == catalog.BUNDLED:
        return Entry(name=bundled.NAME)
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return checked({"name": folder.resolve().name, "source": str(folder.resolve())})
    if folder.is_absolute() or model.startswith((".", "~")) or "/" not in model:
        names = ", ".join(entry.name for entry in known)
        raise UserError(f"MODEL={model}: neither bundled, nor one of models.yaml's ({names}), nor a checkpoint folder.")
    hub, _, revision = model.partition("@")
    revision = revision or os.environ.get("MODEL_REVISION", "")
    return checked({
        "name": hub.rpartition("/")[2].lower(), "source": f"{hub}@{revision}" if revision else hub,
    })  # fmt: skip


def copy_of(entry: Entry, method: str, folder: Path) -> Entry:
    """The copy's own entry: served as the original is, by one worker. Raises UserError for a name that is none."""
    said = msgspec.to_builtins(entry) | {"name": copy_name(entry, method), "source": str(folder), "adapters": False}
    return checked({name: value for name, value in said.items() if name not in ("replicas", "start")})


def copy_name(entry: Entry, method: str) -> str:
    """What clients will ask for."""
    return f"{entry.name.replace('/', '-')}-{method}"


def checked(fields: dict[str, object]) -> Entry:
    """The entry with these fields. Raises UserError."""
    try:
        return msgspec.convert(fields, Entry)
    except msgspec.ValidationError as error:
        raise UserError(
            f"{fields.get('name')!r} cannot be a model's name ({error}). Give it one in models.yaml: MODEL=that"
        ) from error
