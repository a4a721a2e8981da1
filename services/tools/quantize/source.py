"""What MODEL names, as an entry of models.yaml, and the entry of its quantised copy."""

import os
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from common import checkpoint, formats
from services.local import catalog
from services.local import model as bundled
from services.local.catalog import Catalog, Entry
from services.local.errors import UserError
from services.local.models import bring_models
from services.local.plan import Dials


def find(model: str, dials: Dials) -> Entry:
    """MODEL: a name in models.yaml, `bundled`, a folder, or a hub name. Raises UserError."""
    for entry in dials.catalog.models:
        if entry.name == model and entry.engine == "vllm":
            return entry
    if not model or model == catalog.BUNDLED:
        return Entry(name=bundled.NAME)
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return checked({"name": folder.resolve().name, "source": str(folder.resolve())})
    if folder.is_absolute() or model.startswith((".", "~")) or "/" not in model:
        names = ", ".join(entry.name for entry in dials.catalog.models)
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


def bring(entry: Entry, dials: Dials, console: Console) -> None:
    """Its files on this machine. Raises UserError: they cannot be had, or are quantised already."""
    dials.models.mkdir(parents=True, exist_ok=True)
    with Progress(TextColumn("{task.description}"), BarColumn(), console=console, transient=True) as progress:
        bring_models(Dials(dials.state, Catalog(models=[entry])), progress)
    found = checkpoint.config(entry.model(dials.models), entry.revision)
    if found.get("quantization_config"):
        raise UserError(f"MODEL={entry.name} is {formats.of(found).name} already; quantise the original.")
