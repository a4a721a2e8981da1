"""When fetching blocks beats computing them: the break-even rule, from what this worker measures of itself.

    fetch(n tokens)   = round trip + n * bytes_per_token / bandwidth
    compute(n tokens) = n / prefill rate

Both rates are exponential means. A measurement older than FORGET_S does not count, so a verdict against fetching is
put to the test again. Without both measurements the answer is to fetch: computing 128 tokens of the smallest model on
a CPU takes 100 ms, reading them takes two.
"""

import time
from collections.abc import Callable

WEIGHT = 0.2
FORGET_S = 60.0


class Mean:
    """An exponential mean that forgets."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._value = 0.0
        self._at = float("-inf")

    def add(self, value: float) -> None:
        """Take in a measurement."""
        old = self.get()
        self._value = value if old is None else old + WEIGHT * (value - old)
        self._at = self._clock()

    def get(self) -> float | None:
        """The mean, or None without a recent measurement."""
        return self._value if self._clock() - self._at < FORGET_S else None


class Economy:
    """What this worker knows of its speed. Used by the scheduler's and the transfer threads: plain assignments only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._round_trip_s = Mean(clock)
        self._fetch_s_per_byte = Mean(clock)
        self._prefill_s_per_token = Mean(clock)

    def looked_up(self, seconds: float) -> None:
        """A lookup took this long."""
        self._round_trip_s.add(seconds)

    def fetched(self, size_bytes: int, seconds: float) -> None:
        """A load took this long, from its submission to its end."""
        self._fetch_s_per_byte.add(seconds / size_bytes)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """An engine step that computed this many tokens took this long."""
        self._prefill_s_per_token.add(seconds / tokens)

    def fetch_s(self, size_bytes: int) -> float | None:
        """How long fetching would take."""
        per_byte = self._fetch_s_per_byte.get()
        return None if per_byte is None else (self._round_trip_s.get() or 0.0) + size_bytes * per_byte

    def compute_s(self, tokens: int) -> float | None:
        """How long computing would take."""
        per_token = self._prefill_s_per_token.get()
        return None if per_token is None else tokens * per_token

    def pays(self, tokens: int, size_bytes: int) -> bool:
        """Whether to fetch."""
        fetch_s, compute_s = self.fetch_s(size_bytes), self.compute_s(tokens)
        return fetch_s is None or compute_s is None or fetch_s < compute_s
