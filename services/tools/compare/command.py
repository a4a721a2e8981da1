"""`make compare`: sides in turns, round after round; medians, a picture, a page."""

import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from services.local.__main__ import way_in
from services.local.errors import UserError
from services.local.plan import ROOT, Dials, read_dials
from services.local.running import recall
from services.tools.compare import figures, load, report
from services.tools.compare.figures import Figures
from services.tools.compare.load import Endpoint, Point
from services.tools.compare.recipe import Recipe, Side

ASK_TIMEOUT_S = 30.0


def compare(recipe: Recipe, console: Console) -> Path:
    """Compare, and write the report; its page. Raises UserError."""
    dials = recall(read_dials().state)[0] if any(not side.url for side in recipe.sides) else read_dials()
    known = [endpoint(side) for side in recipe.sides]
    if len({one.shown for one in known}) < len(known):
        raise UserError("Two sides have one name; give one a `label`.")
    said = [_facts(side, one, dials) for side, one in zip(recipe.sides, known, strict=True)]
    tokenizer = recipe.tokenizer or _tokenizer(recipe, dials)
    answers = [load.greedy(one) for one in known]
    agreed = {
        one.shown: figures.agreement(answers[0], other) for one, other in zip(known[1:], answers[1:], strict=True)
    }
    found = measure(recipe, known, tokenizer, console)
    facts: dict[str, Any] = {
        "sides": said,
        "machine": figures.machine(),
        "agreement": agreed,
        "recipe": msgspec.to_builtins(recipe),
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    page = report.write(dials.state / "compared" / time.strftime("%Y%m%d-%H%M%S"), found, facts)
    console.print(picture(found))
    for name, (same, prefix) in agreed.items():
        console.print(
            f"{name}: {same:.0%} of the greedy answers are {known[0].shown}'s; {prefix:.0%} of an answer agrees.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"\n{page}\n    open it in a browser", soft_wrap=True, highlight=False, markup=False)
    return page


def endpoint(side: Side) -> Endpoint:
    """Where a side is asked, and with which key. Raises UserError."""
    if not side.url:
        base, key = way_in()
        return Endpoint(side.shown, base.removesuffix("/v1"), side.model, key)
    try:
        key = Path(side.key_file).read_text().strip() if side.key_file else "none"
    except OSError as error:
        raise UserError(f"{side.shown}: key_file {side.key_file}: {error.strerror}") from error
    return Endpoint(side.shown, side.url.rstrip("/").removesuffix("/v1"), side.model, key)


def measure(recipe: Recipe, sides: list[Endpoint], tokenizer: str, console: Console) -> list[Figures]:
    """All rounds of all loads; who begins changes from round to round. Raises UserError.

    Before them every side has the last load once, for nothing: what an engine does for the first time takes longer.
    """
    points = load.points(recipe)
    rounds: dict[tuple[str, Point], list[dict[str, Any]]] = defaultdict(list)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=(recipe.rounds * len(points) + 1) * len(sides))
        rows = load.prompts(recipe.lengths, load.requests(recipe, points[-1]), seed=recipe.rounds * len(points))
        for side in sides:
            progress.update(task, description=escape(f"warm-up: {side.shown}"))
            load.run(side, points[-1], rows, recipe.slo, tokenizer, Path(folder))
            progress.advance(task)
        for number in range(recipe.rounds):
            for at, point in enumerate(points):
                rows = load.prompts(recipe.lengths, load.requests(recipe, point), seed=number * len(points) + at)
                first = number % len(sides)
                for side in (*sides[first:], *sides[:first]):
                    progress.update(task, description=escape(f"round {number + 1}: {side.shown}, {point}"))
                    rounds[side.shown, point].append(load.run(side, point, rows, recipe.slo, tokenizer, Path(folder)))
                    progress.advance(task)
    return [figures.of(side.shown, str(point), rounds[side.shown, point]) for point in points for side in sides]


def picture(found: list[Figures]) -> Table:
    """The figures in the terminal."""
    table = Table(
        "load", "side", "tokens/s", "good requests/s", "failed", "first token p50 / p95, ms", "each further p50, ms"
    )
    last = ""
    for one in found:
        table.add_row(
            "" if one.load == last else one.load,
            escape(one.side),
            f"{one.tokens_per_s:.1f}",
            f"{one.goodput_per_s:.2f}",
            str(one.failed),
            f"{one.ms['ttft']['p50']:.0f} / {one.ms['ttft']['p95']:.0f}",
            f"{one.ms['tpot']['p50']:.1f}",
        )
        last = one.load
    return table


def _facts(side: Side, one: Endpoint, dials: Dials) -> dict[str, str]:
    """What can be known of a side: engine, format, flags. Raises UserError when it is silent or has no such model."""
    headers = {"authorization": f"Bearer {one.key}"}
    try:
        with httpx.Client(base_url=one.base, headers=headers, timeout=ASK_TIMEOUT_S) as http:
            listed = http.get("/v1/models").raise_for_status().json()["data"]
            entry = next((model for model in listed if model["id"] == one.model), None)
            status = http.get("/v1/status").json() if not side.url else {}
            version = http.get("/version") if side.url else None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        raise UserError(f"{one.shown}: {one.base} does not answer ({type(error).__name__}). Is it running?") from error
    if entry is None:
        raise UserError(
            f"{one.shown}: {one.base} has no model {one.model!r}, but {', '.join(m['id'] for m in listed) or 'none'}."
        )
    found = {
        "label": one.shown,
        "at": one.base,
        "model": one.model,
        "format": entry.get("format") or "",
        "flags": side.flags,
    }
    if side.url:
        known = version is not None and version.is_success
        found |= {
            "engine": entry.get("owned_by") or "",
            "version": version.text[:200] if known and version is not None else "",
        }
        return found
    engines = {worker["engine"] for worker in status.get("workers", []) if one.model in worker["models"]}
    asked = next((e for e in dials.catalog.models if e.name == one.model), None)
    told = (
        " ".join(f"{name}={value}" for name, value in msgspec.to_builtins(asked).items() if name != "name")
        if asked
        else ""
    )
    return found | {"engine": ", ".join(sorted(engines)), "flags": " ".join(filter(None, (told, side.flags)))}


def _tokenizer(recipe: Recipe, dials: Dials) -> str:
    """A folder of the first side that is served here. Raises UserError where there is none."""
    for side in recipe.sides:
        entry = next((e for e in dials.catalog.models if e.name == side.model and e.engine == "vllm"), None)
        if entry is not None and (Path(entry.model(dials.models)) / "tokenizer.json").exists():
            return entry.model(dials.models)
    raise UserError("No side's tokenizer is on this machine: name a folder or a hub model as `tokenizer`.")


def recipe_of(models: str, rounds: int) -> Recipe:
    """The recipe of MODELS="a b": models of the running stack, or URL=MODEL. Raises UserError."""
    sides: list[Side] = []
    for number, said in enumerate(models.split()):
        url, _, model = said.rpartition("=") if said.startswith("http") else ("", "", said)
        again = [one.model for one in sides].count(model)
        sides.append(Side(model=model, label=f"{model} ({number + 1})" if again else "", url=url))
    if not sides:
        raise UserError(f'MODELS="one two": which models? Or RECIPE=name out of {ROOT / "examples/compare.yaml"}.')
    return Recipe(sides=sides, rounds=rounds)
