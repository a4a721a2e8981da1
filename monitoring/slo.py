"""Service levels, and the alerts that fire when their error budget burns too fast.

Windows and factors are those of the Google SRE workbook, chapter 5 ("Alerting on SLOs", table 5-8): two windows each,
so an alert starts soon and ends soon. Written to `prometheus/rules/slo.yml` by `python -m monitoring`.
"""

from dataclasses import dataclass
from typing import Any

RUNBOOKS = "docs/runbooks"


@dataclass(frozen=True)
class Slo:
    """A share of good events that is promised over 30 days. `bad` and `all` are PromQL with {w} for the window."""

    name: str
    alert: str
    objective: float
    bad: str
    all: str
    what: str
    severe: bool
    """Whether a fast burn is worth waking somebody."""

    def ratio(self, window: str) -> str:
        """The recording rule's name for a window."""
        return f"slo:{self.name}_error_ratio:{window}"

    def expression(self, window: str) -> str:
        """Bad events as a share of all; no data while there are none."""
        return f"({self.bad}) / ({self.all} > 0)".replace("{w}", window)


def _histogram(name: str, le: str) -> tuple[str, str]:
    """Observations above a bucket's bound, and all of them."""
    count = f"sum(increase({name}_count[{{w}}]))"
    return f'{count} - sum(increase({name}_bucket{{le="{le}"}}[{{w}}]))', count


# A 5xx of the gateway, a stream that broke, and a request whose worker died under it and that was not asked again.
# Every other try of a worker that failed was taken over by another worker: nobody saw it.
_FAILED = (
    '(sum(increase(gateway_decisions_total{result=~"5.."}[{w}])) or vector(0))'
    ' + (sum(increase(owngpt_requests_total{outcome="stream_error"}[{w}])) or vector(0))'
    " + clamp_min((sum(increase(gateway_lost_requests_total[{w}])) or vector(0))"
    ' - (sum(increase(gateway_retries_total{reason="died"}[{w}])) or vector(0)), 0)'
)
# What a client did wrong (4xx) is no event at all.
_ANSWERED = 'sum(increase(gateway_decisions_total{result!~"4.."}[{w}]))'

TTFT_S, TPOT_S = "1.0", "0.1"
SLOS = (
    Slo("availability", "AvailabilityBurn", 0.995, _FAILED, _ANSWERED, "requests that failed by our fault", True),
    Slo("ttft", "TtftBurn", 0.95, *_histogram("gen_ai_server_time_to_first_token_seconds", TTFT_S),
        f"streams whose first token took more than {TTFT_S} s", False),
    Slo("tpot", "TokenLatencyBurn", 0.95, *_histogram("gen_ai_server_time_per_output_token_seconds", TPOT_S),
        f"streams with more than {TPOT_S} s between tokens", False),
)


@dataclass(frozen=True)
class Burn:
    """An alert when the budget burns `factor` times too fast over both windows."""

    long: str
    short: str
    factor: float
    for_: str
    severity: str
    spent: str
    """How much of the 30 days' budget is gone when it starts."""


BURNS = (
    Burn("1h", "5m", 14.4, "2m", "page", "2 %"),
    Burn("6h", "30m", 6, "15m", "page", "5 %"),
    Burn("1d", "2h", 3, "1h", "ticket", "10 %"),
    Burn("3d", "6h", 1, "3h", "ticket", "10 %"),
)
FAST, SLOW = ("5m", "30m", "1h"), ("2h", "6h", "1d", "3d", "30d")


def rules() -> dict[str, Any]:
    """The rules file."""
    return {"groups": [
        _recording("slo-fast", "15s", FAST), _recording("slo-slow", "1m", SLOW),
        {"name": "slo-burn", "rules": [_alert(slo, burn) for slo in SLOS for burn in BURNS]},
    ]}  # fmt: skip


def _recording(name: str, interval: str, windows: tuple[str, ...]) -> dict[str, Any]:
    return {"name": name, "interval": interval, "rules": [
        {"record": slo.ratio(window), "expr": slo.expression(window)} for slo in SLOS for window in windows
    ]}  # fmt: skip


def _alert(slo: Slo, burn: Burn) -> dict[str, Any]:
    bound = f"({burn.factor:g} * {1 - slo.objective:.3f})"
    return {
        "alert": slo.alert,
        "expr": f"{slo.ratio(burn.long)} > {bound} and {slo.ratio(burn.short)} > {bound}",
        "for": burn.for_,
        "labels": {"severity": burn.severity if slo.severe else "ticket", "window": burn.long},
        "annotations": {
            "summary": f"{{{{ $value | humanizePercentage }}}} of {slo.what} in the last {burn.long}: "
                       f"{burn.spent} of the month's error budget (objective {slo.objective:.1%})",
            "runbook_url": f"{RUNBOOKS}/{slo.alert}.md",
        },
    }  # fmt: skip
