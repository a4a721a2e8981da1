"""`make top`: the status of the running stack in the terminal, from /v1/status, as the console shows it."""

import time
from collections.abc import Callable
from typing import Any

import httpx
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

EVERY_S = 1.0
BAR_WIDTH = 12
STYLES = {"ready": "green", "asleep": "dim", "waking": "yellow"}
"""Of a worker's state; else red."""


def bar(share: float | None) -> str:
    """A share as blocks and percent."""
    if share is None:
        return "–"
    full = round(min(max(share, 0.0), 1.0) * BAR_WIDTH)
    return f"{'█' * full}{'░' * (BAR_WIDTH - full)} {share:4.0%}"


def seconds(value: float | None) -> str:
    """A time in the unit that suits it."""
    if value is None:
        return "–"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def gib(value: float | None) -> str:
    """Bytes as GiB."""
    return "–" if value is None else f"{value / 2**30:.1f}"


def share(value: float | None) -> str:
    """A share in percent."""
    return "–" if value is None else f"{value:.0%}"


def picture(status: dict[str, Any]) -> Group:
    """The whole screen."""
    total, minute = status["total"], status["last_minute"]
    first = Text.assemble(
        (f"{total['ready']} ready", "bold green" if total["ready"] else "bold red"),
        f"   {total['in_flight']} running   {total['waiting']} waiting   ",
        (f"{total['tokens_per_s']:.1f} tokens/s", "bold"), f" out, {total['prompt_tokens_per_s']:.1f} in",
    )
    second = Text(
        f"last minute: {minute['requests']} requests, {minute['failed']} failed, {minute['from_memory']} from memory, "
        f"first token {seconds(minute['ttft_p50_s'])} (p95 {seconds(minute['ttft_p95_s'])}), "
        f"prompt cached {share(minute['cached_share'])}"
    )
    parts: list[Any] = [first, second, _workers(status["workers"]), _machine(status)]
    if cost := status["cost"]:
        text = f"cost: ${cost['usd_per_hour']:.2f}/h   today ${cost['today_usd']:.2f}   month ${cost['month_usd']:.2f}"
        if cost["budget_usd"]:
            text += f"   budget left ${cost['budget_left_usd']:.2f}"
        if cost["usd_per_1m_tokens_today"] is not None:
            text += f"   1M tokens ${cost['usd_per_1m_tokens_today']:.2f}"
        parts.append(Text(text))
    parts += [
        Text(f"{alert['state']}: {alert['name']} {alert['summary']} ({alert['runbook']})",
             style="bold red" if alert["state"] == "firing" else "yellow")
        for alert in status["alerts"] or []
    ]  # fmt: skip
    return Group(*parts)


def _workers(workers: list[dict[str, Any]]) -> Table:
    table = Table(expand=False, box=None, pad_edge=False)
    names = ("worker", "engine", "state", "running", "waiting", "KV blocks", "out/s", "in/s", "prompt cached", "models")
    for name in names:
        table.add_column(name, justify="right" if name in ("running", "waiting", "out/s", "in/s") else "left")
    for worker in workers:
        state, waiting = worker["state"], worker["waiting"] + worker["wished"]  # in the engine, and for it to wake
        table.add_row(
            worker["id"], " ".join(filter(None, (worker["engine"], worker["format"]))),
            Text(state, style=STYLES.get(state, "red")),
            f"{worker['in_flight']}/{worker['slots']}", str(waiting), bar(worker["kv_use"]),
            f"{worker['tokens_per_s']:.1f}", f"{worker['prompt_tokens_per_s']:.1f}", share(worker["cached_share"]),
            ", ".join(worker["models"]),
        )
    return table


def _machine(status: dict[str, Any]) -> Table:
    table = Table(expand=False, box=None, pad_edge=False)
    for name in ("machine", "busy", "memory GiB", "power", "heat", "held down"):
        table.add_column(name)
    for gpu in status["gpus"] or []:
        power, heat = gpu["power_watts"], gpu["temperature_celsius"]
        table.add_row(
            f"GPU {gpu['gpu']} {gpu['name']}", bar(gpu["utilization"]),
            f"{gib(gpu['memory_used_bytes'])}/{gib(gpu['memory_total_bytes'])}",
            "–" if power is None else f"{power:.0f} W", "–" if heat is None else f"{heat:.0f} °C",
            ", ".join(gpu["throttled"]) or "–",
        )
    if host := status["host"]:
        table.add_row("CPU", bar(host["cpu_utilization"]),
                      f"{gib(host['memory_used_bytes'])}/{gib(host['memory_total_bytes'])}", "–", "–", "–")
    return table


def watch(endpoint: str, key: str, console: Console, *, once: bool = False) -> None:
    """Show the status until Ctrl-C, or once. Raises httpx.HTTPError when it cannot be had the first time."""
    with httpx.Client(base_url=endpoint, headers={"authorization": f"Bearer {key}"}, timeout=5) as http:
        def ask() -> dict[str, Any]:
            found: dict[str, Any] = http.get("/status").raise_for_status().json()
            return found

        shown = picture(ask())
        if once:
            console.print(shown)
            return
        with Live(shown, console=console, screen=True, auto_refresh=False) as live:
            _keep_showing(live, ask)


def _keep_showing(live: Live, ask: Callable[[], dict[str, Any]]) -> None:
    while True:
        time.sleep(EVERY_S)
        try:
            shown = picture(ask())
        except httpx.HTTPError as error:
            shown = Group(Text(f"the stack does not answer ({type(error).__name__}); waiting", style="bold red"))
        live.update(shown, refresh=True)
