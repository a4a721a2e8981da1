"""`make plan`: what fits on a card, how fast it will be, what it costs; pictures of `common/sizing` in the terminal."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import yaml
from rich.table import Table

from common import checkpoint
from common.sizing import cards, memory, price, shape, speed, training
from common.sizing.cards import CannotSay, Card
from common.sizing.memory import Memory, Serving
from common.sizing.price import Prices
from common.sizing.shape import Shape
from services.local.accelerator import NEEDS_BYTES
from services.local.errors import UserError
from services.local.plan import ROOT

PRICES = ROOT / "common/sizing/prices.yaml"
USUAL = (("RTX 4090", 1), ("L40S", 2), ("A100-80", 1), ("H100", 1))
"""Cards compared when nobody names one: second-hand at home, two of a cheap rack's, the two that one rents."""
TOGETHER = 32
"""Requests at once, for the speed of a busy card."""
TRAINED_TOKENS = 1024
"""Of the longest row: TRAIN_MAX_TOKENS, when nobody sets it."""
BUDGET_USD = 5000.0
"""The learning path's: hardware, rent and all."""
PATH_HOURS = 300
"""Hours of a rented card in the learning path: 150 a month, two months."""


class Column(NamedTuple):
    """A card, or several of one kind, and what came of the question."""

    card: Card
    gpus: int
    served: Memory | None
    said: str
    """Why it cannot be served there; empty when it can."""


def read_prices(path: Path = PRICES) -> Prices:
    """The owner's table. Raises UserError naming what is wrong in it."""
    try:
        return msgspec.convert(yaml.safe_load(path.read_text()), Prices)
    except (OSError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise UserError(f"{path}: {error}") from error


def ask(found: Shape, wanted: Sequence[tuple[str, int]], tokens: int) -> list[Column]:
    """Each card's answer. Raises UserError for a card that is not known."""
    columns = []
    for name, gpus in wanted:
        try:
            card = cards.find(name)
        except CannotSay as error:
            raise UserError(str(error)) from error
        try:
            columns.append(Column(card, gpus, memory.serve(found, card, Serving(gpus=gpus, max_tokens=tokens)), ""))
        except CannotSay as error:
            columns.append(Column(card, gpus, None, str(error)))
    return columns


def picture(model: str, found: Shape, columns: Sequence[Column], prices: Prices) -> Table:
    """The whole plan as a table: one column a card."""
    billions = f"{found.parameters() / 1e9:.2f} billion parameters"
    table = Table(title=f"{model}: {billions}, {found.kv_bytes_per_token():,} KV bytes a token", title_justify="left")
    table.add_column("of each GPU (~ estimated, at most)", no_wrap=True)
    for column in columns:
        table.add_column(f"{column.gpus} × {column.card.name}", justify="right")
    for section in (_memory(found), _speeds(found), _trainings(found), _costs(found, prices)):
        for name, show in section:
            table.add_row(name, *(show(column) for column in columns))
        table.add_section()
    return table


Rows = list[tuple[str, Callable[[Column], str]]]


def _served(show: Callable[[Memory], str]) -> Callable[[Column], str]:
    return lambda column: show(column.served) if column.served is not None else "no"


def _memory(found: Shape) -> Rows:
    return [
        ("memory, GiB", lambda c: _gib(c.card.memory_bytes)),
        ("weights, GiB", lambda c: _gib(found.weights_bytes(c.gpus))),
        ("~ a step, GiB", _served(lambda m: _gib(m.step_bytes))),
        ("4 LoRA places, GiB", _served(lambda m: _gib(m.lora_bytes))),
        ("~ CUDA, GiB", _served(lambda m: _gib(m.fixed_bytes))),
        ("KV blocks, GiB", _served(lambda m: _gib(m.kv_bytes))),
        ("KV blocks, tokens", _served(lambda m: f"{m.kv_tokens:,}")),
        ("longest sequence, tokens", _served(lambda m: f"{m.max_tokens:,}")),
        ("sequences of 4,096 at once", _served(lambda m: f"{m.together(4096):.0f}")),
    ]


def _speeds(found: Shape) -> Rows:
    def rate(speed_of: Callable[[Column], float]) -> Callable[[Column], str]:
        return lambda column: f"{speed_of(column):,.0f}" if column.served is not None else "–"

    return [
        ("~ 1 request, tokens/s", rate(lambda c: speed.decode_tokens_per_s(found, c.card, gpus=c.gpus))),
        (f"~ {TOGETHER} requests, tokens/s", rate(lambda c: _busy(found, c))),
        ("~ prefill, tokens/s", rate(lambda c: speed.prefill_tokens_per_s(found, c.card, gpus=c.gpus))),
    ]


def _trainings(found: Shape) -> Rows:
    def alone(*, four_bit: bool) -> Callable[[Column], str]:
        def show(column: Column) -> str:
            if found.quantization:
                return "–"
            need = training.lora(found, four_bit=four_bit).total_bytes
            return f"{_gib(need)}{'' if need <= column.card.memory_bytes else ': no'}"

        return show

    def chosen(column: Column) -> str:
        """As the trainer chooses beside an engine that sleeps (TRAIN_FOUR_BIT=auto)."""
        try:
            room = column.card.memory_bytes - memory.ASLEEP_BYTES
            bits, _ = training.choose(found, room, tokens=TRAINED_TOKENS, most=1)
        except CannotSay:
            return "no"
        return "–" if found.quantization else "4 bits" if bits else "16 bits"

    return [("~ LoRA run alone, GiB", alone(four_bit=False)), ("~ QLoRA run alone, GiB", alone(four_bit=True)),
            ("~ trained with its base in", chosen)]


def _costs(found: Shape, prices: Prices) -> Rows:
    def rent(column: Column) -> float | None:
        one = prices.of(column.card.name).rent
        return one * column.gpus if one is not None else None

    def usd(times: float, form: str) -> Callable[[Column], str]:
        return lambda column: "–" if (found := rent(column)) is None else format(found * times, form)

    def million(column: Column) -> str:
        hourly = rent(column)
        if hourly is None or column.served is None:
            return "–"
        return f"{price.usd_per_million(hourly, _busy(found, column)):.2f}"

    def pays(column: Column) -> str:
        hours = price.break_even_hours(prices.of(column.card.name), column.card.power_watts, prices)
        return "–" if math.isnan(hours) else "never" if math.isinf(hours) else f"{hours:,.0f}"

    return [
        ("rent, USD an hour", usd(1, ".2f")),
        ("rent, USD a month", usd(price.HOURS_A_MONTH, ",.0f")),
        (f"~ USD a million tokens at {TOGETHER}", million),
        ("buying pays after, hours", pays),
    ]


def _busy(found: Shape, column: Column) -> float:
    return speed.decode_tokens_per_s(found, column.card, gpus=column.gpus, together=TOGETHER)


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def disk(found: Shape) -> str:
    """What is to be downloaded and kept, in words."""
    model, build = found.weights_bytes() / 1e9, NEEDS_BYTES["cuda"] / 1e9
    return f"Disk: {model:.1f} GB for the model, about {build:.0f} GB for the installation with vLLM's CUDA build."


def budget(prices: Prices, usd: float = BUDGET_USD) -> list[tuple[str, str, str, str]]:
    """The learning path's budget: (way, hardware, its 300 hours, what is left), from the table of prices."""
    rows = []
    for name in ("A100-80", "RTX 4090"):
        found = prices.of(name)
        if found.rent is not None:
            hours = PATH_HOURS * found.rent
            rows.append((f"rent one {name}", "–", f"{hours:,.0f} USD", f"{usd - hours:,.0f} USD"))
        if found.buy is not None:
            hardware = found.buy + prices.host_usd
            power = PATH_HOURS * price.owned_usd_per_hour(cards.find(name).power_watts, prices)
            rows.append((f"buy one {name}", f"{hardware:,.0f} USD", f"{power:,.0f} USD of electricity",
                         f"{usd - hardware - power:,.0f} USD"))
    return rows


def budget_table(prices: Prices) -> Table:
    """What 5,000 dollars buy."""
    title = f"The 5,000-dollar plan: {PATH_HOURS} hours of a GPU (prices of {prices.date}, {PRICES.relative_to(ROOT)})"
    table = Table(title=title, title_justify="left")
    for heading in ("way", "hardware", f"{PATH_HOURS} hours", f"left of {BUDGET_USD:,.0f}"):
        table.add_column(heading)
    for row in budget(prices):
        table.add_row(*row)
    return table


def read_shape(model: str) -> Shape:
    """The model's shape. Raises UserError with what is missing."""
    try:
        fetched = checkpoint.config(*model.partition("@")[::2])
        return shape.of_config(fetched, model) if fetched else shape.read(model)
    except CannotSay as error:
        raise UserError(str(error)) from error
