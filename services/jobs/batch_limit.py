"""How many batch requests may run at once: idle capacity, and never at the price of somebody who waits for an answer.

Two limits. While nobody else has asked for a while, nearly all slots. While somebody does, a small one that every TTFT
of theirs moves: additive increase, multiplicative decrease (Chiu and Jain 1989). A TTFT is good when it is near what
interactive requests had while no batch request ran. Pure: told what happened, by `BatchLoad`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from statistics import quantiles

IDLE_STEP = 2.0
"""Added per look when nobody else is there."""
SHARED_STEP = 0.02
"""Added per good TTFT (below one: times the limit). Small: probing too high costs somebody a slow answer."""
SHARED_START = 0.25
SHARED_LEAST = 0.05
GAP_S = 0.5
"""A limit below one is a gap: a batch request starts alone, GAP_S times (1 / limit - 1) after anybody was there."""
SLOWER = 1.2
RESERVED_SHARE = 0.25
"""Of the engines' slots, kept free for whoever comes."""
REST_S = 2.0
"""After a decrease the limit stays: what is in flight has to finish before its effect shows."""
QUIET_S = 10.0
"""Nobody else for so long: the engines are idle."""
REMEMBERED = 200
MIN_SAMPLES = 5


class BatchLimit:
    """The limit. What is normal are TTFTs of interactive requests in seconds, measured without batch work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.limit = self.shared = SHARED_START
        """The limit now, and the one for times when others are there."""
        self._normal: deque[float] = deque(maxlen=REMEMBERED)
        self._rest_until = 0.0
        self._busy_at = float("-inf")

    def learn(self, ttfts_s: Iterable[float]) -> None:
        """TTFTs of interactive requests that met no batch work."""
        self._normal.extend(ttfts_s)

    def look(self, *, slots: int, interactive: int, ttfts_s: list[float]) -> float:
        """Take in a moment; returns the new limit.

        `slots` of ready engines, `interactive` requests in flight, and the TTFTs of interactive requests that ended
        since the last look.
        """
        now = self._clock()
        most = slots * (1.0 - RESERVED_SHARE)
        if interactive or ttfts_s:
            self._busy_at = now
        for ttft_s in ttfts_s:
            if now < self._rest_until:
                continue
            if ttft_s > SLOWER * self.usual_s:
                self.shared /= 2
                self._rest_until = now + REST_S
            else:
                self.shared += SHARED_STEP * min(1.0, self.shared)
        self.shared = max(SHARED_LEAST, min(self.shared, most))
        self.limit = min(self.limit + IDLE_STEP, most) if now - self._busy_at > QUIET_S else self.shared
        return self.limit

    @property
    def usual_s(self) -> float:
        """The 95th percentile of TTFT without batch work; infinite until it is known."""
        if len(self._normal) < MIN_SAMPLES:
            return float("inf")
        return quantiles(self._normal, n=20)[-1]

    def room(self, in_flight: int, interactive: int) -> bool:
        """Whether one more batch request may start."""
        if self.limit >= 1.0:
            return in_flight < int(self.limit)
        if in_flight or interactive or not self.limit:
            return False
        return self._clock() - self._busy_at >= GAP_S * (1.0 / self.limit - 1.0)
