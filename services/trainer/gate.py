"""The last gate: the tuned model as workers serve it, against its base, on rows that it was not trained on.

What a run measures is the trainer's own model, and the best of several looks at these rows. Here vLLM says how likely
it finds the answers (`prompt_logprobs`), with and without the adapter: what the users will get.
"""

import asyncio
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

import httpx

from services.trainer.publish import Refused

ROWS = 32
"""Compared at most: each is two prefills on a worker that also answers people."""
TOLERANCE_NATS = 0.1
"""By how much the served loss may differ from the trained one, with a tenth of it: bf16, 4 bits, other kernels."""
ENOUGH_ROWS = 20
TIMEOUT_S = 600.0
"""A row waits for its turn behind people. A training is not thrown away because they are many."""
LOOK_EVERY_S = 1.0
"""Between two signs of life while a row waits."""
AWAY = (404, 408, 429)
"""A worker that has just restarted, or is busy."""


class Row(TypedDict):
    """A validation row: its tokens, and which of them are learnt (indices)."""

    tokens: list[int]
    learnt: list[int]


class Verdict(NamedTuple):
    """Mean nats per learnt token, tuned and base; the standard error of their difference; how many rows."""

    tuned: float
    base: float
    error: float
    rows: int

    def __str__(self) -> str:
        text = f"as served: {self.tuned:.4f} nats a token, the base model {self.base:.4f}, on {self.rows} rows"
        if self.rows < ENOUGH_ROWS or self.base - self.tuned < 2 * self.error:
            text += f" (± {self.error:.4f}: too few or too uneven to mean much; {ENOUGH_ROWS} and more are better)"
        return text


def check_served(
    rows: Sequence[Row], address: str, base: str, tuned: str, token: str, still: Callable[[], None]
) -> Verdict:
    """Ask a worker about every row, with both models. `still()` is called again and again, also while one waits.

    Raises Refused when the tuned model is worse than its base, httpx.HTTPError when the worker does not answer.
    """
    losses: dict[str, list[float]] = {base: [], tuned: []}
    asyncio.run(_ask(rows, address, losses, token, still))
    verdict = judge([len(row["learnt"]) for row in rows], losses[tuned], losses[base])
    if not verdict.tuned <= verdict.base:  # also a NaN
        raise Refused("worse_than_base", f"The tuned model is worse than its base {verdict}. It is not published.")
    return verdict


async def _ask(
    rows: Sequence[Row], address: str, losses: dict[str, list[float]], token: str, still: Callable[[], None]
) -> None:
    """Fill in the loss of every row, by model. What `still()` raises ends the request that waits."""
    async with httpx.AsyncClient(
        base_url=f"http://{address}", headers={"authorization": f"Bearer {token}"}, timeout=TIMEOUT_S
    ) as http:
        for row in rows:
            for model, found in losses.items():
                asked = asyncio.create_task(_loss(http, model, row))
                while not asked.done():
                    still()
                    await asyncio.wait([asked], timeout=LOOK_EVERY_S)
                found.append(asked.result())


def spread(rows: Sequence[Row]) -> list[Row]:
    """At most ROWS of them, from all over the file: what stands together is often alike."""
    count = min(ROWS, len(rows))
    return [rows[at * len(rows) // count] for at in range(count)]


def differs(verdict: Verdict, trained: float) -> str:
    """A warning when what is served is not what was trained. `trained`: the run's own loss on the very same rows."""
    if abs(verdict.tuned - trained) <= TOLERANCE_NATS + trained / 10:
        return ""
    return (
        f"Workers serve it otherwise than it was trained: on these rows the trainer measured {trained:.4f}. Is the "
        "workers' base model another one, or quantised?"
    )


def judge(tokens: Sequence[int], tuned: Sequence[float], base: Sequence[float]) -> Verdict:
    """Sums of nats per row to means per token; the error of the difference is a ratio estimate's over rows."""
    total, count = sum(tokens), len(tokens)
    means = sum(tuned) / total, sum(base) / total
    gap = means[1] - means[0]
    residuals = [b - t - gap * n for t, b, n in zip(tuned, base, tokens, strict=True)]
    error = statistics.stdev(residuals) * math.sqrt(count) / total if count > 1 else math.inf
    return Verdict(*means, error, count)


async def _loss(http: httpx.AsyncClient, model: str, row: Row) -> float:
    """Nats of a row's learnt tokens."""
    asked = {"model": model, "prompt": row["tokens"], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = await http.post("/v1/completions", json=asked)
    if 400 <= answer.status_code < 500 and answer.status_code not in AWAY:
        raise Refused("not_compared", f"The worker refuses a validation row: {answer.text[:300]}")
    said: list[dict[str, Any] | None] = answer.raise_for_status().json()["choices"][0]["prompt_logprobs"]
    return -sum(float((said[at] or {})[str(row["tokens"][at])]["logprob"]) for at in row["learnt"])
