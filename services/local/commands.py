"""Commands beside the running stack: what is wrong with it, its backup, and what would fit on which card."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn

from common import gpus
from services.local import backup as archives
from services.local import doctor, estimate
from services.local.apply import Stack
from services.local.errors import UserError
from services.local.models import bring_models
from services.local.plan import ROOT, read_dials
from services.local.running import only_one, process_states, recall

DEFAULT_PLANNED = "mistralai/Mistral-7B-Instruct-v0.3"
beside = typer.Typer()
console = Console(highlight=False)


@beside.command("plan")
def make_plan(
    model: Annotated[str, typer.Option(envvar="MODEL", help="A hub name or a checkpoint folder.")] = "",
    gpu: Annotated[str, typer.Option(envvar="GPU", help='As "RTX 4090"; default: this machine\'s, or four.')] = "",
    count: Annotated[int, typer.Option("--gpus", envvar="GPUS", min=1, max=8, help="How many of them.")] = 1,
    tokens: Annotated[int, typer.Option(envvar="TOKENS", min=0, help="Longest sequence; 0: what fits.")] = 0,
) -> None:
    """What fits on which card, how fast it will be at most, and what it costs."""
    model = model.strip() or DEFAULT_PLANNED
    found = estimate.read_shape(model)
    here = own_gpus()
    wanted = [(gpu, count)] if gpu else [(here[0], len(here))] if here else estimate.USUAL
    columns, prices = estimate.ask(found, wanted, tokens), estimate.read_prices()
    console.print(estimate.picture(model, found, columns, prices))
    for column in columns:
        if column.said:
            console.print(f"{column.card.name}: {column.said}", soft_wrap=True)
    console.print(estimate.disk(found))
    console.print("\n", estimate.budget_table(prices), "\nHow sure this is: docs/hosts.md", sep="")


def own_gpus() -> list[str]:
    """The names of this machine's GPUs, of one kind; none where no driver answers."""
    try:
        names = [gpu.name for gpu in gpus.look().gpus]
    except gpus.GpusAway:
        return []
    return [name for name in names if name == names[0]]


@beside.command("doctor")
def look() -> None:
    """Look at the stack, running or not: what is wrong, and what to do. Status 1 when something is."""
    wrong = 0
    for finding in doctor.examine(read_dials()):
        mark = "[bold red]✗[/]" if finding.do else "[green]✓[/]"
        console.print(f"{mark} {finding.what:14} ", end="")
        console.print(finding.said, markup=False, soft_wrap=True)
        if finding.do:
            wrong += 1
            console.print(f"                 → {finding.do}", markup=False, soft_wrap=True)
    if wrong:
        raise typer.Exit(1)


@contextlib.contextmanager
def mistakes(archive: Path) -> Iterator[None]:
    """What the disk refuses is said in a line. Raises UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{archive}: {error.strerror or error} ({error.filename or 'no name'})") from error


@beside.command("backup")
def make_backup(archive: Annotated[Path, typer.Argument(help="The archive to write: backup.tar.gz.")]) -> None:
    """Write keys, usage, files, jobs and tuned models into an archive, while the stack runs or not."""
    if archive.exists():
        raise UserError(f"{archive} is there already; choose another name: make backup TO=…")
    with console.status("backing up") as status, mistakes(archive):
        archives.backup(read_dials(), archive, lambda what: status.update(f"backing up {what}"))
    console.print(f"{archive}: {archive.stat().st_size / 1e6:.0f} MB. Your API key is in it: keep it to yourself.")


@beside.command("restore")
def make_restore(archive: Annotated[Path, typer.Argument(help="An archive of make backup.", exists=True)]) -> None:
    """Make an empty STATE_DIR into what was backed up; then: make up."""
    dials = read_dials()
    dials.state.mkdir(parents=True, exist_ok=True)
    with only_one(dials), console.status("restoring") as status, mistakes(archive):
        archives.restore(dials, archive, lambda what: status.update(f"restoring: {what}"))
    console.print(f"restored into {dials.state}. Start it: make up")


@beside.command("apply")
def apply_models() -> None:
    """Make the running stack what models.yaml says now; only what changed is touched, and no request fails."""
    with running_stack() as stack:
        change = stack.apply()
    counts = f"{len(change.new)} new, {len(change.old)} gone, {len(change.kept)} as they were"
    console.print(f"workers: {counts}.")


@beside.command("restart")
def restart_all() -> None:
    """Start every worker and the gateway anew, one after the other, while the stack serves."""
    with running_stack() as stack:
        stack.reload_certificate()
        stack.restart_gateway()
        change = stack.apply(anew=True)
    console.print(f"started anew: {len(change.new)} worker(s), the gateway.")


@contextlib.contextmanager
def running_stack() -> Iterator[Stack]:
    """The stack that runs, for one who changes it, and nobody else meanwhile. Raises UserError."""
    state = Path(os.environ.get("STATE_DIR") or ROOT / ".state").absolute()
    dials, ports = recall(state)
    if not process_states(dials):
        raise UserError(f"There is no running stack in {state}; start it with: make up")
    with open(dials.run_dir / "apply.lock", "w") as lock, Progress(TextColumn("{task.description}")) as progress:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError("Somebody else is changing this stack right now.") from error
        bring_models(dials, progress)
        progress.stop()
        yield Stack(dials, ports, (state / "api_key").read_text().strip(), lambda said: console.print(said))
