"""Which worker takes a request: pure functions over the table.

Base policy: least requests in flight. On top, a filter: requests that begin alike prefer the same worker, so
its prefix cache serves them, as long as that worker is not clearly busier than the rest. Preference is
rendezvous hashing (Thaler & Ravishankar 1998) of a prefix of fixed length, deepest first, so every gateway
process gives the same answer and nothing has to be remembered.
"""

import random
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from gateway.registry import Worker

PREFIX_BYTES = (16384, 4096, 1024)
"""Prefix lengths tried, deepest first. A prompt shorter than the last has no preferred worker."""
LOAD_RATIO = 1.25
LOAD_SLACK = 4
"""A preferred worker may have at most LOAD_RATIO times the mean load *and* LOAD_SLACK above the least loaded:
over both it is passed by (bounded loads, Mirrokni et al. 2016; the second margin keeps small numbers calm)."""


class Route(NamedTuple):
    """A choice and its reason, for the X-OwnGPT-Worker and Server-Timing headers."""

    worker: Worker
    reason: str


def choose(workers: Sequence[Worker], model: str, prefix: bytes) -> Route:
    """Pick one of `workers` (at least one) for a prompt that begins with the bytes `prefix`."""
    if len(workers) == 1:
        return Route(workers[0], "only")
    if len(prefix) >= PREFIX_BYTES[-1]:
        loads = [worker.load for worker in workers]
        limit = max(LOAD_RATIO * sum(loads) / len(loads), min(loads) + LOAD_SLACK)
        for length in PREFIX_BYTES:
            if len(prefix) >= length:
                preferred = rendezvous(workers, model, prefix[:length])
                if preferred.load <= limit:
                    return Route(preferred, f"prefix-{length}")
    return Route(least_loaded(workers), "least-in-flight")


def least_loaded(workers: Sequence[Worker]) -> Worker:
    """The worker with the fewest requests in flight; ties are broken by chance, so gateways do not herd."""
    least = min(worker.load for worker in workers)
    ties = [worker for worker in workers if worker.load == least]
    return ties[0] if len(ties) == 1 else random.choice(ties)  # noqa: S311 - balance, not secrecy


def rendezvous(workers: Sequence[Worker], model: str, prefix: bytes) -> Worker:
    """The worker with the highest hash of (model, prefix, worker)."""
    digest = blake2b(prefix, digest_size=16, key=model.encode()[:64]).digest()
    return max(workers, key=lambda worker: blake2b(worker.beat.id.encode(), digest_size=8, key=digest).digest())
