"""What nginx tells about earlier tries of a request, and what may follow from it.

On a failed try nginx asks again with three headers (`nginx/nginx.conf.template`): the workers tried, and its
`$upstream_bytes_sent` and `$upstream_status` histories, which alternate gateway, worker, gateway, worker.
A client cannot send them: nginx overwrites them on the first ask.
"""

from typing import Literal, NamedTuple

MAX_ATTEMPTS = 4
"""nginx allows ten internal redirects; an attempt takes two."""
MAX_DEATHS = 2
"""A request that was running on two workers when they died is not tried on a third."""

TIMEOUT = 504


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


def read(failed: str, sent: str, status: str) -> Attempts:
    """Parse the three headers; missing or odd parts count as 'nothing was sent'."""
    tried = tuple(failed.split())
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
