"""What it costs: arithmetic on a table of prices (`prices.yaml`), which its owner keeps."""

import datetime
import math
from dataclasses import dataclass

HOURS_A_MONTH = 730.0


@dataclass(frozen=True)
class Price:
    """One card's price. None: not known."""

    card: str
    rent: float | None = None
    """USD an hour."""
    buy: float | None = None
    """USD for the card itself; `host_usd` is the machine around it."""
    source: str = ""


@dataclass(frozen=True)
class Prices:
    """The table, and what buying needs beside the card."""

    date: datetime.date
    host_usd: float
    host_watts: float
    usd_per_kwh: float
    cards: tuple[Price, ...]

    def of(self, card: str) -> Price:
        """The price of a card; one without numbers when it is not in the table."""
        return next((price for price in self.cards if price.card == card), Price(card))


def owned_usd_per_hour(watts: float, prices: Prices) -> float:
    """Electricity of a card of one's own and its machine, under load."""
    return (watts + prices.host_watts) / 1000 * prices.usd_per_kwh


def usd_per_million(usd_per_hour: float, tokens_per_s: float) -> float:
    """A million tokens, when the card is busy all the time."""
    return usd_per_hour / (tokens_per_s * 3600) * 1e6


def break_even_hours(price: Price, watts: float, prices: Prices) -> float:
    """Hours of use after which buying is cheaper than renting. inf: never; nan: a price is missing."""
    if price.rent is None or price.buy is None:
        return math.nan
    saved = price.rent - owned_usd_per_hour(watts, prices)
    return (price.buy + prices.host_usd) / saved if saved > 0 else math.inf
