"""Which worker takes a request.

Base policy: least requests in flight. On top, a filter: a request prefers a worker that has read its beginning lately,
whose own prefix cache still holds it, as long as that worker is not clearly busier than the rest. Nobody having read
it, or all of them being busy, the least loaded one is as good: what any worker has read, redis-cache makes warm
(docs/kv-cache.md).
"""

import random
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

from common.workers import Pool, Worker

PREFIX_BYTES = (16384, 4096, 1024)
"""Prefix lengths compared, deepest first. A prompt shorter than the last has no preferred worker."""
LOAD_RATIO = 1.25
LOAD_SLACK = 4
"""A preferred worker may have at most LOAD_RATIO times the mean load *and* LOAD_SLACK above the least loaded:
over both it is passed by (bounded loads, Mirrokni et al. 2016; the second margin keeps small numbers calm)."""
LOOKED_AT = 8
"""Loads compared for a choice. Of more workers, a stretch of a shuffled list from a random place on: nearly as even as
comparing all (Mitzenmacher 2001, "The power of two choices"), at a cost that does not grow."""
MAX_PREFIXES = 50_000
MAX_HOLDERS = 8
TAG_CHARS = 4


class Route(NamedTuple):
    """A choice and its reason, for the X-OwnGPT-Worker and Server-Timing headers."""

    worker: Worker
    reason: str


class Holders:
    """Which workers have read which prefixes: the last MAX_PREFIXES, as this gateway process saw them.

    A worker that restarts has a new id, so what its former life held is not expected of it. Another gateway
    process learns for itself; until then the worker it picks fetches from redis-cache.
    """

    def __init__(self) -> None:
        self._holders: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()

    def of(self, prefix: bytes) -> tuple[str, ...]:
        """Ids of the workers that have read a prefix, given by its digest."""
        return self._holders.get(prefix, ())

    def note(self, prefix: bytes, worker_id: str) -> None:
        """A worker is about to read a prefix."""
        known = self._holders.get(prefix, ())
        if worker_id not in known:
            self._holders[prefix] = (*known, worker_id)[-MAX_HOLDERS:]
        self._holders.move_to_end(prefix)
        if len(self._holders) > MAX_PREFIXES:
            self._holders.popitem(last=False)


def choose(pool: Pool, model: str, scope: str, prompt: bytes, holders: Holders, last: str = "") -> Route:
    """Pick a worker of `pool` (at least one) for a prompt, and remember it. `scope`: whose prefix cache it may use.

    `last`: the tag of the worker that had the last turn of this conversation, of which the prompt is the end only.
    """
    if len(pool.workers) == 1:
        return Route(pool.workers[0], "only")
    seen = look_at(pool.workers)
    if last:
        limit = _limit(seen)
        warm = [worker for worker in pool.workers if tag(worker.beat.id) == last and worker.load <= limit]
        return Route(least_loaded(warm), "last-turn") if warm else Route(least_loaded(seen), "least-in-flight")
    if len(prompt) < PREFIX_BYTES[-1]:
        return Route(least_loaded(seen), "least-in-flight")
    lengths = [length for length in PREFIX_BYTES if len(prompt) >= length]
    digests = [(length, prefix_digest(model, scope, prompt[:length])) for length in lengths]
    route = _holder(pool, seen, digests, holders) or Route(least_loaded(seen), "least-in-flight")
    for _, digest in digests:
        holders.note(digest, route.worker.beat.id)
    return route


def look_at(workers: Sequence[Worker]) -> Sequence[Worker]:
    """At most LOOKED_AT of them."""
    count = len(workers)
    if count <= LOOKED_AT:
        return workers
    at = int(random.random() * count)  # noqa: S311 - balance, not secrecy
    seen = workers[at : at + LOOKED_AT]
    return seen if len(seen) == LOOKED_AT else [*seen, *workers[: LOOKED_AT - len(seen)]]


def _holder(
    pool: Pool, seen: Sequence[Worker], digests: Sequence[tuple[int, bytes]], holders: Holders
) -> Route | None:
    limit = _limit(seen)
    for length, digest in digests:
        warm = [
            worker for worker_id in holders.of(digest)
            if (worker := pool.by_id.get(worker_id)) is not None and worker.load <= limit
        ]
        if warm:
            return Route(least_loaded(warm), f"prefix-{length}")
    return None


def _limit(seen: Sequence[Worker]) -> float:
    """How busy a preferred worker may be."""
    loads = [worker.load for worker in seen]
    return max(LOAD_RATIO * sum(loads) / len(loads), min(loads) + LOAD_SLACK)


def least_loaded(workers: Sequence[Worker]) -> Worker:
    """The worker with the fewest requests in flight; ties are broken by chance, so gateways do not herd."""
    least = min(worker.load for worker in workers)
    ties = [worker for worker in workers if worker.load == least]
    return ties[0] if len(ties) == 1 else random.choice(ties)  # noqa: S311 - balance, not secrecy


@lru_cache(maxsize=4096)
def tag(worker_id: str) -> str:
    """What names a worker in the ids of the responses that it made."""
    return blake2b(worker_id.encode(), digest_size=TAG_CHARS // 2).hexdigest()


def prefix_digest(model: str, scope: str, prefix: bytes) -> bytes:
    """What names the beginning of a prompt."""
    return blake2b(prefix, digest_size=16, key=blake2b(f"{scope}\0{model}".encode()).digest()).digest()
