"""A Prometheus to ask, and one to start."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import yaml

from monitoring.panels import Board, Panel
from tests.harness import free_ports, wait_for

RATE_INTERVAL, RANGE = "1m", "10m"


class Prometheus:
    """Its HTTP API."""

    def __init__(self, base: str) -> None:
        self.base = base

    def get(self, path: str, **params: object) -> list:
        answer = httpx.get(f"{self.base}/api/v1/{path}", params=params, timeout=20)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def value(self, expression: str) -> float:
        """The only sample of a query."""
        result = self.get("query", query=expression)["result"]
        assert len(result) == 1, (expression, result)
        return float(result[0]["value"][1])

    def finite_samples(self, expression: str, *, instant: bool = False) -> int:
        """How many samples a query has had in the last two minutes that are numbers."""
        if instant:
            found = self.get("query", query=expression)["result"]
            return sum(series["value"][1] not in ("NaN", "+Inf", "-Inf") for series in found)
        now = time.time()
        found = self.get("query_range", query=expression, start=now - 120, end=now, step=5)["result"]
        return sum(value not in ("NaN", "+Inf", "-Inf") for series in found for _, value in series["values"])

    def alerts(self) -> dict[str, str]:
        """Alerts by name: pending or firing."""
        return {alert["labels"]["alertname"]: alert["state"] for alert in self.get("alerts")["alerts"]}


def fill_in(expression: str) -> str:
    """What Grafana puts in place of its variables."""
    return expression.replace("$__rate_interval", RATE_INTERVAL).replace("$__range", RANGE)


def empty_queries(prometheus: Prometheus, boards: list[Board]) -> list[tuple[str, str, str]]:
    """Every query of every panel that has no data: (board, panel, expression)."""
    found = []
    for board in boards:
        for panel in board.panels():
            for expression, _ in panel.queries:
                if not prometheus.finite_samples(fill_in(expression), instant=is_instant(panel)):
                    found.append((board.uid, panel.title, expression))
    return found


def is_instant(panel: Panel) -> bool:
    return panel.kind == "table"


@contextlib.contextmanager
def running(folder: Path, config: dict) -> Iterator[Prometheus]:
    """A Prometheus of its own with a configuration, gone afterwards."""
    program = shutil.which("prometheus")
    assert program
    port = free_ports(1)[0]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with open(folder / "prometheus.log", "w") as log:
        process = subprocess.Popen([
            program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage",
        ], stdout=log, stderr=log)
    try:
        base = f"http://127.0.0.1:{port}"
        wait_for(lambda: httpx.get(base + "/-/ready").status_code == 200, "Prometheus ready", 20)
        yield Prometheus(base)
    finally:
        process.terminate()
        process.wait(10)
