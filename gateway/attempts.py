"""What nginx tells about earlier tries of a request, and what may follow from it.

On a failed try nginx asks again with three headers (`nginx/nginx.conf.template`): the workers tried, and its
`$upstream_bytes_sent` and `$upstream_status` histories, which alternate gateway, worker, gateway, worker.
A client cannot send them: nginx overwrites them on the first ask.
"""

import time
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Literal, NamedTuple

from common.upstream import TIMEOUT

MAX_ATTEMPTS = 4
"""nginx allows ten internal redirects; an attempt takes two."""
MAX_DEATHS = 2
"""A request that was running on two workers when they died is not tried on a third."""

Reason = Literal[
    "refused",  # it did not take the request
    "failed",  # it answered with an error of its own
    "died",  # the connection broke while it ran the request
]


class Attempts(NamedTuple):
    """Earlier tries: addresses, how many died or failed while running it, whether one timed out, why the last ended."""

    tried: tuple[str, ...] = ()
    deaths: int = 0
    timed_out: bool = False
    reason: Reason = "refused"


NONE = Attempts()


def read(headers: Mapping[bytes, bytes]) -> Attempts:
    """What nginx' three headers say; missing or odd parts count as 'nothing was sent'."""
    failed = headers.get(b"x-failed-worker")
    if failed is None:
        return NONE
    tried = tuple(failed.decode("latin-1").split())
    sent, status = (headers.get(name, b"").decode("latin-1") for name in (b"x-failed-sent", b"x-failed-status"))
    deaths, timed_out = 0, False
    reason: Reason = "refused"
    for sent_bytes, code in zip(_worker_values(sent), _worker_values(status), strict=False):
        reason = "refused"
        if sent_bytes > 0 and code == TIMEOUT:
            timed_out = True
        elif sent_bytes > 0 and code in (500, 502):
            deaths += 1
            reason = "died" if code == 502 else "failed"
    return Attempts(tried, deaths, timed_out, reason)


def _worker_values(history: str) -> list[int]:
    """Every second group of `350 : 0, 120 : 350 : 99`; within a group the last connection counts."""
    values = []
    for group in history.split(" : ")[1::2]:
        last = group.split(",")[-1].strip()
        values.append(int(last) if last.isdigit() else 0)
    return values


class HeldBack:
    """Digests of request bodies that killed MAX_DEATHS workers, each refused until its time is over."""

    def __init__(
        self, hold_s: int, publish: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._hold_s = hold_s
        self._publish = publish
        self._clock = clock
        self._until: dict[str, float] = {}

    @staticmethod
    def digest(body: bytes) -> str:
        """The fingerprint of a body."""
        return blake2b(body, digest_size=16).hexdigest()

    def add(self, digest: str) -> None:
        """Hold a body back, here (`learn`) and in every other gateway."""
        self.learn(digest)
        self._publish(digest)

    def learn(self, digest: str) -> None:
        """Hold a body back that some gateway has met."""
        self._until[digest] = self._clock() + self._hold_s

    def refuses(self, body: bytes) -> bool:
        """Whether a body is held back; costs nothing while none is."""
        if not self._until:
            return False
        now = self._clock()
        for digest in [d for d, until in self._until.items() if until <= now]:
            del self._until[digest]
        return self.digest(body) in self._until
