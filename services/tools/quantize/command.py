"""The way from a model to a smaller one that serves: make, measure, refuse or register."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from common import checkpoint, formats
from services.local import catalog
from services.local import model as bundled
from services.local.errors import UserError
from services.local.models import bring_models
from services.local.plan import ROOT, Dials, models_path, read_dials
from services.tools.quantize import card, gate, texts
from services.tools.quantize.gate import Verdict
from services.tools.quantize.register import register

METHODS = ("w8a8", "gptq", "awq")
PYTHON = ROOT / ".venv-quantize/bin/python"
"""Where llm-compressor is installed: `make quantize` sees to it."""
NEEDS_TIMES = 3
"""Free disk, in sizes of the original: the copy, and what it is made in."""


class Source(NamedTuple):
    """What is quantised."""

    name: str
    said: str
    """As models.yaml names it."""
    model: str
    """A folder, or a hub name."""
    revision: str


def quantize(model: str, method: str, data: Path | None, most_loss: float, console: Console) -> Path:
    """The folder of the new checkpoint. Raises UserError: a wrong input, no room, or more lost than is allowed."""
    if method not in METHODS:
        raise UserError(
            f"METHOD={method or '(nothing)'}: {', '.join(METHODS)}. make quantize MODEL=bundled METHOD=w8a8"
        )
    os.environ.pop("MODEL", None)  # here it does not say what is served
    dials = read_dials()
    source = find(model, dials, console)
    name = f"{source.name}-{method}"
    target = dials.models / name
    calibrated, measured = texts.split(data)
    if not target.exists():
        _room(source, dials.models)
        _make(source, method, calibrated, target, console)
    elif not (target / checkpoint.MADE).exists():
        raise UserError(f"{target} is there already, and was not made by make quantize.")
    verdict = _measured(source, target, measured, "cuda" if dials.gpus else "cpu", dials.state / "logs", console)
    card.measured(target, verdict, name)
    console.print(_picture(verdict, name))
    if verdict.loss > most_loss:
        raise UserError(
            f"{name} lost {verdict.loss:.1%} of perplexity; MAX_PERPLEXITY_LOSS={most_loss:g} allows {most_loss:.1%}. "
            f"It is not registered, and lies in {target}. Another METHOD, or your own questions as DATA, may lose less."
        )
    path = models_path()
    new = register(path, name, target, {"name": source.name, "source": source.said})
    console.print(
        f"{target}: the checkpoint, its card README.md\n{path}: {'has' if new else 'had'} an entry {name!r}. "
        "Serve it: make up, or make apply while the stack runs",
        soft_wrap=True,
    )
    return target


def find(model: str, dials: Dials, console: Console) -> Source:
    """MODEL: a name in models.yaml, `bundled`, a folder, or a hub name. Raises UserError."""
    model = model or catalog.BUNDLED
    entry = next((e for e in dials.catalog.models if e.name == model and e.engine == "vllm"), None)
    if entry is None and model != catalog.BUNDLED:
        folder = Path(model).expanduser()
        if (folder / "config.json").is_file():
            found = Source(folder.resolve().name, str(folder.resolve()), str(folder.resolve()), "")
        elif folder.is_absolute() or model.startswith((".", "~")) or "/" not in model:
            names = ", ".join(e.name for e in dials.catalog.models)
            raise UserError(
                f"MODEL={model}: neither bundled, nor one of models.yaml's ({names}), nor a checkpoint folder."
            )
        else:
            hub, _, revision = model.partition("@")
            found = Source(hub.rpartition("/")[2].lower(), model, hub, revision)
    else:
        entry = entry or catalog.Entry(name=bundled.NAME)
        dials.models.mkdir(parents=True, exist_ok=True)
        with Progress(TextColumn("{task.description}"), BarColumn(), console=console, transient=True) as progress:
            bring_models(Dials(dials.state, catalog.Catalog(models=[entry])), progress)
        found = Source(entry.name.replace("/", "-"), entry.source, entry.model(dials.models), entry.revision)
    config = checkpoint.config(found.model, found.revision)
    if config.get("quantization_config"):
        raise UserError(f"MODEL={model} is {formats.of(config).name} already; quantise the original.")
    return found


def _room(source: Source, place: Path) -> None:
    """Raise UserError when the disk cannot hold it."""
    needed = NEEDS_TIMES * checkpoint.weights_bytes(source.model, source.revision)
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{place} has {free / 1e9:.1f} GB of free disk; {needed / 1e9:.1f} GB are needed.")


def _make(source: Source, method: str, rows: list[dict[str, Any]], target: Path, console: Console) -> None:
    """Run llm-compressor, its own bars in the terminal. Raises UserError."""
    if not PYTHON.exists():
        raise UserError("llm-compressor is not installed: make quantize installs it (.venv-quantize).")
    console.print(f"quantising {source.name}: {card.NAMES[method]}, calibrated with {len(rows)} texts")
    for left in (target, target.with_name(target.name + ".partial")):
        shutil.rmtree(left, ignore_errors=True)
    making = target.with_name(target.name + ".made")
    shutil.rmtree(making, ignore_errors=True)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as calibration:
        calibration.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        calibration.flush()
        script = Path(__file__).parent / "compress.py"
        ran = subprocess.run(
            [PYTHON, script, method, source.model, source.revision, calibration.name, making],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            env=os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "ignore"},
            check=False,
        )
    if ran.returncode:
        raise UserError(f"{source.name} could not be quantised by {method}; see above.")
    how: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    card.made(making, source.model, source.revision, method, how)
    for extra in ("generation_config.json", "chat_template.jinja"):
        beside = Path(source.model) / extra
        if beside.is_file() and not (making / extra).exists():
            shutil.copyfile(beside, making / extra)
    making.rename(target)


def _measured(
    source: Source, target: Path, rows: list[dict[str, Any]], accelerator: str, logs: Path, console: Console
) -> Verdict:
    """The gate. Raises UserError."""
    logs.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        seen: list[gate.Seen] = []
        for what, model, revision in (("original", source.model, source.revision), ("quantised", str(target), "")):
            task = progress.add_task(what, total=1.0)

            def tell(stage: str, share: float, task: Any = task, what: str = what) -> None:
                progress.update(task, completed=share, description=f"{what}: {stage}")

            log = logs / f"quantize-{what}.log"
            try:
                seen.append(gate.look(model, revision, rows, accelerator, log, tell, seen[0].ids if seen else None))
            except httpx.HTTPError as error:
                raise UserError(
                    f"The {what} model's engine stopped answering ({type(error).__name__}); see {log}."
                ) from error
            progress.update(task, completed=1.0, description=what)
    return gate.judge(*seen)


def _picture(verdict: Verdict, name: str) -> Table:
    was, now = verdict.original, verdict.quantised
    table = Table("", "original", name, "")
    table.add_row("perplexity", f"{was.perplexity:.2f}", f"{now.perplexity:.2f}", f"{verdict.loss:+.1%}")
    table.add_row(
        "weights, MB",
        f"{was.size_bytes / 1e6:.0f}",
        f"{now.size_bytes / 1e6:.0f}",
        f"{now.size_bytes / max(1, was.size_bytes) - 1:+.0%}",
    )
    table.add_row("ready after, s", f"{was.load_s:.0f}", f"{now.load_s:.0f}", "")
    for at, before in was.tokens_per_s.items():
        after = now.tokens_per_s[at]
        table.add_row(f"tokens/s, {at} at once", f"{before:.0f}", f"{after:.0f}", f"{after / before - 1:+.0%}")
    table.add_row("KL, nats a token", "", f"≥ {verdict.kl_nats:.4f}", "")
    table.add_row("same likeliest token", "", f"{verdict.top1_agreement:.1%}", "")
    table.add_row("same greedy answers", "", f"{verdict.same_answers:.0%}", "")
    return table


def main(model: str, method: str, data: Path | None, most_loss: float) -> None:
    """The command."""
    with contextlib.suppress(BrokenPipeError):
        quantize(model, method.strip().lower(), data, most_loss, Console(highlight=False))
        sys.stdout.flush()
