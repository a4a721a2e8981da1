"""`make profile`: one worker out of rotation, profiled, and back; what it did with its time, for people."""

from pathlib import Path

import httpx
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.files import write_whole
from services.local.__main__ import way_in
from services.local.errors import UserError
from services.local.plan import read_dials
from services.local.running import recall
from services.tools.profile import trace
from services.tools.profile.trace import Summary
from services.worker import profiling
from services.worker.profiling import Wish

SUMMARY = "summary.json"


def profile(worker: str, wish: Wish, force: bool, console: Console) -> Path:
    """Profile a worker of the running stack; the folder with what came of it. Raises UserError."""
    state = read_dials().state
    dials, _ = recall(state)
    chosen = choose(worker, force)
    folder = dials.state / "profiles" / chosen
    console.print(f"{chosen} leaves the rotation; {wish.concurrent} request(s) at once, {profiling.STEPS} engine steps")
    try:
        with console.status("drained, profiled, and back: half a minute and more"):
            result = profiling.ask(folder, wish)
    except (TimeoutError, OSError) as error:
        raise UserError(str(error)) from error
    if result.error:
        raise UserError(f"{chosen} could not be profiled: {result.error}")
    summary = show(folder / result.trace, console)
    write_whole([msgspec.json.format(msgspec.json.encode(summary))], folder / SUMMARY)
    console.print(
        f"\n{folder / result.trace}\n    open it in https://ui.perfetto.dev",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    if result.flame:
        console.print(
            f"{folder / result.flame}\n    a flame graph of the engine's Python: open it in a browser", soft_wrap=True
        )
    else:
        console.print(f"no flame graph: {result.no_flame}", markup=False, soft_wrap=True)
    return folder


def choose(worker: str, force: bool) -> str:
    """The program's name of the worker: the one that is asked for, else the first whose work others can do.

    Raises UserError where there is none, or nobody else serves its models meanwhile and it is not forced.
    """
    endpoint, key = way_in()
    try:
        answer = httpx.get(
            f"{endpoint}/status", headers={"authorization": f"Bearer {key}"}, timeout=5
        ).raise_for_status()
    except httpx.HTTPError as error:
        raise UserError(
            f"The stack at {endpoint} does not answer ({type(error).__name__}). Is make up running?"
        ) from error
    ready = {one["id"].rpartition("-")[0]: one for one in answer.json()["workers"] if one["state"] == "ready"}
    able = [name for name, one in ready.items() if one["engine"] == "vllm"]
    if worker and worker not in able:
        raise UserError(
            f"WORKER={worker}: there is no such vLLM worker that is ready; there are: {', '.join(able) or 'none'}"
        )
    spare = [
        name
        for name in able
        if all(
            any(model in other["models"] for label, other in ready.items() if label != name)
            for model in ready[name]["models"]
        )
    ]
    wanted = [worker] if worker else able
    if not wanted:
        raise UserError("No vLLM worker is ready.")
    if free := next((name for name in wanted if name in spare), None):
        return free
    if force:
        return wanted[0]
    raise UserError(
        f"Nobody else serves what {wanted[0]} does ({', '.join(ready[wanted[0]]['models'])}): for half a minute it "
        "would be refused with 503. With FORCE=1 it is profiled all the same; or start with WORKERS=2."
    )


def show(path: Path, console: Console) -> Summary:
    """Print what a trace says. Raises UserError when it is none."""
    try:
        found = trace.read(path)
    except trace.Unreadable as error:
        raise UserError(str(error)) from error
    console.print(
        f"\n{found.steps} steps in {found.whole_ms:.0f} ms, the median {found.step_ms:.1f} ms; {found.layers} layers, "
        f"each {found.layer_us:.0f} µs of it\n",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(f"class ({found.device})", "share", "", box=None, pad_edge=False)
    for name, share in found.shares.items():
        table.add_row(name, f"{share:.1%}", "█" * round(share * 40))
    console.print(table)
    table = Table("longest operators", "shapes", "share", "calls", "each, µs", box=None, pad_edge=False)
    for one in found.top:
        table.add_row(escape(one.name), escape(one.shapes), f"{one.share:.1%}", str(one.calls), f"{one.each_us:.0f}")
    console.print("\n", table, sep="")
    return found
