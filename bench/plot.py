"""Draws docs/kv-cache.svg from bench/results/kv.json: `python -m bench.plot`."""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "owngpt"  # the same figures give the same file
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of a backend

ROOT = Path(__file__).resolve().parents[1]
TOKENS = (800, 1600, 3200)
WAYS = {"recompute": "computed again", "remote": "from redis, read by the other worker", "local": "in the worker's own cache"}


def draw() -> None:
    """TTFT by prompt length and by where the blocks are."""
    results: dict[str, float] = json.loads((ROOT / "bench/results/kv.json").read_text())
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for place, (way, label) in enumerate(WAYS.items()):
        values = [results[f"ttft_{way}_{tokens}_s"] for tokens in TOKENS]
        bars = axes.bar([at + (place - 1) * 0.27 for at in range(len(TOKENS))], values, 0.25, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(TOKENS)), [f"{tokens:,} tokens" for tokens in TOKENS])
    axes.set_ylabel("time to first token, s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(ROOT / "docs/kv-cache.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw()
