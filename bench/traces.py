"""Traces: who asks what when. The simulation and a real stack are given the same ones.

A trace is a list of sessions. A session is a conversation: each turn asks with all that was said before, some seconds
after the last answer was whole. Sessions of one application begin with the same system prompt.
"""

import random
from typing import NamedTuple

WORDS = [
    "river", "stone", "winter", "lantern", "copper", "garden", "signal", "market", "window", "harbour", "silver",
    "engine", "letter", "forest", "bridge", "mountain", "paper", "candle", "thunder", "orchard", "mirror", "pocket",
    "circle", "velvet", "anchor", "feather", "kitchen", "summer", "island", "ladder",
]
"""Each is one token of SmolLM2's with the space before it, so a text of so many words is as many tokens."""


class Turn(NamedTuple):
    """One question and how long its answer becomes."""

    words: str
    answer_tokens: int
    pause_s: float
    """After the answer before, or after the session's start."""


class Session(NamedTuple):
    """One conversation."""

    at_s: float
    system: str
    turns: tuple[Turn, ...]


class Shape(NamedTuple):
    """What sessions are like. Counts of tokens are means of exponential distributions, cut at four times them."""

    applications: int = 20
    """System prompts; the k-th is asked for in proportion to 1/k."""
    system_tokens: int = 500
    turns: float = 4.0
    question_tokens: int = 60
    answer_tokens: int = 80
    pause_s: float = 10.0
    burst: float = 1.0
    """How many times faster sessions come in every fourth quarter of a minute."""


def words(source: random.Random, count: int) -> str:
    """So many tokens of text."""
    return " ".join(source.choices(WORDS, k=count))


def sessions(shape: Shape, per_s: float, length_s: float, seed: int) -> list[Session]:
    """Sessions that begin by chance, `per_s` in the mean, for `length_s` seconds."""
    source = random.Random(seed)
    systems = [words(source, shape.system_tokens) for _ in range(shape.applications)]
    weights = [1 / rank for rank in range(1, shape.applications + 1)]
    found: list[Session] = []
    at = 0.0
    while True:
        rate = per_s * (shape.burst if int(at / 15) % 4 == 3 else 1.0)
        at += source.expovariate(rate)
        if at >= length_s:
            return found
        [system] = source.choices(systems, weights)
        count = 1 + int(source.expovariate(1 / max(0.01, shape.turns - 1)))
        found.append(Session(at, system, tuple(_turn(source, shape, first=n == 0) for n in range(min(count, 20)))))


def _turn(source: random.Random, shape: Shape, *, first: bool) -> Turn:
    def some(mean: int) -> int:
        return max(4, min(4 * mean, int(source.expovariate(1 / mean))))

    pause = 0.0 if first else source.expovariate(1 / shape.pause_s)
    return Turn(words(source, some(shape.question_tokens)), some(shape.answer_tokens), pause)
