"""The report: one HTML file with its pictures inside, and the same figures as JSON."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from common.files import write_whole
from services.tools.compare.figures import LATENCIES, Figures

TEMPLATE = Path(__file__).parent / "report.html"


def write(folder: Path, figures: Sequence[Figures], facts: dict[str, Any]) -> Path:
    """report.html and report.json in a folder; the page. `facts`: sides, machine, agreement, recipe."""
    import jinja2

    loads = list(dict.fromkeys(one.load for one in figures))
    env = jinja2.Environment(autoescape=True)
    page = env.from_string(TEMPLATE.read_text()).render(
        figures=figures,
        loads=loads,
        latencies=LATENCIES,
        speed=_bars(figures, loads),
        first=_latency(figures, loads),
        **facts,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole([msgspec.json.format(msgspec.json.encode({"figures": figures, **facts}))], folder / "report.json")
    write_whole([page.encode()], folder / "report.html")
    return folder / "report.html"


def _bars(figures: Sequence[Figures], loads: Sequence[str]) -> str:
    """Tokens a second: a bar for each side under each load, a dot for each round."""
    figure, axes, sides, width = _axes(figures, loads)
    for number, side in enumerate(sides):
        mine = {one.load: one for one in figures if one.side == side}
        at = [load + (number - (len(sides) - 1) / 2) * width for load in range(len(loads))]
        axes.bar(at, [mine[load].tokens_per_s for load in loads], width * 0.9, label=side)
        for x, load in zip(at, loads, strict=True):
            rounds = mine[load].tokens_per_s_rounds
            axes.plot([x] * len(rounds), rounds, "k.", markersize=3)
    axes.set_ylabel("tokens/s")
    return _svg(figure, axes)


def _latency(figures: Sequence[Figures], loads: Sequence[str]) -> str:
    """Time to the first token: median, and a line up to p95."""
    figure, axes, sides, width = _axes(figures, loads)
    for number, side in enumerate(sides):
        mine = {one.load: one for one in figures if one.side == side}
        at = [load + (number - (len(sides) - 1) / 2) * width for load in range(len(loads))]
        middle = [mine[load].ms["ttft"]["p50"] for load in loads]
        above = [max(0.0, mine[load].ms["ttft"]["p95"] - p50) for load, p50 in zip(loads, middle, strict=True)]
        axes.errorbar(at, middle, yerr=[[0] * len(loads), above], fmt="o", capsize=3, label=side)
    axes.set_ylabel("first token, ms: p50 to p95")
    axes.set_ylim(bottom=0)
    return _svg(figure, axes)


def _axes(figures: Sequence[Figures], loads: Sequence[str]) -> tuple[Any, Any, list[str], float]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    axes.set_xticks(range(len(loads)), loads)
    sides = list(dict.fromkeys(one.side for one in figures))
    return figure, axes, sides, 0.8 / len(sides)


def _svg(figure: Any, axes: Any) -> str:
    axes.legend(fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight")
    text = out.getvalue()
    return text[text.index("<svg") :]
