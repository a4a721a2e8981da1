"""What the ledger asks of others for its status: GPUs and host of the exporter, firing alerts of Prometheus."""

import time
from collections.abc import Callable
from typing import TypeVar

import httpx
from loguru import logger
from prometheus_client.parser import text_string_to_metric_families

LOOK_EVERY_S = 2.0
SILENT_FOR_S = 15.0
"""How long one that did not answer is left alone: looking up a name that does not exist holds a thread for seconds."""
TIMEOUT_S = 1.0

T = TypeVar("T")
Samples = dict[str, list[tuple[dict[str, str], float]]]


def read_samples(text: str) -> Samples:
    """Prometheus text as name -> [(labels, value)]."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def gpus(samples: Samples) -> list[dict[str, object]]:
    """Each GPU as the status shows it; a value its driver does not tell is None."""
    found: list[dict[str, object]] = []
    for labels, _ in samples.get("gpu_info", []):
        gpu = labels["gpu"]

        def value(name: str, gpu: str = gpu, **more: str) -> float | None:
            wanted = {"gpu": gpu, **more}
            return next((v for own, v in samples.get(name, []) if wanted.items() <= own.items()), None)

        found.append({
            "gpu": gpu, "name": labels["name"],
            "utilization": value("gpu_utilization_ratio"),
            "memory_used_bytes": value("gpu_memory_used_bytes", mig=""),
            "memory_total_bytes": value("gpu_memory_total_bytes", mig=""),
            "power_watts": value("gpu_power_watts"),
            "temperature_celsius": value("gpu_temperature_celsius"),
            "throttled": sorted(
                own["reason"] for own, on in samples.get("gpu_throttle_active", [])
                if own["gpu"] == gpu and on and own["reason"] != "idle"
            ),
        })  # fmt: skip
    return found


def host(samples: Samples) -> dict[str, float | None]:
    """The machine as the status shows it."""
    def value(name: str) -> float | None:
        return samples[name][0][1] if samples.get(name) else None

    return {
        "cpu_utilization": value("host_cpu_utilization_ratio"),
        "memory_used_bytes": value("host_memory_used_bytes"),
        "memory_total_bytes": value("host_memory_total_bytes"),
    }


class Neighbours:
    """Asked every LOOK_EVERY_S; what does not answer is missing from the status, and said once in the log."""

    def __init__(self, gpu_exporter_url: str, prometheus_url: str) -> None:
        self._gpu_exporter_url, self._prometheus_url = gpu_exporter_url, prometheus_url
        self._http = httpx.AsyncClient(timeout=TIMEOUT_S)
        self._silent_until: dict[str, float] = {}
        self.gpus: list[dict[str, object]] | None = None
        self.host: dict[str, float | None] | None = None
        self.alerts: list[dict[str, str]] | None = None

    async def look(self) -> None:
        """Ask them."""
        seen = await self._ask(self._gpu_exporter_url, "/metrics", _machine)
        self.gpus, self.host = seen if seen is not None else (None, None)
        self.alerts = await self._ask(self._prometheus_url, "/api/v1/alerts", _alerts)

    async def close(self) -> None:
        """Give the connections back."""
        await self._http.aclose()

    async def _ask(self, base: str, path: str, read: Callable[[httpx.Response], T]) -> T | None:
        """An answer as `read` makes it; None when there is none, or none that can be read."""
        if not base or self._silent_until.get(base, 0.0) > time.monotonic():
            return None
        try:
            answer = read((await self._http.get(base + path)).raise_for_status())
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError, AttributeError) as error:
            if base not in self._silent_until:
                logger.warning("does not answer; the status goes on without it", url=base, error=type(error).__name__)
            self._silent_until[base] = time.monotonic() + SILENT_FOR_S
            return None
        if self._silent_until.pop(base, None) is not None:
            logger.info("answers again", url=base)
        return answer


def _machine(answer: httpx.Response) -> tuple[list[dict[str, object]], dict[str, float | None]]:
    """GPUs and host."""
    samples = read_samples(answer.text)
    return gpus(samples), host(samples)


def _alerts(answer: httpx.Response) -> list[dict[str, str]]:
    """Alerts that are not silent by design, the firing first."""
    found = [
        {
            "name": alert["labels"]["alertname"], "state": alert["state"],
            "severity": alert["labels"].get("severity", ""), "since": alert["activeAt"],
            "summary": alert["annotations"].get("summary", ""), "runbook": alert["annotations"].get("runbook_url", ""),
        }
        for alert in answer.json()["data"]["alerts"]
        if alert["labels"].get("severity") != "none"
    ]  # fmt: skip
    return sorted(found, key=lambda alert: (alert["state"] != "firing", alert["name"]))
