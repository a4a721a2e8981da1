"""A fleet in a discrete-event simulation, on simpy: `gateway/routing.py` itself, on engines and a network that are not there.

Real: the choice of a worker (`routing.choose`, its holders, its pools) and what gateways know (loads as of the last
heartbeat, plus what each has sent since). Simulated: engines that compute in steps like vLLM's (decoding sequences
first, prompts in chunks, a prefix cache of blocks in LRU order, a tier that all share), gateways that hear heartbeats
late and do not hear of each other, workers that are slow, workers that die.

    python -m bench scale --only simulated
"""

import bisect
import random
import statistics
from collections.abc import Callable, Generator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import simpy

from bench.simulated_engine import Engine, Events, Job, Speed
from bench.traces import Session
from common.redis.names import HEARTBEAT_TTL_MS
from common.workers import Heartbeat, Pool, Worker
from gateway import routing

MODEL = "m"
BEAT_S = 0.2
BEAT_GROUPS = 10
"""Heartbeats come spread over BEAT_S, in so many groups."""
TTL_S = HEARTBEAT_TTL_MS / 1000
RETRIES = 3
RING_POINTS = 100


class Gateway:
    """What one gateway process knows: heartbeats that are late, its own sendings, the prefixes that it has sent."""

    def __init__(self, env: simpy.Environment, engines: Sequence[Engine]) -> None:
        self.env = env
        self.known = {one.name: Worker(Heartbeat(one.name, one.name, "ready", []), 0.0) for one in engines}
        self.holders = routing.Holders()
        self.pool = Pool(self.known.values())
        self.ring = sorted((_point(f"{name} {at}"), name) for name in self.known for at in range(RING_POINTS))
        self.turn = random.randrange(len(engines))
        for group in range(BEAT_GROUPS):
            env.process(self._hear(engines[group::BEAT_GROUPS], BEAT_S * group / BEAT_GROUPS))

    def _hear(self, engines: Sequence[Engine], after_s: float) -> Events:
        yield self.env.timeout(after_s + random.random() * BEAT_S / BEAT_GROUPS)
        heard = {one.name: self.env.now for one in engines}
        while True:
            for one in engines:
                worker = self.known.get(one.name)
                if worker is None:
                    continue
                if not one.dead:
                    worker.beat.in_flight, worker.sent = one.in_flight, 0
                    heard[one.name] = self.env.now
                elif self.env.now - heard[one.name] > TTL_S:
                    del self.known[one.name]
                    self.pool = Pool(self.known.values())
            yield self.env.timeout(BEAT_S)


Policy = Callable[[Gateway, Pool, bytes], Worker]


def by_chance(_: Gateway, pool: Pool, __: bytes) -> Worker:
    """Any worker."""
    return random.choice(pool.workers)


def in_turn(gateway: Gateway, pool: Pool, _: bytes) -> Worker:
    """Round robin, as each gateway counts."""
    gateway.turn += 1
    return pool.workers[gateway.turn % len(pool.workers)]


def least(_: Gateway, pool: Pool, __: bytes) -> Worker:
    """Least requests in flight, of the eight that are looked at."""
    return routing.least_loaded(routing.look_at(pool.workers))


def prefix(gateway: Gateway, pool: Pool, prompt: bytes) -> Worker:
    """What the gateway does."""
    return routing.choose(pool, MODEL, "", prompt, gateway.holders).worker


def hashed(gateway: Gateway, pool: Pool, prompt: bytes) -> Worker:
    """Consistent hashing of a prompt's beginning."""
    at = bisect.bisect(gateway.ring, (_point(prompt[: routing.PREFIX_BYTES[-1]].decode()), ""))
    for step in range(len(gateway.ring)):
        name = gateway.ring[(at + step) % len(gateway.ring)][1]
        if name in pool.by_id:
            return pool.by_id[name]
    raise AssertionError("an empty pool")


POLICIES: dict[str, Policy] = {"random": by_chance, "round robin": in_turn, "least in flight": least,
                               "prefix": prefix, "consistent hashing": hashed}


def _point(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def p95(values: Sequence[float]) -> float:
    """The 95th percentile."""
    return statistics.quantiles(values, n=20)[-1]


class Fleet(NamedTuple):
    """How many of what."""

    workers: int
    gateways: int = 1
    by_session: bool = False
    """Whether a session asks one gateway only; else each of its turns comes to any."""
    tier: bool = True
    slow: float = 0.0
    """The share of workers that take twice as long."""
    deaths: tuple[tuple[float, int], ...] = ()
    """(seconds, worker)."""


class Outcome(NamedTuple):
    """What came of a run."""

    ttft_s: tuple[float, ...]
    hit_rate: float
    hottest: float
    """The busiest worker's busy seconds ÷ their mean."""
    busy: float
    """Mean share of the time that a worker computed."""
    failed: int
    """Requests that no retry could save: their worker died while they streamed."""

    @property
    def p95_s(self) -> float:
        """Of time to first token."""
        return p95(self.ttft_s)


def run(trace: Sequence[Session], fleet: Fleet, speed: Speed, policy: Policy, seed: int = 0) -> Outcome:
    """One run, until the last answer is whole."""
    random.seed(seed)
    env = simpy.Environment()
    tier: set[int] | None = set() if fleet.tier else None
    slow = int(fleet.slow * fleet.workers)
    engines = [Engine(env, f"w{n}", speed, tier, 2.0 if n < slow else 1.0) for n in range(fleet.workers)]
    gateways = [Gateway(env, engines) for _ in range(fleet.gateways)]
    client = _Clients(env, {one.name: one for one in engines}, gateways, policy, fleet.by_session, speed.block_tokens)
    for at_s, number in fleet.deaths:
        env.process(_death(env, at_s, engines[number]))
    env.run(env.all_of([env.process(client.converse(session)) for session in trace]))
    busy = [one.busy_s for one in engines if not one.dead] or [0.0]
    mean = statistics.mean(busy)
    hottest = max(busy) / mean if mean else 1.0
    return Outcome(tuple(client.ttft_s), client.cached / max(1, client.asked), hottest, mean / env.now, client.failed)


def _death(env: simpy.Environment, at_s: float, engine: Engine) -> Events:
    yield env.timeout(at_s)
    engine.die()


class _Clients:
    """Everybody who asks."""

    def __init__(
        self, env: simpy.Environment, engines: dict[str, Engine], gateways: Sequence[Gateway], policy: Policy,
        by_session: bool, block: int,
    ) -> None:  # fmt: skip
        self.env, self.engines, self.policy, self.block = env, engines, policy, block
        self.gateways, self.by_session = gateways, by_session
        self.ttft_s: list[float] = []
        self.cached = self.asked = self.failed = 0

    def converse(self, session: Session) -> Events:
        """All turns of one session."""
        one = [random.choice(self.gateways)]
        yield self.env.timeout(session.at_s)
        said = session.system.split()
        blocks: list[int] = []
        for turn in session.turns:
            yield self.env.timeout(turn.pause_s)
            said += turn.words.split()
            length, prompt = len(said), " ".join(said).encode()
            said += ["answer"] * turn.answer_tokens
            self._name(blocks, said)
            gateway = random.choice(one if self.by_session else self.gateways)
            if not (yield from self._ask(gateway, prompt, tuple(blocks), length, turn.answer_tokens)):
                self.failed += 1
                return

    def _name(self, blocks: list[int], said: Sequence[str]) -> None:
        """Name each whole block by all that it and those before it hold."""
        while (len(blocks) + 1) * self.block <= len(said):
            words = said[len(blocks) * self.block : (len(blocks) + 1) * self.block]
            blocks.append(hash((blocks[-1] if blocks else 0, *words)))

    def _ask(
        self, gateway: Gateway, prompt: bytes, blocks: Sequence[int], length: int, answer: int
    ) -> Generator[simpy.Event, Any, bool]:
        """Whether it was answered to the end."""
        began, pool = self.env.now, gateway.pool
        for _ in range(RETRIES):
            if not pool.workers:
                return False
            worker = self.policy(gateway, pool, prompt)
            worker.sent += 1
            engine = self.engines[worker.beat.id]
            if not engine.dead:
                job = Job(self.env, blocks, length, answer)
                engine.take(job)
                yield job.first
                if not job.failed:
                    self.ttft_s.append(self.env.now - began)
                    self.cached += job.cached
                    self.asked += length
                    yield job.whole
                    return not job.failed
            pool = pool.without([worker.beat.address])  # nothing was streamed: another one may try
        return False
