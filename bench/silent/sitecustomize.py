"""Python reads this at its start where bench/observability.py puts this folder on PYTHONPATH: no metric, no log line."""

import loguru._logger
import prometheus_client

from common import logs


def _nothing(*_: object, **__: object) -> None: ...


logs.RequestLines.write = _nothing  # type: ignore[method-assign]
loguru._logger.Logger._log = _nothing  # type: ignore[method-assign]
prometheus_client.Counter.inc = _nothing  # type: ignore[method-assign]
prometheus_client.Gauge.set = _nothing  # type: ignore[method-assign]
prometheus_client.Histogram.observe = _nothing  # type: ignore[method-assign]
