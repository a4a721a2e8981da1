"""`make quantize` on this machine: the original brought, the copy made and measured, its entry in models.yaml."""

import contextlib
import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from services.local.catalog import Catalog, models_path
from services.local.compose import FILE as FOR_CONTAINERS
from services.local.models import bring_models
from services.local.plan import Dials, read_dials
from services.local.running import only_one
from services.tools.quantize import making, source, texts
from services.tools.quantize.register import check, register


def quantize(model: str, method: str, data: Path | None, most_loss: float, console: Console) -> Path:
    """The folder of the new checkpoint. Raises UserError: a wrong input, no room, or more lost than is allowed."""
    os.environ.pop("MODEL", None)  # here it does not say what is served
    dials = read_dials()
    entry = source.find(model, method, dials.catalog.models, os.environ.get("MODEL_REVISION", ""))
    path, target = models_path(), dials.models / source.copy_name(entry, method)
    check(path, source.copy_of(entry, method, target))
    rows = texts.split(data)
    dials.models.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        held.enter_context(making.alone(target))
        if dials.gpus:  # the engines that measure want what a stack's engines have
            held.enter_context(only_one(dials))
        with Progress(TextColumn("{task.description}"), BarColumn(), console=console, transient=True) as progress:
            bring_models(Dials(dials.state, Catalog(models=[entry])), progress)
        copy, folder = making.make(entry, method, rows, most_loss, dials, console)
    new = register(path, copy, entry)
    console.print(
        f"{folder}: the checkpoint, its card README.md\n{path}: {'has' if new else 'had'} an entry {copy.name!r}. "
        "Serve it: make up, or make apply while the stack runs",
        soft_wrap=True,
        markup=False,
    )
    if FOR_CONTAINERS.exists():
        console.print("Containers see folders below MODELS_DIR alone: move it there, and change its source.")
    return folder
