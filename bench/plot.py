"""Draws docs/kv-cache.svg and docs/scale.svg from bench/results: `python -m bench.plot`."""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "owngpt"  # the same figures give the same file
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of a backend

ROOT = Path(__file__).resolve().parents[1]
TOKENS = (800, 1600, 3200)
POLICIES = ("random", "round robin", "least in flight", "prefix", "consistent hashing")
WAYS = {"recompute": "computed again", "remote": "from redis, read by the other worker", "local": "in the worker's own cache"}


def draw_policies() -> None:
    """What each routing policy gives a hundred simulated workers."""
    results: dict[str, float] = json.loads((ROOT / "bench/results/scale.json").read_text())
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained", sharey=True)
    shown = (("sim_p95_{}_s", "TTFT p95, s", "%.2f"), ("sim_hits_{}", "prompt tokens from cache", "%.2f"),
             ("sim_hottest_{}", "busiest worker ÷ mean", "%.2f"))  # fmt: skip
    for axis, (figure_name, label, form) in zip(axes, shown, strict=True):
        values = [results[figure_name.format(policy.replace(" ", "_"))] for policy in POLICIES]
        colours = ["tab:orange" if policy == "prefix" else "tab:blue" for policy in POLICIES]
        axis.bar_label(axis.barh(POLICIES, values, color=colours), fmt=form, fontsize=8, padding=2)
        axis.set_xlim(0, 1.18 * max(values))
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(ROOT / "docs/scale.svg", metadata={"Date": None})


def draw_kv() -> None:
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
    draw_kv()
    draw_policies()
