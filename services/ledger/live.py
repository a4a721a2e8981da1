"""How the stack is doing now: the requests of the last minute, and the speed of every worker."""

import time
from collections import deque
from collections.abc import Callable, Iterable

from common.records import ANSWER_CACHE, Record
from common.workers import Heartbeat, Worker
from services.ledger.usage import FAILED

WINDOW_S = 60.0
MAX_KEPT = 50_000
SPEED_WINDOW_S = 5.0
HOUR_S, POINT_EVERY_S = 3600.0, 10.0


def quantile(values: list[float], share: float) -> float | None:
    """The value that `share` of the sorted `values` do not exceed; None of nothing."""
    return values[min(int(share * len(values)), len(values) - 1)] if values else None


class LastMinute:
    """The records of the last WINDOW_S seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._kept: deque[Record] = deque(maxlen=MAX_KEPT)

    def add(self, records: Iterable[Record]) -> None:
        """Take in what ended."""
        self._kept.extend(records)

    def public(self) -> dict[str, object]:
        """Counts, times in seconds, the share of prompt tokens that were cached."""
        since = self._clock() - WINDOW_S
        kept = [r for r in self._kept if r.started_at + r.duration_s >= since]
        self._kept = deque(kept, maxlen=MAX_KEPT)
        first = sorted(r.ttft_s for r in kept if r.ttft_s is not None and r.stream and not r.batch)
        prompt = sum(r.prompt_tokens or 0 for r in kept)
        return {
            "requests": len(kept),
            "failed": sum(r.outcome in FAILED for r in kept),
            "cancelled": sum(r.outcome == "cancelled" for r in kept),
            "from_memory": sum(r.worker == ANSWER_CACHE for r in kept),
            "ttft_p50_s": quantile(first, 0.5),
            "ttft_p95_s": quantile(first, 0.95),
            "cached_share": round(sum(r.cached_tokens or 0 for r in kept) / prompt, 4) if prompt else None,
        }


class Speeds:
    """Tokens per second of every worker, from the counters in its heartbeats."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, deque[tuple[float, int, int]]] = {}

    def take(self, workers: Iterable[Worker]) -> None:
        """Note where the counters are; call it about once a second."""
        now = self._clock()
        beats = {worker.beat.id: worker.beat for worker in workers}
        self._seen = {worker_id: self._seen.get(worker_id, deque()) for worker_id in beats}
        for worker_id, beat in beats.items():
            seen = self._seen[worker_id]
            seen.append((now, beat.generated_tokens, beat.prompt_tokens))
            while now - seen[0][0] > SPEED_WINDOW_S:
                seen.popleft()

    def of(self, worker_id: str) -> tuple[float, float]:
        """Generated and read tokens per second over the last SPEED_WINDOW_S."""
        seen = self._seen.get(worker_id)
        if not seen or (passed := seen[-1][0] - seen[0][0]) <= 0:
            return 0.0, 0.0
        (_, first_out, first_in), (_, last_out, last_in) = seen[0], seen[-1]
        return max(last_out - first_out, 0) / passed, max(last_in - first_in, 0) / passed


class LastHour:
    """A point every POINT_EVERY_S of the last hour: (Unix time, tokens/s, running, waiting). A restart forgets them."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.points: deque[tuple[float, float, int, int]] = deque(maxlen=int(HOUR_S / POINT_EVERY_S))

    def take(self, tokens_per_s: float, running: int, waiting: int) -> None:
        """How it is now; kept if the last point is old enough."""
        now = self._clock()
        if not self.points or now - self.points[-1][0] >= POINT_EVERY_S or now < self.points[-1][0]:
            self.points.append((round(now, 1), tokens_per_s, running, waiting))
        while self.points and now - self.points[0][0] > HOUR_S:
            self.points.popleft()


def describe(beat: Heartbeat, speed: tuple[float, float]) -> dict[str, object]:
    """One worker, as the status shows it. No address: that is nobody's business outside."""
    return {
        "id": beat.id, "engine": beat.engine, "format": next((m.format for m in beat.models if m.format), None),
        "state": beat.state, "held": beat.held,
        "models": [model.id for model in beat.models],
        "in_flight": beat.in_flight, "waiting": beat.waiting, "slots": beat.slots, "kv_use": round(beat.kv_use, 4),
        "tokens_per_s": round(speed[0], 1), "prompt_tokens_per_s": round(speed[1], 1),
        "cached_share": round(beat.cached_tokens / beat.prompt_tokens, 4) if beat.prompt_tokens else None,
    }
