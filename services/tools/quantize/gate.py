"""What a quantised checkpoint lost and gained, both served by the same engine.

perplexity         exp(mean nats a token) on texts that were not calibrated with
kl_nats            Kullback-Leibler divergence of next-token distributions, the original's from the quantised one's:
                   over the tokens that are among the 20 likeliest of both, and all others as one. Putting others
                   together can only lower it, so it is at least so much.
top1_agreement     share of positions at which both find the same token the likeliest
same_answers       share of greedy answers that are the same, token for token
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from common import checkpoint
from services.local.errors import UserError
from services.tools.quantize import engine

ROWS, TOKENS = 40, 512
ANSWERS = 16
LEAST_TOKENS = 16
AT_ONCE = 8
CONCURRENT = (1, 16)
LEAST_PROBABILITY = 1e-12
Places = list[dict[int, float]]


class Served(msgspec.Struct, frozen=True):
    """What one checkpoint gave."""

    perplexity: float
    size_bytes: int
    load_s: float
    tokens_per_s: dict[str, float]
    """By how many asked at once."""


class Verdict(msgspec.Struct, frozen=True):
    """Both, and how they differ."""

    original: Served
    quantised: Served
    kl_nats: float
    top1_agreement: float
    same_answers: float
    measured_tokens: int

    @property
    def loss(self) -> float:
        """By how much the perplexity is larger: 0.03 is three percent."""
        return self.quantised.perplexity / self.original.perplexity - 1


class Seen(msgspec.Struct):
    """What one checkpoint said of each text, and how it went on."""

    served: Served
    ids: list[list[int]]
    places: list[Places]
    answers: list[list[int]]


def look(
    told: Mapping[str, str],
    cuda: bool,
    rows: Sequence[dict[str, Any]],
    log: Path,
    tell: Callable[[str, float], None],
    ids: list[list[int]] | None = None,
) -> Seen:
    """Serve a checkpoint and ask it. `told`: a worker's environment; `ids`: the other one's tokens.

    `tell(what, share)` hears how far it is. Raises UserError when it does not start, httpx.HTTPError when it stops
    answering.
    """
    tell("starting", 0.0)
    with engine.alone(told, cuda=cuda, log=log) as one:
        limit = min(TOKENS, engine.longest(one) - engine.ANSWER_TOKENS)
        if limit < LEAST_TOKENS:
            raise UserError(f"Sequences of {engine.longest(one)} tokens are too short to be measured; see max_tokens.")
        ids = ids or [said for row in rows[:ROWS] if len(said := engine.tokens(one, row, limit)) > 1]
        places, answers, speeds = [], [], {}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for at, found in enumerate(pool.map(partial(engine.logprobs, one), ids)):
                places.append(found)
                tell("perplexity", 0.1 + 0.5 * at / len(ids))
            halves = [text[: max(1, len(text) // 2)] for text in ids[:ANSWERS]]
            for at, answer in enumerate(pool.map(partial(engine.greedy, one), halves)):
                answers.append(answer)
                tell("greedy answers", 0.6 + 0.2 * at / len(halves))
        for concurrent in CONCURRENT:
            tell(f"tokens/s at {concurrent}", 0.8 if concurrent == CONCURRENT[0] else 0.9)
            speeds[str(concurrent)] = engine.tokens_per_s(one, concurrent)
        size = checkpoint.weights_bytes(told["MODEL"], told["MODEL_REVISION"])
        return Seen(Served(round(perplexity(ids, places), 3), size, one.load_s, speeds), ids, places, answers)


def perplexity(ids: Sequence[Sequence[int]], places: Sequence[Places]) -> float:
    """exp of the mean nats of the tokens that are there."""
    nats = [
        -place[token]
        for text, found in zip(ids, places, strict=True)
        for token, place in zip(text[1:], found, strict=True)
    ]
    return math.exp(sum(nats) / len(nats))


def judge(original: Seen, quantised: Seen) -> Verdict:
    """The difference."""
    both = [
        (p, q)
        for ours, theirs in zip(original.places, quantised.places, strict=True)
        for p, q in zip(ours, theirs, strict=True)
    ]
    same = sum(a == b for a, b in zip(original.answers, quantised.answers, strict=True))
    return Verdict(
        original.served,
        quantised.served,
        kl_nats=round(sum(divergence(p, q) for p, q in both) / len(both), 5),
        top1_agreement=round(sum(likeliest(p) == likeliest(q) for p, q in both) / len(both), 4),
        same_answers=round(same / len(original.answers), 4),
        measured_tokens=len(both),
    )


def divergence(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """KL(p ‖ q) in nats, of log-probabilities of some tokens; those that one of them does not name count as one."""
    shared = p.keys() & q.keys()
    found = sum(math.exp(p[token]) * (p[token] - q[token]) for token in shared)
    rests = [max(LEAST_PROBABILITY, 1 - sum(math.exp(one[token]) for token in shared)) for one in (p, q)]
    return max(0.0, found + rests[0] * math.log(rests[0] / rests[1]))


def likeliest(place: Mapping[int, float]) -> int:
    """The token with the largest probability; of several, the smallest."""
    return min(place, key=lambda token: (-place[token], token))
