"""What MODEL names, as an entry of models.yaml, and the entry of its quantised copy."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from common.checkpoint import served_name
from services.local import catalog
from services.local import model as bundled
from services.local.catalog import Entry
from services.local.errors import UserError

METHODS = ("w8a8", "gptq", "awq")


def find(model: str, method: str, known: Sequence[Entry], revision: str) -> Entry:
    """MODEL: a name in models.yaml (`known`), bundled, a folder, or a hub name (at `revision`). Raises UserError."""
    if method not in METHODS:
        raise UserError(f"METHOD={method or '(nothing)'}: one of {', '.join(METHODS)}.")
    for entry in known:
        if entry.name == model and entry.engine == "vllm":
            return entry
    if not model or model == catalog.BUNDLED:
        return Entry(name=bundled.NAME)
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return checked({"name": served_name("", str(folder.resolve())), "source": str(folder.resolve())})
    if folder.is_absolute() or model.startswith((".", "~")) or "/" not in model:
        names = ", ".join(entry.name for entry in known)
        raise UserError(f"MODEL={model}: neither bundled, nor one of models.yaml's ({names}), nor a checkpoint folder.")
    hub, _, at = model.partition("@")
    at = at or revision
    return checked({"name": served_name("", hub), "source": f"{hub}@{at}" if at else hub})


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
