"""An engine like vLLM's in a simulation: steps, chunks of prompts, a prefix cache, a tier that all share (simulate.py)."""

from collections import OrderedDict, deque
from collections.abc import Generator, Iterable, Sequence
from typing import Any, NamedTuple

import simpy

Events = Generator[simpy.Event, Any, None]


class Speed(NamedTuple):
    """An engine: a step takes base_s + decode_s a decoding sequence + prefill_s a token read + attention_s a token
    read and token before it."""

    base_s: float
    decode_s: float
    prefill_s: float
    attention_s: float
    remote_s: float
    """A token whose block comes from the shared tier."""
    step_tokens: int
    slots: int
    block_tokens: int
    blocks: int
    """In its own prefix cache."""


class Job:
    """One request inside an engine."""

    __slots__ = ("answer", "blocks", "cached", "failed", "first", "left", "length", "made", "whole")

    def __init__(self, env: simpy.Environment, blocks: Sequence[int], length: int, answer: int) -> None:
        """`blocks`: of the prompt and of the answer that it will have."""
        self.blocks, self.length, self.answer = blocks, length, answer
        self.left, self.made, self.cached = length, 0, 0
        self.first, self.whole = env.event(), env.event()
        self.failed = False


class Engine:
    """Continuous batching. `tier`: the blocks that all engines can have; None: there is no tier."""

    def __init__(self, env: simpy.Environment, name: str, speed: Speed, tier: set[int] | None, slowness: float) -> None:
        self.env, self.name, self.speed, self.tier, self.slowness = env, name, speed, tier, slowness
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.cache: OrderedDict[int, None] = OrderedDict()
        self.busy_s, self.dead = 0.0, False
        self._wanted = env.event()
        env.process(self._steps())

    @property
    def in_flight(self) -> int:
        """Requests inside."""
        return len(self.waiting) + len(self.running)

    def take(self, job: Job) -> None:
        """A request comes in."""
        self.waiting.append(job)
        if not self._wanted.triggered:
            self._wanted.succeed()

    def die(self) -> None:
        """kill -9: what is inside fails."""
        self.dead = True
        for job in (*self.waiting, *self.running):
            job.failed = True
            for event in (job.first, job.whole):
                if not event.triggered:
                    event.succeed()
        self.waiting.clear()
        self.running.clear()

    def _steps(self) -> Events:
        while not self.dead:
            if not self.in_flight:
                self._wanted = self.env.event()
                yield self._wanted
                continue
            decoding = [job for job in self.running if not job.left]
            step_s, reading = self._read(self.speed.step_tokens - len(decoding))
            step_s += self.speed.base_s + self.speed.decode_s * len(decoding)
            step_s *= self.slowness
            yield self.env.timeout(step_s)
            if self.dead:
                return
            self.busy_s += step_s
            for job, count in reading:
                job.left -= count
                if not job.left:
                    self._keep(job.blocks[: job.length // self.speed.block_tokens])
                    decoding.append(job)
            for job in decoding:
                self._one_more(job)

    def _read(self, budget: int) -> tuple[float, list[tuple[Job, int]]]:
        """(seconds, tokens of each prompt) that a step reads of prompts."""
        took = 0.0
        reading: list[tuple[Job, int]] = []
        for job in self.running:
            if job.left and budget > 0:
                budget -= self._chunk(job, budget, reading)
        while budget > 0 and self.waiting and len(self.running) < self.speed.slots:
            job = self.waiting.popleft()
            self.running.append(job)
            took += self._look_up(job)
            budget -= self._chunk(job, budget, reading)
        for job, count in reading:
            before = job.length - job.left
            took += count * (self.speed.prefill_s + self.speed.attention_s * (before + count / 2))
        return took, reading

    def _chunk(self, job: Job, budget: int, reading: list[tuple[Job, int]]) -> int:
        count = min(job.left, budget)
        reading.append((job, count))
        return count

    def _look_up(self, job: Job) -> float:
        """Take what is cached of a prompt; seconds for what comes from the tier. One token is always computed."""
        own = remote = 0
        for block in job.blocks[: job.length // self.speed.block_tokens]:
            if block in self.cache and not remote:
                self.cache.move_to_end(block)
                own += 1
            elif self.tier is not None and block in self.tier:
                remote += 1
            else:
                break
        job.cached = min((own + remote) * self.speed.block_tokens, job.length - 1)
        job.left = job.length - job.cached
        return remote * self.speed.block_tokens * self.speed.remote_s

    def _keep(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.cache[block] = None
            self.cache.move_to_end(block)
            if self.tier is not None:
                self.tier.add(block)
        while len(self.cache) > self.speed.blocks:
            self.cache.popitem(last=False)

    def _one_more(self, job: Job) -> None:
        job.made += 1
        if job.made == 1:
            job.first.succeed()
        if job.made >= job.answer:
            self.running.remove(job)
            self._keep(job.blocks)  # the next turn begins with this answer
            job.whole.succeed()
