"""The way from a model to a smaller one: make, measure, refuse. The same on a host and in a container."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from common import checkpoint
from common.tie import tie_to_parent
from services.local import places
from services.local.catalog import Catalog, Entry
from services.local.errors import UserError
from services.local.plan import ROOT, Dials
from services.tools.quantize import card, engine, gate, source, texts
from services.tools.quantize.gate import Verdict

PYTHON = ROOT / ".venv-quantize/bin/python"
"""Where llm-compressor is installed: `make quantize` sees to it."""
SCRIPT = Path(__file__).parent / "compress.py"
NEEDS_TIMES = 3
"""Free disk, in sizes of the original: the copy, and what it is made in."""


def make(
    entry: Entry, method: str, rows: texts.Split, most_loss: float, dials: Dials, console: Console
) -> tuple[Entry, Path]:
    """The copy's entry and its folder, below `dials.models`. The original is on this machine; whoever calls is `alone`.

    Raises UserError: a wrong input, no room, or more lost than is allowed.
    """
    target = dials.models / source.copy_name(entry, method)
    copy = source.copy_of(entry, method, target)
    of = (entry.model(dials.models), entry.revision)
    if checkpoint.config(*of).get("quantization_config"):
        raise UserError(f"MODEL={entry.name} is {checkpoint.format_name(*of)} already; quantise the original.")
    made = digest(entry, method, rows.calibrated)
    if not _is_made(target, made, entry, dials):
        _room(entry, dials)
        _make(entry, method, rows.calibrated, target, made, dials, console)
    verdict = _measured([entry, copy], rows.measured, dials, console)
    card.measured(target, verdict, copy.name)
    console.print(_picture(verdict, copy.name))
    if not verdict.loss <= most_loss:  # also what is no number
        raise UserError(
            f"{copy.name} lost {verdict.loss:.1%} of perplexity; MAX_PERPLEXITY_LOSS={most_loss:g} allows "
            f"{most_loss:.1%}. It is not registered, and lies in {target}. Another METHOD, or your own questions as "
            "DATA, may lose less."
        )
    return copy, target


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """Nobody else makes this copy. Raises UserError."""
    with open(target.with_name(f".{target.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"Somebody else is quantising into {target} right now.") from error
        yield


def digest(entry: Entry, method: str, rows: Sequence[dict[str, Any]]) -> str:
    """Of all that makes a copy what it is."""
    said = [entry.source, method, rows, SCRIPT.read_text()]
    return sha256(json.dumps(said).encode()).hexdigest()[:16]


def _is_made(target: Path, made: str, entry: Entry, dials: Dials) -> bool:
    """Whether the very same is there. Raises UserError when a copy of something else is."""
    if not target.exists():
        return False
    if not (target / checkpoint.MADE).exists():
        raise UserError(f"{target} is there already, and was not made by make quantize.")
    said = json.loads((target / checkpoint.MADE).read_text())
    if (said["original"], said["revision"]) != (entry.model(dials.models), entry.revision):
        raise UserError(
            f"{target} is a copy of {said['original']} {said['revision']}. Remove it, or name this one otherwise."
        )
    return bool(said.get("digest") == made)


def _room(entry: Entry, dials: Dials) -> None:
    """Raise UserError when the disk cannot hold it."""
    needed = NEEDS_TIMES * checkpoint.weights_bytes(entry.model(dials.models), entry.revision)
    free = shutil.disk_usage(dials.models).free
    if free < needed:
        raise UserError(f"{dials.models} has {free / 1e9:.1f} GB of free disk; {needed / 1e9:.1f} GB are needed.")


def _make(
    entry: Entry, method: str, rows: list[dict[str, Any]], target: Path, made: str, dials: Dials, console: Console
) -> None:
    """Run llm-compressor, its own bars in the terminal; the folder is there when all of it is. Raises UserError."""
    if not PYTHON.exists():
        raise UserError("llm-compressor is not installed: make quantize installs it (.venv-quantize).")
    console.print(f"quantising {entry.name}: {card.NAMES[method]}, calibrated with {len(rows)} texts", markup=False)
    model = entry.model(dials.models)
    with _emptied(target.with_name(f".{target.name}.making")) as making:
        calibration, out = making / "calibration.jsonl", making / "made"
        calibration.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ran = subprocess.run(
            [PYTHON, SCRIPT, method, model, entry.revision, calibration, out],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            env=os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "ignore"},
            check=False,
            preexec_fn=tie_to_parent,
        )
        if ran.returncode:
            killed = ", killed: out of memory?" if ran.returncode < 0 else "; see above"
            raise UserError(f"{entry.name} could not be quantised by {method}{killed}.")
        how: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
        card.made(out, model, entry.revision, method, how, made)
        for extra in ("generation_config.json", "chat_template.jinja"):
            beside = Path(model) / extra
            if beside.is_file() and not (out / extra).exists():
                shutil.copyfile(beside, out / extra)
        if target.exists():  # one of other texts: whole until the new one is
            target.rename(making / "replaced")
        out.rename(target)


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """The folder, without what a killed run has left, and gone afterwards. Whoever calls has the lock of its target."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measured(entries: Sequence[Entry], rows: list[dict[str, Any]], dials: Dials, console: Console) -> Verdict:
    """The gate. Raises UserError."""
    logs = dials.state / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    seen: list[gate.Seen] = []
    with Progress(*columns, console=console) as progress:
        for what, entry in zip(("original", "quantised"), entries, strict=True):
            task, log = progress.add_task(what, total=1.0), logs / f"quantize-{what}.log"
            tell = partial(_tell, progress, task, what)
            place = places.deal(Catalog(models=[entry]), dials.gpus)[entry.slug][0]
            told = places.environment(entry, dials.models, place, awake=1) | {"MAX_LORAS": "0"}
            try:
                seen.append(gate.look(told, bool(dials.gpus), rows, log, tell, seen[0].ids if seen else None))
            except httpx.HTTPStatusError as error:
                raise UserError(f"The {what} model's engine refuses: {error.response.text[:300]}") from error
            except httpx.HTTPError as error:
                name = type(error).__name__
                raise UserError(
                    f"The {what} model's engine stopped answering ({name}). The end of {log}:\n{engine.end_of(log)}"
                ) from error
            progress.update(task, completed=1.0, description=what)
    return gate.judge(*seen)


def _tell(progress: Progress, task: TaskID, what: str, stage: str, share: float) -> None:
    progress.update(task, completed=share, description=f"{what}: {stage}")


def _picture(verdict: Verdict, name: str) -> Table:
    was, now = verdict.original, verdict.quantised
    table = Table("", "original", escape(name), "")
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
